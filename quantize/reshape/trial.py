"""A batch of calibration through one layer in float32, to find and prove folds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.lanes import Lane
from ..calibrate.record import LayerCall, own_stores
from ..calibrate.skeleton import loaded_layer
from ..calibrate.taps import Tap
from ..calibrate.walk import run_layer


@dataclass(frozen=True)
class Passed:
    """The values that passed through a layer, float32.

    Attributes:
        output: of the layer.
        inputs: the inputs at the sites of the tap.
        norms: the outputs of the modules that own a one-dimensional `weight`, by its name in the checkpoint.
    """

    output: Tensor
    inputs: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


@dataclass(frozen=True)
class Linears:
    """The linears of a layer.

    Attributes:
        readers: names in the checkpoint of the weights that read the layer's input, or a norm of it or of its size.
    """

    readers: frozenset[str]


class LayerTrial:
    """The first batch of a lane in front of a layer, and that layer.

    Args:
        tensors: the layer's tensors in the source, by their names in the checkpoint, on the device.
    """

    def __init__(self, lane: Lane, layer: int, tensors: Mapping[str, Tensor]) -> None:
        self._skeleton = replace(lane.skeleton, dtype=torch.float32)
        self._layer, self._tensors = layer, tensors
        self._module = copy.deepcopy(lane.skeleton.layers[layer])
        self._call = own_stores([lane.call(0, layer)])[0]
        self.hidden = lane.hidden.fetch(0).float()

    def head_sizes(self, prefix: str) -> dict[str, int]:
        """The size of a head of the attention modules that tell it, by their names.

        Args:
            prefix: precedes the names of the layer's modules, with a final dot.
        """
        sizes = {f"{prefix}{name}": getattr(part, "head_dim", None) for name, part in self._module.named_modules()}
        return {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}

    @torch.no_grad()
    def run(
        self, changed: Mapping[str, Tensor] | None = None, tap: Tap | None = None, hidden: Tensor | None = None
    ) -> Passed:
        """Send the batch through the layer. The lane stays as it is.

        Args:
            changed: replaces tensors of the source, on the device.
            tap: gives the inputs. Without it, `inputs` and `norms` stay empty.
            hidden: replaces the batch's hidden state.
        """
        inputs: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        call = _in_float32(own_stores([self._call])[0])
        tensors = {**self._tensors, **(changed or {})}
        with loaded_layer(self._skeleton, self._layer, tensors, self._module) as module, ExitStack() as opened:
            if tap is not None:
                opened.enter_context(tap.on(module, lambda site, tensor: _note(inputs, site, tensor)))
                for hook in self._watch_norms(module, norms):
                    opened.callback(hook.remove)
            output = run_layer(module, self.hidden if hidden is None else hidden, call)
        return Passed(output, inputs, norms)

    def error(self, reference: Tensor, changed: Mapping[str, Tensor]) -> float:
        """The largest difference of the layer's output, relative to the largest change that the layer makes to its
        input. Infinity where it is no number.

        Args:
            reference: the output with the tensors of the source.
            changed: see `run`.
        """
        return self.relative(reference, self.run(changed).output)

    def relative(self, reference: Tensor, output: Tensor) -> float:
        """See `error`."""
        change = float((reference - self.hidden).abs().amax())
        difference = float((output - reference).abs().amax())
        return difference / change if change > 0 and difference == difference else float("inf")

    @torch.no_grad()
    def linears(self, size: int) -> Linears:
        """The linears that read the residual stream.

        Args:
            size: its channels.
        """
        names = self._skeleton.layer_tensors(self._layer)
        streams, readers = [self.hidden], set[str]()

        def norm(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[-1:] == (size,):
                streams.append(output)

        def linear(name: str) -> Callable[..., None]:
            def see(_module: nn.Module, args: Any) -> None:
                if any(is_same(args[0], stream) for stream in streams):
                    readers.add(name)

            return see

        with loaded_layer(self._skeleton, self._layer, self._tensors, self._module) as module, ExitStack() as opened:
            for name, part in module.named_modules():
                weight = getattr(part, "weight", None)
                if not isinstance(weight, Tensor) or f"{name}.weight" not in names:
                    continue
                if weight.ndim == 1:
                    opened.callback(part.register_forward_hook(norm).remove)
                elif weight.ndim == 2:
                    stored = names[f"{name}.weight"]
                    opened.callback(part.register_forward_pre_hook(linear(stored)).remove)
            run_layer(module, self.hidden, _in_float32(own_stores([self._call])[0]))
        return Linears(frozenset(readers))

    def _watch_norms(self, module: nn.Module, norms: dict[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
        names = self._skeleton.layer_tensors(self._layer)
        hooks = []
        for name, part in module.named_modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1 and f"{name}.weight" in names:
                hooks.append(part.register_forward_hook(_keep(norms, names[f"{name}.weight"])))
        return hooks


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same memory. All tensors of a run are alive, so no memory is used twice."""
    return one is other or (one.data_ptr(), one.numel(), one.shape[-1]) == (
        other.data_ptr(),
        other.numel(),
        other.shape[-1],
    )


def _note(inputs: dict[str, Tensor], site: str, tensor: Tensor) -> None:
    inputs.setdefault(site, tensor)


def _keep(norms: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook that keeps the output of a module that runs once. Of one that runs again, no output is kept."""
    seen: list[str] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        norms.pop(name, None)
        if isinstance(output, Tensor) and not seen:
            norms[name] = output
        seen.append(name)

    return keep


def _in_float32(call: LayerCall) -> LayerCall:
    """A call with every float tensor in it widened, also those in stores of shared keys and values."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            return type(value)(map(widen, value))
        if isinstance(value, MutableMapping):
            store = copy.copy(value)
            store.update({key: widen(item) for key, item in value.items()})
            return store
        return value

    return LayerCall(tuple(map(widen, call.args)), {key: widen(value) for key, value in call.kwargs.items()})
