"""Serving a model unquantized and under each recipe: the memory, the GPUs that fit, and the ceiling of decoding there.

    memory = weights + users * KV cache at that context + overhead

The bytes of a recipe come from its plan, so a new recipe or scheme requires nothing here. `ceiling` has the formula of
the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checkpoint.config_values import config_int
from ..checkpoint.source import Checkpoint
from ..errors import InputError, NvquantError
from ..format.layouts import Layout
from ..recipe.roles import text_config
from ..recipe.schema import Recipe
from ..weights.decoding import decoded_form, stored_bytes
from .ceiling import Ceiling, Stored, held_bytes, tower_bytes
from .ceiling import read_bytes as bytes_of_a_token
from .forecast import BF16_BYTES, FP8_BYTES, SERVING_OVERHEAD_BYTES, VLLM_SHARE
from .gpus import GPUS
from .plan import Plan, compute_plan
from .quantized_source import as_computed

KV_CACHES = {"bf16": BF16_BYTES, "fp8": FP8_BYTES}


@dataclass(frozen=True)
class Load:
    """The load of a server.

    Attributes:
        context: tokens of each user in the KV cache.
        users: at the same time.
        kv_cache: a name of `KV_CACHES`.
    """

    context: int
    users: int = 1
    kv_cache: str = "bf16"


@dataclass(frozen=True)
class OnGpu:
    """Serving on one GPU.

    Attributes:
        fits: whether its memory suffices.
        fits_by_default: whether the share of it suffices that vLLM takes by default.
        tokens_per_second, tokens_per_second_alone: the ceiling for all users together, and for one user without
            others. None where the memory does not suffice.
    """

    gpu: str
    memory_bytes: int
    fits: bool
    fits_by_default: bool
    tokens_per_second: float | None
    tokens_per_second_alone: float | None


@dataclass(frozen=True)
class Row:
    """Serving the output of a recipe, or the source.

    Attributes:
        name: of the recipe, or the dtype of the source.
        recipe: None for the source.
        weight_bytes: of the tensors in memory.
        read_bytes: of those that decoding a token reads.
        kv_bytes: of the KV cache of all users.
        total_bytes: of weights, KV cache and overhead.
    """

    name: str
    recipe: str | None
    weight_bytes: int
    read_bytes: int
    kv_bytes: int
    total_bytes: int
    gpus: tuple[OnGpu, ...]


@dataclass(frozen=True)
class Refused:
    """A recipe that does not fit the model, and the reason in one sentence."""

    recipe: str
    reason: str


@dataclass(frozen=True)
class Serving:
    """The answer for a model and a load.

    Attributes:
        rows: the source, then the recipes in the given order.
        tower_bytes: the part of each row's weights that vision and audio take.
    """

    load: Load
    rows: tuple[Row | Refused, ...]
    tower_bytes: int

    def refuses(self, recipe: str) -> bool:
        """Whether a recipe does not fit the model."""
        return any(isinstance(row, Refused) and row.recipe == recipe for row in self.rows)


def refuse_context(source: Checkpoint, context: int) -> None:
    """Refuse a context beyond the model's own limit.

    Raises:
        InputError: it is longer than max_position_embeddings in config.json.
    """
    most = config_int(text_config(source.config), "max_position_embeddings")
    if most and context > most:
        raise InputError(
            f"the model supports {most} tokens", where=f"--context {context}", hint=f"use --context {most}"
        )


def forecast_serving(
    source: Checkpoint,
    recipes: Iterable[Recipe],
    layout: Layout,
    model: str,
    load: Load,
    check: Callable[[Plan], None] = lambda plan: None,
) -> Serving:
    """Compare the source and its conversions by all recipes. It reads nothing but what `compute_plan` reads.

    Args:
        model: its name in messages.
        check: raises for a plan that the conversion would refuse.
    Raises:
        InputError: the source is quantized in a form that nvquant does not decode, or the context is longer than the
            model supports.
    """
    source = as_computed(source, model)
    refuse_context(source, load.context)
    infos = [replace(info, begin=0, end=stored_bytes(source, info.name)) for info in source.infos().values()]
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    stored_as = decoded_form(source) or max(sizes, key=lambda dtype: sizes[dtype])
    rows: list[Row | Refused] = [_row(stored_as, None, source, infos, load)]
    for recipe in recipes:
        try:
            plan = compute_plan(source, recipe, layout, model)
            check(plan)
        except NvquantError as error:
            rows.append(Refused(recipe.name, str(error)))
            continue
        entries = [entry for shard in plan.shards for entry in shard.entries]
        rows.append(_row(recipe.name, recipe.name, source, entries, load))
    return Serving(load, tuple(rows), tower_bytes(infos))


def _row(name: str, recipe: str | None, source: Checkpoint, tensors: Sequence[Stored], load: Load) -> Row:
    ceiling = Ceiling(source.config, bytes_of_a_token(source.config, tensors), KV_CACHES[load.kv_cache])
    weights, kv = held_bytes(source.config, tensors), load.users * ceiling.kv_bytes(load.context)
    total = weights + kv + SERVING_OVERHEAD_BYTES
    gpus = tuple(_on_gpu(gpu, total, ceiling, load) for gpu in GPUS)
    return Row(name, recipe, weights, ceiling.weight_bytes, kv, total, gpus)


def _on_gpu(gpu: str, total: int, ceiling: Ceiling, load: Load) -> OnGpu:
    memory, bandwidth = GPUS[gpu].memory_bytes, GPUS[gpu].bandwidth_bytes
    if total > memory:
        return OnGpu(gpu, memory, False, False, None, None)
    together, alone = (ceiling.tokens_per_second(bandwidth, load.context, users) for users in (load.users, 1))
    return OnGpu(gpu, memory, True, total <= VLLM_SHARE * memory, together, alone)


def as_json(serving: Serving) -> dict[str, Any]:
    """The object `serving` of `plan --json`. Sizes are bytes, and rates tokens a second to two decimals."""
    return {
        **asdict(serving.load),
        "overhead_bytes": SERVING_OVERHEAD_BYTES,
        "tower_bytes": serving.tower_bytes,
        "rows": [_row_json(row) for row in serving.rows],
    }


def _row_json(row: Row | Refused) -> dict[str, Any]:
    """The keys of a row, null where a refused recipe has no number and where a row was not refused."""
    if isinstance(row, Refused):
        empty = dict.fromkeys(("weight_bytes", "read_bytes", "kv_bytes", "total_bytes"))
        return {"name": row.recipe, "recipe": row.recipe, **empty, "gpus": [], "refused": row.reason}
    gpus = [
        {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(gpu).items()}
        for gpu in row.gpus
    ]
    return {**asdict(row), "gpus": gpus, "refused": None}
