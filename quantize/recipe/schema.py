"""The schema of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ..checkpoint.json_text import quoted
from .patterns import PatternError, compiled

SchemeName = Literal["nvfp4", "nvfp4-a16", "fp8"]
SELECTORS = ("mlp", "attention", "linear")
FoldName = Literal["auto", "off"]
HeadName = Literal["bf16", "fp8", "nvfp4"]
QuantizerName = Literal["rtn", "mse", "gptq"]
ON_QUANTIZED_PATH: frozenset[str] = frozenset({"gptq"})
"""The quantizers that see inputs of the quantized path, whatever the scheme."""
DEFAULT_SAMPLES = 128
_HEAD_SCHEMES: Mapping[str, SchemeName] = {"fp8": "fp8", "nvfp4": "nvfp4-a16"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizeEntry(_Strict):
    """Some matrices and their scheme.

    Attributes:
        modules: `mlp`, `attention` or `linear` (the text decoder's, by role; `linear` is linear attention, Mamba and
            every other linear), a module's exact name, or `re:` and a regular expression that is matched from the start
            of the module's name.
        scheme: `nvfp4` (W4A4), `nvfp4-a16` (weight-only) or `fp8` (W8A8).
    """

    modules: tuple[str, ...] = Field(min_length=1)
    scheme: SchemeName

    @field_validator("modules", mode="before")
    @classmethod
    def _roles_in_any_case(cls, modules: object) -> object:
        """`MLP`, `Attention` and `Linear` name the roles too, because no module has such a name."""
        if not isinstance(modules, (list, tuple)):
            return modules
        return [name.lower() if isinstance(name, str) and name.lower() in SELECTORS else name for name in modules]

    @field_validator("modules")
    @classmethod
    def _patterns_compile(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for module in modules:
            try:
                compiled(module.removeprefix("re:"))
            except PatternError as error:
                raise ValueError(f"{quoted(module)} is not a regular expression ({error.reason})") from error
        return modules


class Activations(_Strict):
    """The rule that turns the observed amaxes into input global scales.

    Attributes:
        headroom: `auto` (the largest power of two that keeps the first percentile of block amaxes in E4M3's normal
            range, at least 4), or another power of two.
    """

    headroom: Literal["auto"] | float = "auto"

    @field_validator("headroom", mode="before")
    @classmethod
    def _power_of_two(cls, headroom: object) -> object:
        if headroom == "auto":
            return headroom
        if isinstance(headroom, (int, float)) and not isinstance(headroom, bool):
            if 1 <= headroom < 2**64 and math.frexp(headroom)[0] == 0.5:
                return headroom
        raise ValueError("must be 'auto' or a power of two, at least 1")


class KvCache(_Strict):
    """The served model's KV cache.

    Attributes:
        dtype: `bf16`, `fp8` with unit scales, or `fp8-calibrated` with scales from calibration.
    """

    dtype: Literal["bf16", "fp8", "fp8-calibrated"] = "bf16"

    @property
    def served(self) -> Literal["bf16", "fp8"]:
        """The dtype that servers cache."""
        return "bf16" if self.dtype == "bf16" else "fp8"

    @property
    def has_scales(self) -> bool:
        """Whether the checkpoint stores scales."""
        return self.dtype == "fp8-calibrated"


class Calibration(_Strict):
    """The calibration of the recipe. Options of the command line override it.

    Attributes:
        set: a shipped set, a Hub data set or a file.
        samples: number of samples. None for `DEFAULT_SAMPLES`, or more where the quantizer needs them
            (`plan.calibration`).
        sequence_length: tokens in each.
    """

    set: str = "offline"
    samples: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=2048, ge=2)


class Verify(_Strict):
    """The limits for the numbers of the converted model. Options of `nvquant verify` override them.

    Attributes:
        max_kl: largest mean KL divergence to the source in nats. null sets no limit.
        min_top1: least top-1 agreement with the source, a share from 0 to 1.
        max_delta_nll: largest increase of the mean negative log-likelihood in nats.
    """

    max_kl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_top1: float = Field(default=0.5, ge=0, le=1)
    max_delta_nll: float = Field(default=1.0, gt=0, allow_inf_nan=False)


def _none_is_default(value: object) -> object:
    return {} if value is None else value


class Recipe(_Strict):
    """A recipe.

    Attributes:
        name: its name for `--recipe` and in reports.
        description: one sentence for `nvquant recipes`.
        quantize: the matrices and their schemes. Entries must not overlap.
        quantizer: `mse`, `rtn` or `gptq`.
        fold: whether to make exact folds (`reshape.folds`) before quantizing. null leaves it to the quantizer.
        experts: whether to refuse a mixture of experts, or to leave its experts in BF16.
        head: the output head. `fp8` also rounds its inputs, `nvfp4` is weight-only, because reading the weights takes
            the time.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    quantize: tuple[QuantizeEntry, ...] = Field(min_length=1)
    quantizer: QuantizerName = "mse"
    fold: FoldName | None = None
    experts: Literal["refuse", "bf16"] = "refuse"
    head: HeadName = "bf16"
    activations: Annotated[Activations, BeforeValidator(_none_is_default)] = Activations()
    kv_cache: Annotated[KvCache, BeforeValidator(_none_is_default)] = KvCache()
    calibration: Annotated[Calibration, BeforeValidator(_none_is_default)] = Calibration()
    verify: Annotated[Verify, BeforeValidator(_none_is_default)] = Verify()

    @property
    def head_scheme(self) -> SchemeName | None:
        """The scheme of the output head, or None where it stays unquantized."""
        return _HEAD_SCHEMES.get(self.head)
