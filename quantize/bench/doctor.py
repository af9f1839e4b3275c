"""The examination of this machine for NVFP4: one finding for each thing that serving needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..errors import EnvironmentLack, InputError
from ..plan.ceiling import kv_bytes_per_value
from ..plan.forecast import VLLM_SHARE
from ..serving.command import VllmCommand, find_vllm
from ..serving.faults import Situation, known_faults, version_key
from ..serving.machine import Gpu, fp4_kind, fp4_path, gpus, ram_bytes
from .fit import DEFAULT_CONTEXT, Fit, fit, ranks_that_fit
from .inspection import (
    VllmEnvironment,
    free_bytes,
    hub_cache,
    hub_token,
    installed,
    is_known_to_transformers,
    look_into,
)
from .subject import Subject

Status = Literal["ok", "warning", "lacks"]
# vLLM's wheels are built with CUDA 13 (torch 2.11.0+cu130 in 0.24), which drivers from 580 on run. Source: NVIDIA,
# CUDA 13.0 release notes, "CUDA driver".
LEAST_DRIVER = 580
LEAST_FREE_BYTES = 10 * 10**9
NEEDED = {"torch": (2, 10), "transformers": (5, 15)}
OPTIONAL = ("llmcompressor",)
NO_KERNELS_HINT = "install a C compiler, then run `pip install --force-reinstall --no-deps nvquant`"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        hint: the way out, one sentence without a full stop. Empty where none is needed.
    """

    name: str
    status: Status
    words: str
    hint: str = ""


@dataclass
class Doctor:
    """An examination of this machine.

    Attributes:
        subject: a checkpoint to serve here.
        context: tokens of its longest request.
        vllm: the command line of `--vllm`.
        kv_cache_dtype: vLLM's name.
        fits: the checkpoint's memory, set by `run`.
    """

    subject: Subject | None = None
    context: int | None = None
    vllm: str | None = None
    kv_cache_dtype: str = "auto"
    fits: Fit | None = field(default=None, init=False)

    @cached_property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that can be used."""
        return gpus()

    @cached_property
    def ram(self) -> tuple[int, int]:
        """Total and available."""
        return ram_bytes()

    @cached_property
    def found(self) -> VllmCommand | str:
        """The vLLM, or a sentence on why there is none."""
        try:
            return find_vllm(self.vllm)
        except (EnvironmentLack, InputError) as error:
            return str(error)

    @cached_property
    def environment(self) -> VllmEnvironment | None:
        """The packages beside that vLLM."""
        return look_into(self.found) if isinstance(self.found, VllmCommand) else None

    @property
    def is_cpu(self) -> bool:
        """Whether a server would compute on the CPU."""
        return not self.gpus or (isinstance(self.found, VllmCommand) and self.found.is_cpu_build)

    def run(self) -> Iterator[Finding]:
        """All findings, the most important first."""
        yield from self._gpu()
        yield from self._memory()
        yield from self._vllm()
        yield from self._packages()
        yield self._token()
        yield from self._disk()
        yield self._ram()

    def machine(self) -> dict[str, Any]:
        """Facts for a JSON document."""
        return {
            "gpus": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "capability": ".".join(map(str, gpu.capability)) if gpu.capability else None,
                    "nvfp4": fp4_kind(gpu.capability) if gpu.capability else None,
                    "total_bytes": gpu.total_bytes,
                    "free_bytes": gpu.free_bytes,
                    "driver": gpu.driver,
                    "bandwidth_bytes_per_second": gpu.bandwidth_bytes,
                }
                for gpu in self.gpus
            ],
            "ram_bytes": self.ram[0],
            "ram_available_bytes": self.ram[1],
            "vllm": self.found.version if isinstance(self.found, VllmCommand) else None,
        }

    def _gpu(self) -> Iterator[Finding]:
        if not self.gpus:
            yield Finding("GPU", "warning", fp4_path(None), "use a GPU from Turing on to serve at full speed")
            return
        for gpu in self.gpus:
            if gpu.capability is None:
                words = f"{gpu.name}: the driver does not report its compute capability"
                yield Finding("GPU", "warning", words, "install a newer driver")
                continue
            is_too_old = fp4_kind(gpu.capability) == "none"
            yield Finding(
                "GPU", "lacks" if is_too_old else "ok", f"{gpu.name}: {fp4_path(gpu.capability)}",
                "use another GPU, or a BF16 checkpoint" if is_too_old else "",
            )  # fmt: skip
        driver = self.gpus[0].driver
        key = version_key(driver)
        if key is not None and key[0] < LEAST_DRIVER:
            words = f"{driver}: vLLM's own builds require {LEAST_DRIVER} or newer (CUDA 13)"
            yield Finding("driver", "warning", words, "update the driver, or use a vLLM built with an older CUDA")
        else:
            yield Finding("driver", "ok", driver)

    def _memory(self) -> Iterator[Finding]:
        """The checkpoint's memory against the GPU's, or the machine's where a CPU serves."""
        subject = self.subject
        if subject is None:
            for gpu in self.gpus:
                yield _memory_of(gpu)
            return
        limit = subject.longest_context
        context = min(self.context or DEFAULT_CONTEXT, limit or self.context or DEFAULT_CONTEXT)
        value_bytes = kv_bytes_per_value(subject.config, self.kv_cache_dtype)
        if self.context is not None and limit is not None and self.context > limit:
            words = f"a context of {self.context:,} is more than the {limit:,} tokens that the model supports"
            yield Finding("context", "lacks", words, f"use --context {limit}")
        memory = self.ram[1] if self.is_cpu else min(gpu.total_bytes for gpu in self.gpus)
        self.fits = fit(subject, context, memory, value_bytes, is_cpu=self.is_cpu)
        yield self._fit_finding(self.fits, subject, value_bytes)
        if self.gpus and not self.is_cpu and self.fits.fits:
            gpu = max(self.gpus, key=lambda one: one.free_bytes)
            if self.fits.needed_bytes > gpu.free_bytes:
                words = f"only {_gb(gpu.free_bytes)} of {_gb(gpu.total_bytes)} are free on {gpu.name}"
                yield Finding("memory", "warning", words, "end the programs that use the rest (nvidia-smi lists them)")

    def _fit_finding(self, found: Fit, subject: Subject, value_bytes: int) -> Finding:
        where = "RAM that is available" if self.is_cpu else "GPU memory"
        kind = "FP8" if value_bytes == 1 else "16-bit"
        decoded = ", decoded to 16 bits" if self.is_cpu and subject.matrices else ""
        words = (
            f"{subject.folder.name} needs {_gb(found.needed_bytes)} of {_gb(found.memory_bytes)} {where}: weights "
            f"{_gb(found.weights_bytes)}{decoded}, {kind} KV cache for {found.context:,} tokens {_gb(found.kv_bytes)}, "
            f"other {_gb(found.other_bytes)}"
        )
        longest = ", ".join(f"{tokens:,} with a KV cache of {name}" for name, tokens in found.longest.items() if tokens)
        words += f", longest context of one request: {longest}" if longest else ", no context fits"
        if found.fits and (self.is_cpu or found.fits_by_default):
            return Finding("memory", "ok", words)
        if found.fits:
            share = min(0.99, found.needed_bytes / found.memory_bytes + 0.01)
            hint = f"vLLM uses {VLLM_SHARE:.0%} by default: set --gpu-memory-utilization={share:.2f}"
            return Finding("memory", "warning", words, hint)
        return Finding("memory", "lacks", words, self._way_out(found, subject, value_bytes))

    def _way_out(self, found: Fit, subject: Subject, value_bytes: int) -> str:
        ways = []
        if value_bytes > 1 and found.longest["fp8"] >= found.context:
            ways.append("--kv-cache-dtype fp8")
        best = max(found.longest.values())
        if best:
            ways.append(f"a context of at most {best:,}")
        ranks = None if self.is_cpu else ranks_that_fit(subject, found.context, found.memory_bytes, value_bytes)
        if ranks:
            ways.append(f"{ranks} such GPUs with --tensor-parallel {ranks} ({len(self.gpus)} here)")
        if not self.is_cpu and not best and not ranks:
            ways.append("a GPU with more memory")
        return f"use {', or '.join(ways) or 'a machine with more memory'}"

    def _vllm(self) -> Iterator[Finding]:
        found = self.found
        if isinstance(found, str):
            problem, _, way_out = found.rstrip(".").rpartition(": ")
            yield Finding("vLLM", "lacks", problem or way_out, way_out if problem else "")
            return
        environment = self.environment
        beside = {name: value for name, value in (environment.versions if environment else {}).items() if value}
        packages = ", ".join(f"{name} {value}" for name, value in beside.items())
        build = " (CPU build)" if found.is_cpu_build else ""
        yield Finding(
            "vLLM", "ok", f"{found.version or 'unknown version'}{build}: {' '.join(found.words)}"
            + (f", with {packages}" if packages else "")
        )  # fmt: skip
        if self.is_cpu and environment is not None and not environment.has_cpu_plugin:
            words = "vLLM's CPU build has no kernel for NVFP4, and nvquant's plugin is not installed beside it"
            yield Finding("vLLM plugin", "lacks", words, "install integrations/vllm_cpu there (see its README)")
        yield from self._architecture(environment)
        capability = self.gpus[0].capability if self.gpus and not self.is_cpu else None
        situation = (
            self.subject.situation(found.version, capability, self.is_cpu, self.kv_cache_dtype)
            if self.subject
            else Situation(vllm=found.version, capability=capability, is_cpu=self.is_cpu)
        )
        for fault in known_faults(situation):
            yield Finding("known fault", "warning", f"{fault.hint} ({fault.source})")

    def _architecture(self, environment: VllmEnvironment | None) -> Iterator[Finding]:
        """Whether vLLM and transformers know the model."""
        if self.subject is None:
            return
        names = [str(name) for name in self.subject.config.get("architectures") or ()]
        kind = self.subject.config.get("model_type")
        if environment is not None and environment.architectures and names:
            knows = any(name in environment.architectures for name in names)
            words = f"vLLM {'knows' if knows else 'does not know'} {', '.join(names)}"
            yield Finding("architecture", "ok" if knows else "lacks", words, "" if knows else "install a newer vLLM")
        known = is_known_to_transformers(self.subject.config)
        if known is not None:
            words = f"transformers {'knows' if known else 'does not know'} {kind}"
            hint = "" if known else "run `pip install -U transformers`, for conversion and numerics"
            yield Finding("architecture", "ok" if known else "lacks", words, hint)

    def _packages(self) -> Iterator[Finding]:
        for name, least in NEEDED.items():
            have = installed(name)
            wanted = ".".join(map(str, least))
            if have is None:
                yield Finding(name, "lacks", "not installed", f"run `pip install '{name}>={wanted}'`")
            elif (version_key(have) or least) < least:
                yield Finding(
                    name, "lacks", f"{have}, but {wanted} is required", f"run `pip install -U '{name}>={wanted}'`"
                )
            else:
                yield Finding(name, "ok", have)
        yield _kernels()
        for name in OPTIONAL:
            have = installed(name)
            yield Finding(name, "ok", have or "not installed (only --engine llmcompressor requires it)")

    def _token(self) -> Finding:
        token = hub_token()
        if token is None:
            words = "none (only gated models and uploads require one)"
            return Finding("hub token", "warning", words, "run `hf auth login`")
        owner = f", stored as {token.owner}" if token.owner else ""
        return Finding("hub token", "ok", f"present ({token.where}{owner})")

    def _disk(self) -> Iterator[Finding]:
        needed = max(LEAST_FREE_BYTES, self.subject.weights_bytes if self.subject else 0)
        for name, folder in (("disk, working folder", Path.cwd()), ("disk, hub cache", hub_cache())):
            free = free_bytes(folder)
            if free is None:
                yield Finding(name, "warning", f"{folder}: free space is unknown")
                continue
            is_enough = free >= needed
            hint = "" if is_enough else "free some space, or use another disk (HF_HOME moves the cache)"
            yield Finding(name, "ok" if is_enough else "warning", f"{_gb(free)} free at {folder}", hint)

    def _ram(self) -> Finding:
        total, available = self.ram
        return Finding("RAM", "ok" if total else "warning", f"{_gb(available)} of {_gb(total)} available")


def as_json(doctor: Doctor, findings: list[Finding]) -> Mapping[str, Any]:
    """The document of `doctor --json`."""
    return {
        "ok": all(finding.status != "lacks" for finding in findings),
        "checks": [
            {"name": f.name, "status": f.status, "words": f.words, "hint": f.hint or None} for f in findings
        ],
        "machine": doctor.machine(),
        "memory": doctor.fits.as_json() if doctor.fits else None,
    }  # fmt: skip


def _kernels() -> Finding:
    """Whether the compiled CPU kernels are in use."""
    if find_spec("nvquant.format._native") is not None:
        return Finding("CPU kernels", "ok", "compiled")
    words = "not compiled, so PyTorch computes the same bytes more slowly"
    return Finding("CPU kernels", "warning", words, NO_KERNELS_HINT)


def _memory_of(gpu: Gpu) -> Finding:
    speed = gpu.bandwidth_bytes
    words = f"{gpu.name}: {_gb(gpu.free_bytes)} of {_gb(gpu.total_bytes)} free"
    return Finding("memory", "ok", words + (f", {speed / 1e12:.2f} TB/s" if speed else ""))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
