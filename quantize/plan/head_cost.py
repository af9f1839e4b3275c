"""The cost of a quantized head and its savings: bytes of the files, of a server's memory, and of each decoded token."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe.heads import is_tied
from .ceiling import Stored, read_bytes
from .plan import Plan


@dataclass(frozen=True)
class HeadCost:
    """The difference that the quantized head makes, in bytes. Negative numbers are savings.

    Attributes:
        scheme: of the head.
        was_tied: whether the source's head is its embedding, which stays in memory beside the new head.
        file_bytes: of the tensors in the files.
        memory_bytes: of a server's weights.
        token_bytes: that a server reads to decode a token.
    """

    scheme: str
    was_tied: bool
    file_bytes: int
    memory_bytes: int
    token_bytes: int

    @property
    def words(self) -> str:
        """The cost in one sentence."""
        why = ", because the embedding stays beside it" if self.was_tied else ""
        return (
            f"The head in {self.scheme} takes {_signed(self.file_bytes)} in the files and {_signed(self.memory_bytes)} "
            f"in memory{why}, and decoding reads {_signed(self.token_bytes)} a token."
        )


def head_cost(plan: Plan) -> HeadCost | None:
    """Compare the output of a plan with the same output with an unquantized head, or None where the head is not
    quantized."""
    head, config = plan.head, plan.source.config
    if head is None or plan.selection.head is None:
        return None
    made = [entry for shard in plan.shards if shard.is_head for entry in shard.entries]
    rest: list[Stored] = [entry for shard in plan.shards if not shard.is_head for entry in shard.entries]
    size, was_tied = sum(entry.nbytes for entry in made), is_tied(config)
    stored: list[Stored] = [] if plan.selection.head.is_embedding else [plan.source.info(head.tensor)]
    file_bytes = size - sum(tensor.nbytes for tensor in stored)
    return HeadCost(
        head.scheme.name,
        was_tied,
        file_bytes,
        size if was_tied else file_bytes,  # a server loads a tied head once, wherever it is stored
        read_bytes(config, [*rest, *made]) - read_bytes(config, [*rest, *stored]),
    )


def _signed(size: int) -> str:
    """Bytes more or less."""
    amount = f"{abs(size) / 1e9:.2f} GB" if abs(size) >= 10**9 else f"{abs(size) / 1e6:.1f} MB"
    return f"{amount} {'less' if size < 0 else 'more'}"
