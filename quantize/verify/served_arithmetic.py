"""Which arithmetic a server uses: as its log reports, as its likelihoods show, or as the checkpoint allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..format.schemes import ARITHMETIC_WORDS, Arithmetic, Scheme, arithmetics_of
from ..serving.kernels import Kernel, server_arithmetic
from .subject import Subject


@dataclass(frozen=True)
class ServedArithmetic:
    """The arithmetic of a server.

    Attributes:
        stored: the arithmetics that the checkpoint's NVFP4 layers are made for.
        schemes: of all its matrices.
        kernels: the kernels that the server's log reports.
    """

    stored: frozenset[Arithmetic]
    schemes: frozenset[Scheme] = frozenset()
    kernels: Sequence[Kernel] = ()

    @property
    def reported(self) -> Arithmetic | None:
        """The server's arithmetic. None where it reports none, or a kernel that nvquant does not know."""
        return server_arithmetic(self.kernels)

    @property
    def possible(self) -> list[Arithmetic]:
        """The arithmetics that the server may use: the reported one, or all that the checkpoint allows."""
        if self.reported is not None:
            return [self.reported]
        return list(arithmetics_of(self.schemes))

    def words(self, found: str | None = None) -> str:
        """The kernels in words.

        Args:
            found: the arithmetic that the server's likelihoods match, where they were compared.
        """
        if self.kernels:
            return ", ".join(kernel.words for kernel in self.kernels)
        return "unknown" if found is None else f"unknown (its likelihoods match {ARITHMETIC_WORDS[found]})"


def stored_arithmetics(subject: Subject) -> frozenset[Arithmetic]:
    """The arithmetics that the checkpoint's NVFP4 layers are made for."""
    matrices = [matrix for matrix in subject.matrices.values() if matrix.scheme.has_block_scales]
    return frozenset("w4a4" if matrix.has_input_scale else "weight_only" for matrix in matrices)
