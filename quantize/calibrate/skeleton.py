"""The source model without its weights: built on the meta device from its config, filled one decoder layer at a time.

A tensor's name in the checkpoint and in the model's state dict may differ: see `model_names`.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..recipe.decoder import layer_index
from ..weights.base import Weights
from .model_class import on_meta
from .model_names import find_decoder, find_layers, modules_inside, tied_origin
from .stored_form import Joined, joined_parameters, joined_shape
from .taps import STORED_MODULES

log = logging.getLogger("nvquant.calibrate")

_POSITIONS = re.compile(r"(^|\.)wpe$|position|(^|_)pos_")  # tables that are small, and not asked for token ids


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        full: the model with its head.
        model: the base model, without a head, which the recording pass calls.
        decoder: the text decoder.
        layers: its decoder layers.
        root: the prefix of the decoder's own names in the checkpoint, with a final dot, or empty.
        layer_prefix: the prefix of a layer's number in the checkpoint.
        layers_path, decoder_path: names of the layers' list and of the decoder in the complete model.
        origins: where the checkpoint stores a parameter, by its name in the model, as transformers describes it.
        joined: parameters that the checkpoint stores in another form, by the name that they would have there.
        renamed: names in the checkpoint, where they differ from the model's by more than a prefix, likewise.
        loaded_ids: one of the token ids whose embeddings are loaded, once `load_outer` has been called.
    """

    source: Weights
    full: nn.Module
    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    root: str
    layer_prefix: str
    device: torch.device
    dtype: torch.dtype
    layers_path: str = "layers"
    decoder_path: str = ""
    origins: Mapping[str, Joined] = field(default_factory=dict, repr=False)
    joined: dict[str, Joined] = field(default_factory=dict, repr=False)
    renamed: dict[str, str] = field(default_factory=dict, repr=False)
    loaded_ids: list[int] = field(default_factory=list, repr=False)
    _lookups: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list, repr=False)

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Names inside a layer to names in the checkpoint, for every parameter and buffer that it stores unchanged."""
        names = {name: f"{self.layer_prefix}.{layer}.{name}" for name in self.layers[layer].state_dict()}
        return {name: self.stored_name(usual) for name, usual in names.items() if usual not in self.joined}

    def layer_joined(self, layer: int) -> dict[str, Joined]:
        """The other parameters of a layer, by name inside it."""
        begin = f"{self.layer_prefix}.{layer}."
        return {name.removeprefix(begin): one for name, one in self.joined.items() if name.startswith(begin)}

    def stored_name(self, usual: str) -> str:
        """The name in the checkpoint of a tensor that has, but for what precedes the decoder, this name in the
        model."""
        return self.renamed.get(usual, usual)

    def claimed(self) -> frozenset[str]:
        """Names in the checkpoint of all tensors that the model reads."""
        state = set(self.full.state_dict())
        decoder = {name for name in _parameters(self) if name not in self.joined}
        joined = [name for one in self.joined.values() for name in one.stored]
        read = [name for parameter, origin in self.origins.items() if parameter in state for name in origin.stored]
        return frozenset({*map(self.stored_name, decoder), *joined, *read})

    @property
    def layers_inside(self) -> str:
        """The path of the layers' list in the decoder."""
        return self.layers_path.removeprefix(f"{self.decoder_path}.") if self.decoder_path else self.layers_path


def build_skeleton(source: Weights, prefix: str, device: torch.device, dtype: torch.dtype) -> Skeleton:
    """Build the model of a checkpoint on the meta device and check that the checkpoint has all that its decoder needs.

    Args:
        prefix: the prefix of a layer's number in the checkpoint's names (`recipe.decoder.decoder_prefix`).
        dtype: of the model's computation. Rotary tables stay float32.
    Raises:
        EnvironmentLack: the installed transformers does not know the architecture, or cannot build it from the config.
        InputError: the walk does not support the model's code or names.
    """
    skeleton = _assemble(source, prefix, device, dtype)
    _check_tensors(skeleton)
    return skeleton


def _assemble(source: Weights, prefix: str, device: torch.device, dtype: torch.dtype) -> Skeleton:
    full = on_meta(source, dtype)
    full.eval().requires_grad_(False)
    origins = joined_parameters(full, source.infos())
    path = find_layers(full, origins, prefix)
    if path is None:
        raise InputError(
            f"{type(full).__name__} has no list of decoder layers that {prefix}.N of the checkpoint would fill",
            where=source.where,
            hint="use a weight-only recipe",
        )
    decoder_path = find_decoder(full, path)
    decoder = full.get_submodule(decoder_path)
    inside = path.removeprefix(f"{decoder_path}.") if decoder_path else path
    root = prefix.removesuffix(inside) if f".{prefix}".endswith(f".{inside}") else ""
    # Some classes name a base model that they do not have; their base model is then the whole.
    model = decoder if full.base_model is full else full.base_model
    layers = full.get_submodule(path)
    skeleton = Skeleton(source, full, model, decoder, layers, root, prefix, device, dtype, path, decoder_path, origins)
    _find_origins(skeleton)
    return skeleton


def wanted_shapes(source: Weights, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model's decoder has, by its name in the checkpoint. Arguments and errors are
    those of `build_skeleton`, which refuses a checkpoint that lacks one. A tensor that is made of others is not among
    them."""
    skeleton = _assemble(source, prefix, torch.device("cpu"), torch.float32)
    return {
        skeleton.stored_name(name): shape for name, shape in _wanted(skeleton).items() if name not in skeleton.joined
    }


def load_outer(skeleton: Skeleton, token_ids: Tensor) -> None:
    """Fill the tensors around the decoder's layers: small ones completely, embeddings only with the rows for
    `token_ids`. It may be called again, for other ids.

    Args:
        token_ids: int64, any shape, with every id that calibration will embed.
    Raises:
        InputError: an id beyond the embedding's rows.
    """
    # Exactly this class: learned positions are a subclass of nn.Embedding in some models, and not asked for token ids.
    decoder: Any = skeleton.decoder
    for lookup in skeleton._lookups:
        lookup.remove()
    skeleton._lookups.clear()
    skeleton.loaded_ids[:] = [int(token_ids.min())]
    by_token: type[nn.Embedding] = type(decoder.get_input_embeddings())
    if not issubclass(by_token, nn.Embedding):
        raise InputError(
            f"{type(decoder).__name__} looks tokens up in {by_token.__name__}, which the layer-by-layer walk does not "
            "support",
            where=skeleton.source.where,
            hint="use a weight-only recipe",
        )
    modules = dict(_outer_modules(skeleton))
    main, largest = decoder.get_input_embeddings(), int(token_ids.max())
    embeddings = {
        name: module
        for name, module in modules.items()
        if isinstance(module, by_token)
        and type(module) is by_token
        and not _POSITIONS.search(name)
        # A table with fewer rows is looked up by other numbers, such as segments.
        and (module is main or len(module.weight) > largest)
    }
    for name, embedding in embeddings.items():
        _load_embedding_rows(skeleton, skeleton.stored_name(f"{skeleton.root}{name}.weight"), embedding, token_ids)
    for name in _outer_state(skeleton):
        if name.rpartition(".")[0] not in embeddings:
            _set(skeleton, skeleton.decoder, name, _read(skeleton, name))
    for module in modules.values():
        _move_tables(module, skeleton.device)


def _read(skeleton: Skeleton, name: str) -> Tensor:
    """A tensor of the decoder outside of its layers, by its name in the decoder."""
    usual = skeleton.root + name
    joined = skeleton.joined.get(usual)
    if joined is None:
        return skeleton.source.read(skeleton.stored_name(usual))
    parameter = f"{skeleton.decoder_path}.{name}" if skeleton.decoder_path else name
    value = joined.make({part: skeleton.source.read(part) for part in joined.stored}, parameter, skeleton.full)
    assert value is not None  # as with the shapes, when the skeleton was built
    return value


@contextlib.contextmanager
def loaded_layer(
    skeleton: Skeleton, layer: int, tensors: Mapping[str, Tensor], module: nn.Module | None = None
) -> Iterator[nn.Module]:
    """A decoder layer with its weights, which are removed afterwards.

    Args:
        tensors: the layer's tensors by their names in the checkpoint, on the device, in their stored dtype.
        module: a copy of the layer that gets the weights. None for the model's own module.
    """
    from accelerate.utils import set_module_tensor_to_device

    module = skeleton.layers[layer] if module is None else module
    names, joined = skeleton.layer_tensors(layer), skeleton.layer_joined(layer)
    try:
        for name, stored in names.items():
            _set(skeleton, module, name, tensors[stored])
        for name, parts in joined.items():
            value = parts.make(tensors, f"{skeleton.layers_path}.{layer}.{name}", skeleton.full)
            assert value is not None  # as with the shapes, when the skeleton was built
            _set(skeleton, module, name, value)
        for part in module.modules():
            _move_tables(part, skeleton.device)
        yield module
    finally:
        for name in (*names, *joined):
            set_module_tensor_to_device(module, name, "meta")


def _set(skeleton: Skeleton, module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or a stored buffer its value, in the skeleton's dtype and on its device."""
    from accelerate.utils import set_module_tensor_to_device

    # Without clear_cache=False, accelerate hands the allocator's free GPU memory back after every tensor.
    set_module_tensor_to_device(module, name, skeleton.device, value=value, dtype=skeleton.dtype, clear_cache=False)


def _move_tables(module: nn.Module, device: torch.device) -> None:
    """Move a module's own buffers that no checkpoint stores, such as rotary tables: float32, whatever the model's
    dtype."""
    for key, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[key] = buffer.to(device)


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let models report this device: they use that of their first weight, which may have no value."""
    import transformers

    model_class: Any = transformers.PreTrainedModel
    own = vars(model_class).get("device")
    model_class.device = property(lambda _model: device)
    try:
        yield
    finally:
        if own is None:
            del model_class.device
        else:
            model_class.device = own


def _outer_modules(skeleton: Skeleton) -> Iterator[tuple[str, nn.Module]]:
    for name, module in skeleton.decoder.named_modules():
        if _is_outer(skeleton, name):
            yield name, module


def _outer_state(skeleton: Skeleton) -> list[str]:
    return [name for name in skeleton.decoder.state_dict() if _is_outer(skeleton, name)]


def _is_outer(skeleton: Skeleton, name: str) -> bool:
    return not f"{name}.".startswith(f"{skeleton.layers_inside}.")


def _wanted(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    state = skeleton.decoder.state_dict()
    outer = {skeleton.root + name: state[name] for name in _outer_state(skeleton)}
    for number, layer in enumerate(skeleton.layers):
        outer |= {f"{skeleton.layer_prefix}.{number}.{name}": value for name, value in layer.state_dict().items()}
    return {name: tuple(value.shape) for name, value in outer.items()}


def _check_tensors(skeleton: Skeleton) -> None:
    source = skeleton.source
    infos = source.infos()
    wanted = {name: shape for name, shape in _wanted(skeleton).items() if name not in skeleton.joined}
    missing = [name for name in wanted if skeleton.stored_name(name) not in infos]
    for name in wanted:
        layer, owner = (layer_index(one, skeleton.layer_prefix) for one in (name, skeleton.stored_name(name)))
        if layer is not None and layer != owner and name not in missing:
            raise InputError(
                f"layer {layer} shares {skeleton.stored_name(name)} with another layer, which the layer-by-layer walk "
                "does not support",
                where=source.where,
                hint="use a weight-only recipe",
            )
    if missing:
        raise InputError(
            f"{source.where} lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors that "
            f"{type(skeleton.decoder).__name__} needs)",
            where=source.where,
            hint="download the checkpoint again, or use a weight-only recipe if it is complete",
        )
    for name, shape in wanted.items():
        stored = infos[skeleton.stored_name(name)]
        if stored.shape != shape:
            raise InputError(
                f"{stored.name} has shape {list(stored.shape)}, but config.json describes {list(shape)}",
                where=source.where,
                hint="use the config and weights of one model",
            )


def _find_origins(skeleton: Skeleton) -> None:
    """Note the decoder's tensors that are stored under another name or in another form, and tell each layer which
    stored module has become which of its own."""
    shapes = {name: info.shape for name, info in skeleton.source.infos().items()}
    for usual, (parameter, shape) in _parameters(skeleton).items():
        origin = skeleton.origins.get(parameter)
        if origin is None and usual not in shapes:
            origin = tied_origin(parameter, skeleton.full, skeleton.origins, shapes)
        if origin is None or (origin.converter is None and usual in shapes):
            continue
        if origin.converter is None:
            skeleton.renamed[usual] = origin.stored[0]
        elif joined_shape(origin, shapes, parameter, skeleton.full) == list(shape):
            skeleton.joined[usual] = origin
    for number, layer in enumerate(skeleton.layers):
        path = f"{skeleton.layers_path}.{number}."
        inside = {f"{path}{name}" for name in layer.state_dict()}
        own = {name: one for name, one in skeleton.origins.items() if name in inside}
        begin = f"{skeleton.layer_prefix}.{number}."
        named = {name.removeprefix(begin): made for name, made in modules_inside(own, path).items()}
        setattr(layer, STORED_MODULES, named)


def _parameters(skeleton: Skeleton) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the complete model, and shape, of every tensor of the decoder, by its usual name in the checkpoint."""
    begin = f"{skeleton.decoder_path}." if skeleton.decoder_path else ""
    inside = skeleton.layers_inside
    found = {}
    for name, shape in _wanted(skeleton).items():
        if name.startswith(f"{skeleton.layer_prefix}."):
            found[name] = f"{begin}{inside}{name[len(skeleton.layer_prefix) :]}", shape
        else:
            found[name] = f"{begin}{name.removeprefix(skeleton.root)}", shape
    return found


def _load_embedding_rows(skeleton: Skeleton, name: str, embedding: nn.Embedding, token_ids: Tensor) -> None:
    """Load only the rows of an embedding that are needed, and let it look up ids among them."""
    rows = skeleton.source.infos()[name].shape[0]
    largest = int(token_ids.max())
    if largest >= rows:
        raise InputError(
            f"calibration contains the token id {largest}, but {name} has {rows} rows",
            hint="use the model's own tokenizer",
        )
    # On the device: sixteen threads of the CPU beside those that read and hash took 200 ms for it.
    known = torch.unique(torch.cat([token_ids.flatten(), _padding_id(skeleton, rows)]).to(skeleton.device))
    table = skeleton.source.read_rows(name, known.tolist()).to(skeleton.device, skeleton.dtype)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.padding_idx = None  # F.embedding checks it against the number of rows; it has no effect on values

    def look_up(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.searchsorted(known, args[0]).clamp_(max=len(known) - 1)
        if not torch.equal(known[rows], args[0]):
            raise InputError(
                f"{name} looks up ids that calibration does not have", where=name, hint="use a weight-only recipe"
            )
        return rows, *args[1:]

    skeleton._lookups.append(embedding.register_forward_pre_hook(look_up))


def _padding_id(skeleton: Skeleton, rows: int) -> Tensor:
    """The padding id, int64 [1], or none, int64 [0]. Multimodal models embed it in the place of a medium."""
    padding = getattr(skeleton.decoder.config, "pad_token_id", None)
    return torch.tensor([padding] if isinstance(padding, int) and 0 <= padding < rows else [], dtype=torch.int64)
