"""The methods that `accuracy.py` compares: their names, their tools, and what each tool gets on its command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to a checkpoint.

    Attributes:
        tool: `nvquant`, or a peer of peer.py.
        label: for tables.
        options: those of `nvquant convert`; of a peer, the one name of its method.
    """

    tool: str
    label: str
    options: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Whether it is nvquant's."""
        return self.tool == "nvquant"


RECIPE = ("--recipe", "nvfp4-full")  # W4A4 on every matrix of the decoder, as all peers do
METHODS = {
    "nvquant-rtn": Method("nvquant", "nvquant rtn", (*RECIPE, "--quantizer", "rtn")),
    "nvquant-mse": Method("nvquant", "nvquant mse", (*RECIPE, "--quantizer", "mse")),
    "nvquant-mse-fold": Method("nvquant", "nvquant mse, folds", (*RECIPE, "--quantizer", "mse", "--fold", "auto")),
    "nvquant-gptq-nofold": Method(
        "nvquant", "nvquant gptq, no folds", (*RECIPE, "--quantizer", "gptq", "--fold", "off")
    ),
    "nvquant-gptq": Method("nvquant", "nvquant gptq with folds", (*RECIPE, "--quantizer", "gptq")),
    "llmcompressor-rtn": Method("llmcompressor", "llm-compressor RTN", ("rtn",)),
    "llmcompressor-gptq": Method("llmcompressor", "llm-compressor GPTQ", ("gptq",)),
    "llmcompressor-awq": Method("llmcompressor", "llm-compressor AWQ", ("awq",)),
    "llmcompressor-smoothquant-gptq": Method(
        "llmcompressor", "llm-compressor SmoothQuant + GPTQ", ("smoothquant-gptq",)
    ),
    "modelopt-max": Method("modelopt", "modelopt max", ("max",)),
    "modelopt-mse": Method("modelopt", "modelopt mse sweep", ("mse",)),
    "modelopt-awq_lite": Method("modelopt", "modelopt awq_lite", ("awq_lite",)),
    "modelopt-gptq": Method("modelopt", "modelopt GPTQ", ("gptq",)),
    "auto-round": Method("auto-round", "auto-round", ("signround",)),
}
BASELINE = "nvquant-gptq"  # the one that all others are compared with, pair by pair


def with_more(more: list[tuple[str, str]]) -> dict[str, Method]:
    """All methods and further ones of nvquant, each a name and the options of `nvquant convert`."""
    added = {
        f"nvquant-{name}": Method("nvquant", f"nvquant {name.replace('_', ' ')}", tuple(options.split()))
        for name, options in more
    }
    return METHODS | added
