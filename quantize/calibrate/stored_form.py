"""Tensors that a checkpoint stores in another form than the model's: experts one by one, other names.

transformers describes for each architecture how stored tensors become the model's parameters. These descriptions
assemble a decoder layer. This module contains no code for a single architecture.
Source: transformers 5.17, conversion_mapping.py (`get_model_conversion_mapping`) and core_model_loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Joined:
    """A parameter that is made of stored tensors.

    Attributes:
        parts: names in the checkpoint, by the pattern that they match, in the order in which they are joined.
        converter: transformers' description, None for a tensor that only has another name.
    """

    parts: Mapping[str, tuple[str, ...]]
    converter: Any

    @property
    def stored(self) -> list[str]:
        """Names in the checkpoint."""
        return [name for names in self.parts.values() for name in names]

    def make(self, tensors: Mapping[str, Tensor], parameter: str, model: Any) -> Tensor | None:
        """The parameter's value, None where the description has none of its name.

        Args:
            tensors: by their names in the checkpoint, on any one device.
            parameter: its name in the model.
        """
        if self.converter is None:
            return tensors[self.stored[0]]
        made: dict[str, Any] = {
            pattern: [tensors[name] for name in names] for pattern, names in self.parts.items()
        }  # fmt: skip
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=parameter,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        # Several parameters may be made of the same tensors.
        value = next((value for pattern, value in made.items() if pattern in parameter), None)
        return value[0] if isinstance(value, list) else value


def joined_parameters(model: Any, names: Iterable[str]) -> dict[str, Joined]:
    """The parameters of a model that are made of a checkpoint's tensors, by their names in the model.

    Args:
        model: a PreTrainedModel, usually on the meta device.
        names: names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    owners = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    parts: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=_natural):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        parts.setdefault(parameter, {}).setdefault(pattern or "", []).append(name)
    found = {}
    for parameter, by_pattern in parts.items():
        converter = owners.get(next(iter(by_pattern)))
        order = list(by_pattern) if converter is None else converter.source_patterns
        made = Joined({at: tuple(by_pattern[at]) for at in order if at in by_pattern}, converter)
        for name in [parameter] if converter is None else _targets(parameter, converter.target_patterns):
            found[name] = made
    return found


def _targets(parameter: str, patterns: Sequence[str]) -> list[str]:
    """All parameters that a conversion makes, of which `parameter` has the first pattern in its name."""
    return [parameter, *(parameter.replace(patterns[0], other, 1) for other in patterns[1:])]


def joined_shape(joined: Joined, shapes: Mapping[str, tuple[int, ...]], parameter: str, model: Any) -> list[int] | None:
    """The shape of a parameter, from the shapes of its parts, None where they do not fit."""
    try:
        tensors = {name: torch.empty(shapes[name], device="meta") for name in joined.stored}
        made = joined.make(tensors, parameter, model)
    except (RuntimeError, ValueError, KeyError, IndexError):  # parts that do not fit each other
        return None
    return None if made is None else list(made.shape)


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]
