"""Bounds on the keys and values that an FP8 KV cache stores, proved from the norms in front of them.

Where keys are RMS-normed, each head's vector has at most the length sqrt(width) * max |weight|. Rotary positions turn
the vector and keep its length, so no element exceeds it. The same holds for normed values, which are not turned.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..recipe.kv_cache import HALVES, Half
from ..recipe.roles import text_config
from ..weights.base import Weights
from .norm_bounds import MAGNITUDES, ROOM, rms_norm_bound, rounded_up
from .record import LayerCall, record_batches
from .skeleton import Skeleton, build_skeleton, load_outer
from .taps import KeyValueTap
from .walk import EndOfForward, run_layer

TOKENS = 5  # of the probe
TOLERANCE = 1e-4  # of a vector's length, relative


@dataclass(frozen=True)
class KeyValueBounds:
    """The largest magnitudes of an attention module's keys and values, whatever the text. None where nothing proves
    one."""

    k: float | None
    v: float | None


def key_value_bounds(source: Weights, prefix: str) -> dict[int, dict[str, KeyValueBounds]]:
    """The bounds of every attention module, by decoder layer and by the module's name in the checkpoint.

    Each layer's own forward runs up to its attention function. Its linears give random vectors of very different
    lengths instead of products, so no weight but those of norms is read. Keys or values are bounded if their lengths
    are those of one RMSNorm's output, or if they are those of an earlier layer that shares them.

    Args:
        prefix: before a layer's number in the checkpoint's names.
    Returns:
        Layers whose forward does not reach an attention function of transformers have no modules. So have models that
        cache a latent vector instead of keys and values.
    Raises:
        EnvironmentLack, InputError: see `build_skeleton` and `record_batches`.
    """
    skeleton = build_skeleton(source, prefix, torch.device("cpu"), torch.float32)
    found: dict[int, dict[str, KeyValueBounds]] = {number: {} for number in range(len(skeleton.layers))}
    if text_config(source.config).get("kv_lora_rank"):
        return found
    ids = torch.arange(TOKENS).unsqueeze(0)
    load_outer(skeleton, ids)
    recorded = next(record_batches(skeleton, [ids]))
    earlier: list[_Seen] = []
    for number, call in enumerate(recorded.calls):
        prober = _Probe(skeleton, number)
        for seen in prober.run(recorded.hidden, call):
            bounds = {half: prober.bound(seen.parts[half], _shared(half, seen, earlier)) for half in HALVES}
            seen.bounds.update(bounds)
            found[number][seen.module] = KeyValueBounds(**bounds)
            earlier.append(seen)
    return found


@dataclass(frozen=True, eq=False)
class _Seen:
    """The keys and values of an attention module, and their bounds once they are known.

    Attributes:
        parts: [1, heads, tokens, head size] each.
    """

    module: str
    parts: dict[Half, Tensor]
    bounds: dict[Half, float | None]


def _shared(half: Half, seen: _Seen, earlier: list[_Seen]) -> float | None:
    """The bound of the same keys or values in an earlier layer."""
    part = seen.parts[half]
    return next((other.bounds[half] for other in earlier if torch.equal(other.parts[half], part)), None)


class _Random(nn.Module):
    """Stands in the place of a linear: random vectors for each token, as long as no real product is."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.out_features, self._generator = linear.out_features, generator
        self.weight = torch.zeros(())  # some models ask for its dtype or device

    def forward(self, given: Tensor) -> Tensor:
        tokens = given.shape[:-1]
        lengths = 10 ** (
            MAGNITUDES[0] + (MAGNITUDES[1] - MAGNITUDES[0]) * torch.rand((*tokens, 1), generator=self._generator)
        )
        return torch.randn((*tokens, self.out_features), generator=self._generator) * lengths


class _Attended(EndOfForward):
    """Signals that keys and values have passed."""


class _Probe:
    """One layer without its products."""

    def __init__(self, skeleton: Skeleton, number: int) -> None:
        self._prefix = f"{skeleton.layer_prefix}.{number}."
        self._layer = copy.deepcopy(skeleton.layers[number])
        generator = torch.Generator().manual_seed(number)
        for name, part in list(self._layer.named_modules()):
            if isinstance(part, nn.Linear):
                self._layer.set_submodule(name, _Random(part, generator))
        _fill_vectors(self._layer, skeleton, number)
        self._outputs: list[tuple[nn.Module, Tensor]] = []

    @torch.no_grad()
    def run(self, hidden: Tensor, call: LayerCall) -> list[_Seen]:
        """The keys and values of each attention module, in the order of the forward."""
        seen: dict[str, _Seen] = {}

        def take(site: str, tensor: Tensor) -> None:
            module, _, half = site.rpartition(".")
            seen.setdefault(module, _Seen(module, {}, {})).parts["k" if half == "k" else "v"] = tensor.clone()

        def end(site: str) -> None:
            if site.endswith(".v"):
                raise _Attended

        handles = [
            part.register_forward_hook(self._note) for part in self._layer.modules() if not list(part.children())
        ]
        try:
            with KeyValueTap(self._prefix).on(self._layer, take, end):
                run_layer(self._layer, hidden, call)
        except _Attended:
            pass
        except Exception:  # a layer with other weights than linears and vectors raises what it likes
            return []
        finally:
            for handle in handles:
                handle.remove()
        return [one for one in seen.values() if all(one.parts[half].ndim == 4 for half in one.parts)]

    def _note(self, module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and not isinstance(module, _Random):
            self._outputs.append((module, output.clone()))

    def bound(self, part: Tensor, shared: float | None) -> float | None:
        """The bound of keys or values.

        Args:
            shared: that of the layer that they come from, if they do.
        """
        if shared is not None:
            return shared
        for module, output in self._outputs:
            factor = _factor(part, output)
            bound = None if factor is None else rms_norm_bound(module, output.shape[-1])
            if factor is not None and bound is not None:
                return bound if factor == 1 and _is_same(part, output) else rounded_up(bound * factor * ROOM)
        return None


def _fill_vectors(layer: nn.Module, skeleton: Skeleton, number: int) -> None:
    """Load the layer's parameters of one dimension, those of norms above all."""
    from accelerate.utils import set_module_tensor_to_device

    kept = layer.state_dict()
    for name, stored in skeleton.layer_tensors(number).items():
        if name in kept and kept[name].ndim < 2:
            value = skeleton.source.read(stored)
            set_module_tensor_to_device(layer, name, skeleton.device, value=value, dtype=skeleton.dtype)


def _factor(part: Tensor, output: Tensor) -> float | None:
    """How much longer every vector of keys or values is than that of a module's output, or None where the ratio
    varies.

    Args:
        part: [1, heads, tokens, head size].
        output: of a norm of each head, or of all heads of a token.
    """
    for lengths in _lengths(part, output):
        ratios = lengths[0] / lengths[1]
        factor = float(ratios.mean())
        if factor > 0 and bool(((ratios - factor).abs() <= TOLERANCE * factor).all()):
            return 1.0 if abs(factor - 1) <= TOLERANCE else factor
    return None


def _lengths(part: Tensor, output: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The lengths of keys or values and of an output, in every order that their shapes allow."""
    heads, tokens, width = part.shape[1:]
    own = output.float().norm(dim=-1)
    if output.shape[-1] == width and output.ndim == 4:
        for candidate in (own, own.transpose(1, 2)):
            if candidate.shape == part.shape[:3]:
                yield part.float().norm(dim=-1), candidate
    if output.shape == (1, tokens, heads * width):
        yield part.float().transpose(1, 2).flatten(2).norm(dim=-1), own


def _is_same(part: Tensor, output: Tensor) -> bool:
    return any(
        torch.equal(part, form)
        for form in itertools.chain([output], [output.transpose(1, 2)] if output.ndim == 4 else [])
        if form.shape == part.shape
    )
