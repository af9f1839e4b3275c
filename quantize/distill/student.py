"""The checkpoint as a server computes it, with block scales and norms that can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..calibrate.taps import Handle
from ..errors import InputError
from ..format.schemes import Arithmetic
from ..stream.distillation import MOST_NORM_CHANGE, MOST_SCALE_CHANGE
from ..stream.manifest import Manifest
from ..verify.numerics.served import InputRounding, ServedMatrix, ServedModel
from .norms import adds_one, one_weight_modules
from .resident import Resident
from .rounding import moved_norm, moved_scales, stored_blocks, straight_through


class Flat:
    """Numbers that are trained: the vectors of many tensors in one, so that a step is a few operations.

    Attributes:
        values, gradient: float32, one vector each.
        leaves: the views of each tensor by its name, whose gradients are views too.
        most: the largest magnitude of a value.

    Args:
        shapes: of each tensor.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], most: float, device: torch.device) -> None:
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self.most = most
        self.values = torch.zeros(sum(sizes.values()), device=device)
        self.gradient = torch.zeros_like(self.values)
        self.leaves: dict[str, Tensor] = {}
        begin = 0
        for name, size in sizes.items():
            part = slice(begin, begin + size)
            leaf = self.values[part].view(shapes[name]).requires_grad_()
            leaf.grad = self.gradient[part].view(shapes[name])
            self.leaves[name], begin = leaf, begin + size


@dataclass(frozen=True)
class Norm:
    """A norm that is trained.

    Attributes:
        module: of the model.
        weight: as stored, on the device.
        adds_one: whether its factor is 1 + weight.
    """

    module: nn.Module
    weight: Tensor
    adds_one: bool


class Student:
    """The checkpoint's model. Before the training it computes exactly what the checkpoint stores.

    Matrices in NVFP4 inside the decoder layers and norms of the text decoder are trained. FP8, a quantized head, norms
    of an attention whose keys and values are quantized, and a norm whose bound is recorded stay.

    Attributes:
        theta: by module. See `rounding.moved_scales`.
        change: by norm, as the checkpoint calls it. See `rounding.moved_norm`.

    Args:
        served: a sound checkpoint with a manifest.
        ids: int64, every token id that will be embedded.
    Raises:
        InputError: a quantized matrix is not a linear of the model. See also `Resident`.
    """

    def __init__(self, served: ServedModel, ids: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        _move_scalars(served, device)
        self.served = served
        self.arithmetic: Arithmetic = served.arithmetics[0]
        self.resident = _ServedResident(served, served.subject.checkpoint, served.prefix, ids, device, dtype)
        self._hooks = ExitStack()
        matrices = {
            module: found
            for module, found in served.matrices.items()
            if found.scheme.has_block_scales and module != served.subject.head
        }
        self._scales = {module: self._part(found, "scales") for module, found in matrices.items()}
        self.theta = Flat({name: tuple(one.shape) for name, one in self._scales.items()}, MOST_SCALE_CHANGE, device)
        self._norms = dict(self._find_norms())
        shapes = {name: tuple(norm.weight.shape) for name, norm in self._norms.items()}
        self.change = Flat(shapes, MOST_NORM_CHANGE, device)
        for module, found in matrices.items():
            self._train(module, found)
        self._round_inputs()
        for layer in self.resident.skeleton.layers:
            _recompute(layer)

    def _part(self, found: ServedMatrix, part: str) -> Tensor:
        read = self.served.subject.checkpoint.read(found.matrix.parts[part].name)  # type: ignore[index]
        return read.view(torch.uint8).to(self.resident.device)

    def _linear(self, module: str) -> nn.Linear:
        layer, _, inside = module.removeprefix(f"{self.served.prefix}.").partition(".")
        found: Any = self.resident.skeleton.layers[int(layer)]
        try:
            found = found.get_submodule(inside)
        except AttributeError:
            found = None
        if type(found) is not nn.Linear:
            raise InputError(
                f"{module} is not a linear of its own in the model's class",
                where=self.served.where,
                hint="drop --distill, which does not support this model",
            )
        return found

    def _train(self, module: str, found: ServedMatrix) -> None:
        """Let a linear compute with its stored codes and the moved block scales."""
        linear, theta, scales = self._linear(module), self.theta.leaves[module], self._scales[module]
        packed = self._part(found, "codes")
        divisor = found.scalars["weight_global"].to(packed.device)
        dtype = self.resident.dtype

        def forward(inputs: Tensor) -> Tensor:
            weight = stored_blocks(theta, packed, scales, divisor, dtype)
            return nn.functional.linear(inputs, weight, linear.bias)

        linear.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=dtype, device="meta"), requires_grad=False)
        linear.__dict__["forward"] = forward

    def _find_norms(self) -> Iterator[tuple[str, Norm]]:
        """The norms that can be trained, by the names of their weights."""
        skeleton, subject = self.resident.skeleton, self.served.subject
        manifest = subject.manifest
        assert isinstance(manifest, Manifest)
        is_bound = any(group.record.input_bound is not None for group in manifest.groups.values())
        for inside, module in one_weight_modules(skeleton.decoder):
            name = skeleton.stored_name(f"{skeleton.root}{inside}.weight")
            weight: Any = module.weight
            if name not in subject.roles or subject.infos[name].shape != tuple(weight.shape):
                continue
            in_layer = name.startswith(f"{self.served.prefix}.")
            if (is_bound and not in_layer) or any(name.startswith(f"{one}.") for one in manifest.attention):
                continue
            adds = adds_one(module, len(weight))
            if adds is not None:
                yield name, Norm(module, subject.checkpoint.read(name).to(self.resident.device), adds)

    def _round_inputs(self) -> None:
        """Round the inputs of quantized matrices as the server does, from now on."""
        rounding = InputRounding(self.served)
        for layer, module in enumerate(self.resident.skeleton.layers):
            handle = _straight(rounding.handle(layer, is_counted=False))
            self._hooks.enter_context(rounding.tap(layer, self.arithmetic).on(module, handle))

    def close(self) -> None:
        """Free the memory of the layers."""
        self._hooks.close()
        for norm in self._norms.values():
            norm.module.__dict__.pop("weight", None)
            norm.module.register_parameter("weight", nn.Parameter(norm.weight, requires_grad=False))
        self.resident.close()

    @property
    def trained(self) -> tuple[Flat, Flat]:
        """The trained numbers."""
        return self.theta, self.change

    def hidden(self, batch: Tensor) -> Tensor:
        """See `Resident.hidden`. The gradients of θ and r pass where they are enabled."""
        for name, norm in self._norms.items():
            weight = moved_norm(norm.weight, self.change.leaves[name], norm.adds_one)
            norm.module._parameters.pop("weight", None)
            norm.module.__dict__["weight"] = weight.to(self.resident.dtype)
        with set_checkpoint_early_stop(False):  # the tap waits for every linear of a site
            return self.resident.hidden(batch)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """See `Resident.logits`."""

        def rounded(values: Tensor) -> Tensor:
            return self.served.head_inputs(values, self.arithmetic)

        return self.resident.logits(straight_through(hidden, rounded), rows)

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Compute with the tensors of the checkpoint while the block runs."""
        kept = [flat.values.clone() for flat in self.trained]
        try:
            for flat in self.trained:
                flat.values.zero_()
            yield
        finally:
            for flat, values in zip(self.trained, kept, strict=True):
                flat.values.copy_(values)

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """The trained tensors as they are to be stored, on the CPU, by the names of the checkpoint. Those that did not
        change are not among them."""
        found: dict[str, Tensor] = {}
        for module, scales in self._scales.items():
            after = moved_scales(scales, self.theta.leaves[module])
            if not torch.equal(after, scales):
                stored = self.served.matrices[module].matrix.parts["scales"].name
                found[stored] = after.view(torch.float8_e4m3fn).cpu()
        for name, norm in self._norms.items():
            after = moved_norm(norm.weight, self.change.leaves[name], norm.adds_one).to(norm.weight.dtype)
            if not torch.equal(after, norm.weight):
                found[name] = after.cpu()
        return found

    def norm_adds_one(self, name: str) -> bool:
        """Whether the factor of a trained norm is 1 + weight."""
        return self._norms[name].adds_one


class _ServedResident(Resident):
    """A checkpoint, perhaps with a quantized head."""

    def __init__(self, served: ServedModel, *args: Any) -> None:
        self._served = served
        super().__init__(served, *args)

    def read_head(self) -> Tensor:
        """See `Resident.read_head`."""
        if self._served.head is None:
            return super().read_head()
        return self._served.head_rows(range(self.head.rows), self._served.arithmetics[0])


def _move_scalars(served: ServedModel, device: torch.device) -> None:
    """Move the scalars of a model to the device once, not at each rounding. Members of a group keep sharing them."""
    moved: dict[int, Tensor] = {}
    for module, one in served.matrices.items():
        scalars = {part: moved.setdefault(id(value), value.to(device)) for part, value in one.scalars.items()}
        served.matrices[module] = replace(one, scalars=scalars)


def _straight(rounds: Handle) -> Handle:
    """A handle with the gradient of the tensors that it rounds."""

    def handle(site: str, inputs: Tensor) -> Tensor:
        def rounded(values: Tensor) -> Tensor:
            found = rounds(site, values)
            return values if found is None else found

        return straight_through(inputs, rounded)

    return handle


def _recompute(layer: nn.Module) -> None:
    """Let a layer keep its input alone, and compute again for the gradient."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.__dict__["forward"] = forward
