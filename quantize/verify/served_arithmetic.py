"""Which arithmetic a server uses: as its log reports, as its likelihoods show, or as the checkpoint allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..serving.kernels import Arithmetic, Kernel
from .subject import Subject

WORDS: dict[str, str] = {"w4a4": "W4A4", "weight_only": "weight-only"}


@dataclass(frozen=True)
class ServedArithmetic:
    """The arithmetic of a server.

    Attributes:
        stored: the arithmetics that the checkpoint's layers are made for.
        kernels: the kernels that the server's log reports.
    """

    stored: frozenset[Arithmetic]
    kernels: Sequence[Kernel] = ()

    @property
    def reported(self) -> Arithmetic | None:
        """The server's arithmetic. None where it reports none, or a kernel that nvquant does not know."""
        found = {kernel.arithmetic for kernel in self.kernels}
        if not found or None in found:
            return None
        return "w4a4" if "w4a4" in found else "weight_only"

    @property
    def possible(self) -> list[Arithmetic]:
        """The arithmetics that the server may use: the reported one, or all that the checkpoint allows."""
        if self.reported is not None:
            return [self.reported]
        return ["w4a4", "weight_only"] if "w4a4" in self.stored else ["weight_only"]

    def words(self, found: str | None = None) -> str:
        """The kernels in words.

        Args:
            found: the arithmetic that the server's likelihoods match, where they were compared.
        """
        if self.kernels:
            return ", ".join(kernel.words for kernel in self.kernels)
        return "unknown" if found is None else f"unknown (its likelihoods match {WORDS[found]})"


def stored_arithmetics(subject: Subject) -> frozenset[Arithmetic]:
    """The arithmetics that the checkpoint's layers are made for."""
    return frozenset("w4a4" if matrix.has_input_scale else "weight_only" for matrix in subject.matrices.values())
