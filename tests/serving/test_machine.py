"""What is read of a machine: its GPUs as nvidia-smi lists them, what NVFP4 does there, how fast the memory is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nvquant.serving import machine
from nvquant.serving.machine import bandwidth_bytes, fp4_kind, fp4_path, gpus, ram_bytes, used_bytes
from support.nvidia_smi import NO_DRIVER, RECORDED_H100, RTX_5090, put_nvidia_smi, row

TWO = [row(0, "NVIDIA L40S", "8.9", "46068", "45000"), row(1, "NVIDIA GeForce RTX 5090", "12.0", "32607", "20000")]


def test_a_recorded_h100_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, [RECORDED_H100])
    (gpu,) = gpus()
    assert (gpu.name, gpu.capability, gpu.driver) == ("NVIDIA H100 80GB HBM3", (9, 0), "580.159.04")
    assert (gpu.total_bytes, gpu.free_bytes) == (81559 << 20, 81079 << 20)
    assert gpu.bandwidth_bytes == 3.35e12


def test_no_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()
    assert used_bytes(()) is None


@pytest.mark.parametrize("lines", [[NO_DRIVER], ["No devices were found"], ["0, only, three"], []])
@pytest.mark.parametrize("code", [0, 9])
def test_a_driver_that_does_not_run_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], code: int
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, lines, code=code)
    assert gpus() == ()


def test_a_gpu_without_memory_of_its_own_has_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, [row(0, "NVIDIA GB10", "12.1", "[N/A]", "[N/A]")])
    (gpu,) = gpus()
    assert gpu.total_bytes == ram_bytes()[0] > 0
    assert 0 < gpu.free_bytes <= gpu.total_bytes


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        (None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,9,1", [0]), ("GPU-00000001", [1]),
        ("GPU-0000000", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices_chooses_as_cuda_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, indexes: list[int]
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, TWO)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in gpus()] == indexes


def test_used_memory_is_that_of_the_named_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, TWO, ["0, 1000", "1, 500"])
    assert used_bytes(gpus()) == 1500 << 20
    assert used_bytes(gpus()[1:]) == 500 << 20
    put_nvidia_smi(tmp_path, monkeypatch, TWO, ["0, 1000", "1, [N/A]"])
    assert used_bytes(gpus()) is None
    assert used_bytes(gpus()[:1]) == 1000 << 20


@pytest.mark.parametrize(
    ("capability", "kind", "word"),
    [
        ((12, 1), "native", "Blackwell"), ((12, 0), "native", "Blackwell"), ((10, 3), "native", "Blackwell"),
        ((10, 0), "native", "Blackwell"), ((9, 0), "weight_only", "Hopper"), ((8, 9), "weight_only", "Ada"),
        ((8, 6), "weight_only", "Ampere"), ((8, 0), "weight_only", "Ampere"), ((7, 5), "weight_only", "Turing"),
        ((7, 0), "none", "Volta"), ((6, 1), "none", "before Volta"), (None, "emulated", "CPU"),
    ],
)  # fmt: skip
def test_what_nvfp4_does_depends_on_the_compute_capability(
    capability: tuple[int, int] | None, kind: str, word: str
) -> None:
    assert fp4_kind(capability) == kind
    assert word in fp4_path(capability)


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1.792),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 1.792),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 1.597),
        ("NVIDIA GeForce RTX 5090", 1.792), ("NVIDIA GeForce RTX 5080", 0.96), ("NVIDIA GeForce RTX 5070 Ti", 0.896),
        ("NVIDIA GeForce RTX 4090", 1.008), ("NVIDIA GeForce RTX 4080", 0.717), ("NVIDIA GeForce RTX 3090", 0.936),
        ("NVIDIA GeForce RTX 4080 SUPER", 0.736), ("NVIDIA GeForce RTX 4070 Ti SUPER", 0.672),
        ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H100 PCIe", 2.0), ("NVIDIA H100 NVL", 3.9), ("NVIDIA H200", 4.8),
        ("NVIDIA B200", 8.0), ("NVIDIA GB200", 8.0), ("NVIDIA L40S", 0.864), ("NVIDIA L4", 0.3),
        ("NVIDIA A100-SXM4-80GB", 2.039), ("NVIDIA A100 80GB PCIe", 1.935), ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA GB10", 0.273), ("NVIDIA RTX 6000 Ada Generation", 0.96), ("Tesla T4", 0.32),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.576),
    ],
)  # fmt: skip
def test_bandwidth_by_the_name_that_nvidia_smi_gives(name: str, terabytes: float) -> None:
    assert bandwidth_bytes(name) == pytest.approx(terabytes * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4080 Laptop GPU", "NVIDIA GeForce RTX 5090 D v2", "NVIDIA Q9000", "", "L40Sx"]
)
def test_unknown_names_have_no_bandwidth(name: str) -> None:
    assert bandwidth_bytes(name) is None


def test_every_row_of_the_bandwidth_table_is_within_what_memory_does() -> None:
    assert all(200 < gigabytes <= 8000 for _, gigabytes in machine.BANDWIDTH_GB)
    assert len({pattern for pattern, _ in machine.BANDWIDTH_GB}) == len(machine.BANDWIDTH_GB)


def test_ram_is_the_machine_s() -> None:
    total, available = ram_bytes()
    assert 0 < available <= total
    assert total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 1.01


def test_a_gpu_is_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    put_nvidia_smi(tmp_path, monkeypatch, [RTX_5090])
    code = "import sys; from nvquant.serving.machine import gpus; print(gpus()[0].name, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "NVIDIA GeForce RTX 5090 False"
