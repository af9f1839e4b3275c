"""The loss by kind of text: a table, and the kinds that lost clearly more than the others."""

from __future__ import annotations

from ..format.schemes import ARITHMETIC_WORDS
from ..quoting import one_line
from ..verify.numerics.document import KindLoss, Numerics
from ..verify.numerics.kinds import warning_words
from .parts import Column, Table
from .words import number, percent, with_error

NOT_MEASURED = KindLoss()


def kinds_table(numerics: Numerics | None) -> Table | None:
    """A row for each kind of text: KL divergence, top-1 agreement and the relative loss under each arithmetic."""
    if numerics is None:
        return None
    names = [name for name in ARITHMETIC_WORDS if name in numerics.arithmetics and numerics.arithmetics[name].kinds]
    if not names:
        return None
    columns = [Column("kind", "text"), Column("tokens")]
    for name in names:
        word = ARITHMETIC_WORDS[name]
        columns += [Column(f"{word} KL, nats"), Column(f"{word} top-1"), Column(f"{word} beside the others")]
    kinds = list(dict.fromkeys(kind for name in names for kind in numerics.arithmetics[name].kinds))
    lines = []
    for kind in kinds:
        losses = [numerics.arithmetics[name].kinds.get(kind, NOT_MEASURED) for name in names]
        cells = [cell for loss in losses for cell in _cells(loss)]
        lines.append((one_line(kind), number(losses[0].tokens), *cells))
    return Table("Loss by kind of text", tuple(columns), tuple(lines))


def kind_warnings(numerics: Numerics | None) -> tuple[str, ...]:
    """A sentence for each kind that lost clearly more than the others."""
    found = [] if numerics is None else numerics.kind_warnings
    return tuple(one_line(warning_words(one, ARITHMETIC_WORDS.get(one.arithmetic or "", ""))) for one in found)


def _cells(loss: KindLoss) -> tuple[str, str, str]:
    return with_error(loss.kl.mean, loss.kl.standard_error), percent(loss.top1.agreement), number(loss.relative)
