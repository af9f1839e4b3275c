"""The training: steps over batches of text, with snapshots from which a run that ended early resumes.

Adam (Kingma and Ba, arXiv 1412.6980) with learning rates that fall to zero along a cosine. Rates and tokens were
measured (docs/accuracy.md, "Distillation").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.digest import file_sha256
from ..checkpoint.headers import read_header
from ..checkpoint.shard_bytes import read_range
from ..checkpoint.source import read_json, tensor_bytes
from ..checkpoint.writer import TensorEntry, write_json, write_shard
from ..convert.journal import Journal
from ..convert.stop import Stopped
from ..errors import InputError
from .divergence import Divergence
from .options import BATCH_SEQUENCES, DistillOptions
from .resident import Resident, padded
from .student import Flat, Student

RECORD_NAME = "training.json"
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass
class _Moments:
    """The running means of Adam for some numbers.

    Attributes:
        rate: the first learning rate.
        first, second: of gradients and of their squares.
    """

    flat: Flat
    rate: float
    first: Tensor
    second: Tensor

    def step(self, number: int, share: float) -> None:
        """Move the numbers, the `number`-th time from 1 on, with a share of the rate."""
        for kept, beta, value in (
            (self.first, _BETAS[0], self.flat.gradient),
            (self.second, _BETAS[1], self.flat.gradient.square()),
        ):
            kept.mul_(beta).add_(value, alpha=1 - beta)
        first, second = (1 - beta**number for beta in _BETAS)
        moved = self.first / ((self.second / second).sqrt_().add_(_EPSILON))
        self.flat.values.sub_(moved, alpha=share * self.rate / first).clamp_(-self.flat.most, self.flat.most)


class Training:
    """The training of a student.

    Attributes:
        fault: why the training ended early, or an empty text.

    Args:
        samples: int64 [tokens] each, of the training text.
        journal: for snapshots.
    """

    def __init__(
        self,
        teacher: Resident,
        student: Student,
        samples: Sequence[Tensor],
        options: DistillOptions,
        journal: Journal,
    ) -> None:
        self._teacher, self._student, self._options, self._journal = teacher, student, options, journal
        self._divergence = Divergence(teacher, student)
        self._batches = [samples[at : at + BATCH_SEQUENCES] for at in range(0, len(samples), BATCH_SEQUENCES)]
        rates = (options.scale_rate, options.norm_rate)
        self._moments = [
            _Moments(flat, rate, torch.zeros_like(flat.values), torch.zeros_like(flat.values))
            for flat, rate in zip(student.trained, rates, strict=True)
        ]
        self.fault = ""

    def run(self) -> None:
        """Train, or resume from the last snapshot.

        Raises:
            Stopped: a signal requested it. A snapshot is kept.
        """
        options, count = self._options, len(self._batches)
        for at in range(self._restore(), count):
            if options.stop.number is not None:
                self._take(at)
                stopped = Stopped(options.stop.number, at, count)
                stopped.what = f"Stopped after step {at} of {count}"
                raise stopped
            loss = self._step(self._batches[at])
            options.progress(at + 1, count, f"distilling, KL {loss:.4f}, step")
            if not math.isfinite(loss):
                self.fault = f"the KL divergence of step {at + 1} is no number"
                return
            for moments in self._moments:
                moments.step(at + 1, (1 + math.cos(math.pi * at / count)) / 2)
            if (at + 1) % options.snapshot_steps == 0 or at + 1 == count:
                self._take(at + 1)

    def _step(self, samples: Sequence[Tensor]) -> float:
        """Set the gradients of a batch. Returns its mean divergence before the step."""
        batch, real = padded(samples)
        real = real.to(self._teacher.device)
        with torch.no_grad():
            source = self._teacher.hidden(batch)[real]
        for flat in self._student.trained:
            flat.gradient.zero_()
        hidden = self._student.hidden(batch)[real]
        loss, gradient = self._divergence.gradient(source, hidden.detach())
        if math.isfinite(loss):
            torch.autograd.backward(hidden, gradient)
        return loss

    def _state(self) -> dict[str, Tensor]:
        names = ("scales", "norms")
        return {
            f"{name}.{key}": tensor
            for name, moments in zip(names, self._moments, strict=True)
            for key, tensor in (
                ("values", moments.flat.values),
                ("first", moments.first),
                ("second", moments.second),
            )
        }

    def _take(self, steps: int) -> None:
        """Write a snapshot after so many steps. The one before it stays until the record names the new one."""
        folder, file, state = self._journal.folder, f"training-{steps:06d}.safetensors", self._state()
        entries = [TensorEntry(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()]

        def contents(entry: TensorEntry) -> Iterator[memoryview]:
            yield tensor_bytes(state[entry.name].cpu())

        digest = write_shard(folder / file, entries, contents)
        write_json(folder / RECORD_NAME, {"steps": steps, "file": file, "sha256": digest})
        for old in folder.glob("training-*.safetensors"):
            if old.name != file:
                old.unlink()

    def _restore(self) -> int:
        """The number of steps of the last snapshot, whose state is put back. 0 without a usable one."""
        folder = self._journal.folder
        try:
            record = read_json(folder / RECORD_NAME, "") if (folder / RECORD_NAME).exists() else {}
            steps, file = int(record.get("steps", 0)), folder / str(record.get("file", ""))
            if not steps or file.parent != folder or file_sha256(file) != record.get("sha256"):
                return 0
            header = read_header(file)
        except (InputError, OSError, TypeError, ValueError):
            return 0
        for name, tensor in self._state().items():
            read = torch.empty(tensor.shape)
            read_range(header.path, header.tensors[name].begin, tensor_bytes(read), header)
            tensor.copy_(read)
        return steps
