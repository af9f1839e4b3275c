"""The fused groups that a sweep measures, the schemes of each, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..plan.plan import Plan
from ..recipe.decoder import layer_index
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix, matrix_entries
from ..recipe.schema import SchemeName

WIDER: SchemeName = "fp8"
UNQUANTIZED = "bf16"


@dataclass(frozen=True)
class Candidate:
    """A fused group of a decoder layer.

    Attributes:
        schemes: names of the schemes that it may get: the recipe's, then FP8. It may also stay unquantized.
        weights: number of its weights.
        tensor_bytes: of all tensors that are stored for it, by scheme. `UNQUANTIZED` is one of the keys.
        weight_bytes: the same without scalars: codes, and scales of blocks or rows.
    """

    group: FusedGroup
    layer: int
    schemes: tuple[SchemeName, ...]
    weights: int
    tensor_bytes: dict[str, int]
    weight_bytes: dict[str, int]


def candidates_of(plan: Plan) -> list[Candidate]:
    """The fused groups of a plan's decoder layers, in the order of the layers."""
    head = plan.head
    found = [_candidate(plan, group) for group in plan.groups if head is None or head.name not in group.members]
    return sorted(found, key=lambda candidate: candidate.layer)


def _candidate(plan: Plan, group: FusedGroup) -> Candidate:
    matrices = [plan.matrices[module] for module in group.members]
    own: SchemeName = plan.selection.schemes[group.members[0]]
    schemes = (own,) if own == WIDER else (own, WIDER)
    layer = layer_index(f"{group.name}.", plan.prefix)
    assert layer is not None  # a recipe quantizes only matrices of decoder layers and the head
    tensor_bytes: dict[str, int] = {}
    weight_bytes: dict[str, int] = {}
    for scheme in schemes:
        tensor_bytes[scheme], weight_bytes[scheme] = _stored(plan, matrices, scheme)
    tensor_bytes[UNQUANTIZED] = weight_bytes[UNQUANTIZED] = sum(map(plan.source_bytes, matrices))
    weights = sum(matrix.rows * matrix.cols for matrix in matrices)
    return Candidate(group, layer, schemes, weights, tensor_bytes, weight_bytes)


def _stored(plan: Plan, matrices: Iterable[Matrix], scheme: str) -> tuple[int, int]:
    """Bytes of the tensors of some matrices in a scheme, with and without scalars."""
    entries = [
        entry
        for matrix in matrices
        for entry in matrix_entries(replace(matrix, scheme=plan.layout.schemes[scheme]), plan.layout).values()
    ]
    scalar = plan.layout.scalar_shape
    return sum(e.nbytes for e in entries), sum(e.nbytes for e in entries if e.shape != scalar)


def in_one_scheme(plan: Plan, at: int) -> Plan:
    """A plan to quantize with, in which each group has its scheme number `at`, or its last one.

    Only its matrices are changed, so it plans no output.
    """
    matrices = dict(plan.matrices)
    for candidate in candidates_of(plan):
        scheme = plan.layout.schemes[candidate.schemes[min(at, len(candidate.schemes) - 1)]]
        for module in candidate.group.members:
            matrices[module] = replace(matrices[module], scheme=scheme)
    return replace(plan, matrices=matrices)
