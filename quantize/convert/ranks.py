"""The processes of one conversion, as `accelerate launch -m nvquant convert …` starts them. Usually there is one.

The ranks share the calibration batches in order, and every rank walks all layers with its own batches. The statistics
are merged exactly, so they do not depend on the rank that observed them. The ranks share the fused groups of a layer
for quantization, and the rank that owns the layer (its index modulo the ranks) writes it. All ranks report the success
of each step, so an error on one ends the run on all with the same sentence.
Source: torch.distributed. Gloo transfers data in host memory, NCCL data on GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibrate.statistics.base import Statistic
from ..errors import EnvironmentLack, NvquantError

S = TypeVar("S", bound=Statistic)

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank may compute long between two words; one that ended is noticed at once, since its connections close.
_PATIENCE = timedelta(hours=6)
# Before they are connected nothing tells of a rank that ended; a launcher starts them all at about the same time.
_MEETING = timedelta(minutes=10)


class RankFailed(NvquantError):
    """Another rank had an error. This one has that error's sentence and exit code."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = exit_code


class RankLost(NvquantError):
    """Another rank ended without a report."""

    exit_code = 3


@dataclass(frozen=True)
class _Word:
    """The report of a rank after a step."""

    value: Any = None
    error: str | None = None
    exit_code: int = 1


class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number.
        size: how many there are.
        local_size: how many of them share this host.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self._is_lost = False

    def owner_of(self, index: int) -> int:
        """The rank that writes the layer or file of that index."""
        return index % self.size

    def owns(self, index: int) -> bool:
        """Whether this rank writes the layer or file of that index."""
        return self.owner_of(index) == self.rank

    def split(self, batches: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Batches by rank, in their order, so that the samples of rank 0 come before those of rank 1."""
        bounds = [len(batches) * rank // self.size for rank in range(self.size + 1)]
        return [batches[bounds[rank] : bounds[rank + 1]] for rank in range(self.size)]

    def share_out(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The rank of each name, so that the sums of sizes are about equal. The largest names come first."""
        load = [0] * self.size
        shared = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            rank = load.index(min(load))
            load[rank] += sizes[name]
            shared[name] = rank
        return shared

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step of work after which all ranks continue together, or none does.

        Raises:
            RankFailed: another rank's step raised.
            RankLost: another rank ended.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not isinstance(error, (RankFailed, RankLost)):
                code = error.exit_code if isinstance(error, NvquantError) else 1
                with contextlib.suppress(NvquantError):
                    self._hear(_Word(error=str(error) or type(error).__name__, exit_code=code))
            raise
        self.exchange()

    def exchange(self, value: Any = None) -> list[Any]:
        """Every rank's value, in the order of the ranks. See `step` for the errors."""
        return [value] if self.size == 1 else self._hear(_Word(value))

    def _hear(self, word: _Word) -> list[Any]:
        words: list[Any] = [None] * self.size
        with self._noticing_loss():
            torch.distributed.all_gather_object(words, word)
        for rank, heard in enumerate(words):
            if heard.error is not None and rank != self.rank:
                raise RankFailed(rank, heard.error, heard.exit_code)
        return [heard.value for heard in words]

    def merged(self, statistic: S) -> S:
        """A statistic over the samples of all ranks, equal bit for bit to that of one process.

        Args:
            statistic: this rank's. All ranks merge the same statistics in the same order.
        """
        if self.size == 1:
            return statistic
        return type(statistic).merged(self._states(statistic.state()))

    def _states(self, mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The state of every rank, which may differ in sizes."""
        shapes = self.exchange({name: tuple(tensor.shape) for name, tensor in mine.items()})
        states: list[dict[str, Tensor]] = [{} for _ in shapes]
        with self._noticing_loss():
            for name, tensor in mine.items():
                of_ranks = [shape[name] for shape in shapes]
                for state, part in zip(states, self._gather(tensor, of_ranks), strict=True):
                    state[name] = part
        return states

    def _gather(self, mine: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """A tensor of every rank, in the shape that it has there."""
        parts = [torch.empty(shape, dtype=mine.dtype) for shape in shapes]
        parts[self.rank] = mine.contiguous()
        if len(set(shapes)) == 1 and mine.numel():
            torch.distributed.all_gather(parts, parts[self.rank].clone())
            return parts
        for rank, part in enumerate(parts):
            if part.numel():
                torch.distributed.broadcast(part, src=rank)
        return parts

    def hand_over(
        self, owner: int, makers: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], made: Mapping[str, Tensor],
        device: torch.device,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Send uint8 tensors to the rank that writes them.

        Args:
            makers: the rank that made each tensor. All ranks have the same mapping in the same order.
            made: the tensors of this rank, on `device`.
        Returns:
            all tensors on the owner, and its own tensors on each other rank.
        """
        result = dict(made)
        if self.size == 1:
            return result
        operations = []
        for name, maker in makers.items():
            if maker == owner:
                continue
            if self.rank == maker:
                operations.append(torch.distributed.P2POp(torch.distributed.isend, made[name].contiguous(), owner))
            elif self.rank == owner:
                result[name] = torch.empty(shapes[name], dtype=torch.uint8, device=device)
                operations.append(torch.distributed.P2POp(torch.distributed.irecv, result[name], maker))
        if operations:
            with self._noticing_loss():
                for work in torch.distributed.batch_isend_irecv(operations):
                    work.wait()
        return result

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises when a connection closes
            self._is_lost = True
            raise RankLost(
                f"one of the {self.size} ranks ended (rank {self.rank} lost its connection)",
                hint="read the last lines of that rank for the reason. To resume, run the same command again",
            ) from error

    def leave(self) -> None:
        """End the connections. A process that ends without this call may be aborted."""
        if self._is_lost and "nccl" in str(torch.distributed.get_backend_config()):
            return  # NCCL would wait for those that are gone
        torch.distributed.destroy_process_group()


def join_ranks(device: str) -> tuple[str, Ranks]:
    """The connected ranks that a launcher started, or one rank without a launcher.

    Args:
        device: `cpu` or `cuda`.
    Returns:
        this rank's device, and the ranks.
    Raises:
        EnvironmentLack: one of the launcher's variables is not a number.
        RankLost: the ranks cannot connect.
    """
    if not all(name in os.environ for name in _LAUNCHED) or _number("WORLD_SIZE", 1) < 2:
        return device, Ranks()
    # Its functions take the group that exists when they are imported for a default, and would keep it alive for ever:
    # Gloo's threads would go on while the interpreter ends, and abort it now and then.
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

    local_rank, local_size = _number("LOCAL_RANK", 0), max(1, _number("LOCAL_WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # a launcher's caution; the cores are there to be used
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    try:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RankLost(f"the ranks cannot connect ({str(error).splitlines()[0]})", hint="start them again") from error
    ranks = Ranks(rank, size, local_size)
    atexit.register(ranks.leave)
    return device, ranks


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError as error:
        raise EnvironmentLack(
            f"the environment variable {name} is {value!r}, which is not a number",
            hint="unset it, or use another launcher",
        ) from error
