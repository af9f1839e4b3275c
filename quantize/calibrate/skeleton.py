"""The source model without its weights: built on the meta device from its config, filled one decoder layer at a time.

Names: a tensor's name in the checkpoint and in the model's state dict differ at most in what precedes the decoder
(`model.language_model.`, `model.`, nothing); inside the decoder they are equal, or transformers describes how the
stored ones become the model's (see `stored_form`). Other models are refused.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.json_text import quoted
from ..errors import EnvironmentLack, InputError
from ..weights.base import Weights
from .quiet import quiet_transformers
from .stored_form import Joined, joined_parameters, joined_shape

log = logging.getLogger("nvquant.calibrate")

ATTENTION = "sdpa"
MOST_REASON = 300  # characters of an error of transformers that a message repeats
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
        layer_prefix: the prefix of a layer's number in the checkpoint. Its last part is the decoder's name for them.
        joined: layers' parameters that the checkpoint stores in another form, by layer and name inside it.
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
    joined: dict[int, dict[str, Joined]] = field(default_factory=dict, repr=False)
    _lookups: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list, repr=False)

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Names inside a layer to names in the checkpoint, for every parameter and buffer that it stores unchanged."""
        joined = self.joined.get(layer, {})
        return {
            name: f"{self.layer_prefix}.{layer}.{name}"
            for name in self.layers[layer].state_dict()
            if name not in joined
        }


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
    decoder = full.get_decoder()
    container = prefix.rpartition(".")[2]
    layers = getattr(decoder, container, None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"{type(decoder).__name__} has no list of decoder layers",
            where=source.where,
            hint="use a weight-only recipe",
        )
    root = prefix.removesuffix(container)
    # Some classes name a base model that they do not have; their base model is then the whole.
    model = decoder if full.base_model is full else full.base_model
    return Skeleton(source, full, model, decoder, layers, root, prefix, device, dtype)


def wanted_shapes(source: Weights, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model's decoder has, by its name in the checkpoint. Arguments and errors are
    those of `build_skeleton`, which refuses a checkpoint that lacks one."""
    return _wanted(_assemble(source, prefix, torch.device("cpu"), torch.float32))


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
    by_token: type[nn.Embedding] = type(decoder.get_input_embeddings())
    modules = dict(_outer_modules(skeleton))
    embeddings = {
        name: module
        for name, module in modules.items()
        if isinstance(module, by_token) and type(module) is by_token and not _POSITIONS.search(name)
    }
    for name, embedding in embeddings.items():
        _load_embedding_rows(skeleton, f"{skeleton.root}{name}.weight", embedding, token_ids)
    for name in _outer_state(skeleton):
        if name.rpartition(".")[0] not in embeddings:
            _set(skeleton, skeleton.decoder, name, skeleton.source.read(skeleton.root + name))
    for module in modules.values():
        _move_tables(module, skeleton.device)


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
    names, joined = skeleton.layer_tensors(layer), skeleton.joined.get(layer, {})
    try:
        for name, stored in names.items():
            _set(skeleton, module, name, tensors[stored])
        for name, parts in joined.items():
            value = parts.make(tensors, name, skeleton.full)
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


def import_model_code(source: Weights) -> None:
    """Import the modules that `build_skeleton` needs, which takes seconds.

    Raises:
        EnvironmentLack: the installed transformers does not know the architecture.
    """
    import accelerate  # noqa: F401

    _model_class(source)


def _made_with(source: Weights) -> tuple[str, str]:
    """The architecture and the version of transformers that config.json names, as messages can repeat them."""
    named, wrote = source.config.get("architectures"), source.config.get("transformers_version")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "none"
    is_version = isinstance(wrote, str) and re.fullmatch(r"[\w.+-]{1,40}", wrote) is not None
    return (first if re.fullmatch(r"\w{1,100}", first) else quoted(first)), (
        str(wrote) if is_version else "another one"
    )


def embedding_rows(source: Weights) -> int | None:
    """Rows of the token embedding that the model's class builds from config.json, possibly more than `vocab_size`, or
    None where transformers cannot build it."""
    try:
        return len(on_meta(source, torch.float32).get_input_embeddings().weight)
    except (EnvironmentLack, AttributeError, NotImplementedError):
        return None


def on_meta(source: Weights, dtype: torch.dtype) -> Any:
    """The model of the class that config.json names, without weights.

    Raises:
        EnvironmentLack: the installed transformers does not know the class, or cannot build it from the config.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights():
        return _build(source, dtype)


def _model_class(source: Weights) -> Any:
    """The class that config.json names."""
    import transformers

    architecture, wrote = _made_with(source)
    model_class: Any = getattr(transformers, architecture, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not is_model:
        here = f"{source.where}: transformers {transformers.__version__} does not know the architecture {architecture}"
        if source.config.get("auto_map"):
            raise EnvironmentLack(
                f"{here}, and nvquant does not run the code that auto_map names",
                hint="convert with a weight-only recipe, and verify with --stage structure or --stage serve",
            )
        raise EnvironmentLack(
            f"{here} (the model was made with {wrote})",
            hint="install a transformers that does, or use a weight-only recipe",
        )
    return model_class


def _build(source: Weights, dtype: torch.dtype) -> Any:
    """The model of the class that config.json names, from its config alone."""
    import transformers

    model_class = _model_class(source)
    refusals: list[Exception] = []
    # What a part refuses is refused for the whole model: then each part chooses for itself, and last none has a choice.
    for attention in (ATTENTION, None, "eager"):
        try:
            config = transformers.AutoConfig.from_pretrained(  # anew: a config keeps the attention that was refused
                Path(source.folder), local_files_only=True, trust_remote_code=False
            )
            config._attn_implementation = None
            return model_class._from_config(config, dtype=dtype, attn_implementation=attention)
        except Exception as error:  # each model's code raises what it likes on a config that it does not understand
            refusals.append(error)
            if not _is_about_attention(error):
                break
    last = refusals[-1]
    reason = (str(last)[:MOST_REASON].strip() or "no reason given").splitlines()[0].rstrip(" .:")
    _, wrote = _made_with(source)
    raise EnvironmentLack(
        f"transformers {transformers.__version__} cannot build {model_class.__name__} from config.json, made with "
        f"{wrote} ({type(last).__name__}: {reason})",
        where=source.where,
        hint="install the transformers that wrote it, or use a weight-only recipe",
    ) from last


def _is_about_attention(error: Exception) -> bool:
    """Whether a model's class refuses a way of computing attention, in the words of transformers 5.15 to 5.23."""
    return isinstance(error, ValueError | ImportError | NotImplementedError) and bool(
        re.search(r"attention implementation|attn_implementation|scaled_dot_product_attention|sdpa", str(error))
    )


def _outer_modules(skeleton: Skeleton) -> Iterator[tuple[str, nn.Module]]:
    for name, module in skeleton.decoder.named_modules():
        if _is_outer(skeleton, name):
            yield name, module


def _outer_state(skeleton: Skeleton) -> list[str]:
    return [name for name in skeleton.decoder.state_dict() if _is_outer(skeleton, name)]


def _is_outer(skeleton: Skeleton, name: str) -> bool:
    return name.partition(".")[0] != skeleton.layer_prefix.rpartition(".")[2]


def _wanted(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    state = skeleton.decoder.state_dict()
    outer = {skeleton.root + name: state[name] for name in _outer_state(skeleton)}
    for number, layer in enumerate(skeleton.layers):
        outer |= {f"{skeleton.layer_prefix}.{number}.{name}": value for name, value in layer.state_dict().items()}
    return {name: tuple(value.shape) for name, value in outer.items()}


def _check_tensors(skeleton: Skeleton) -> None:
    source = skeleton.source
    infos, wanted = source.infos(), _wanted(skeleton)
    missing = [name for name in wanted if name not in infos]
    if missing:
        _find_joined(skeleton, missing)
        made = {f"{skeleton.layer_prefix}.{layer}.{name}" for layer, found in skeleton.joined.items() for name in found}
        wanted = {name: value for name, value in wanted.items() if name not in made}
        missing = [name for name in missing if name not in made]
    if missing:
        raise InputError(
            f"{source.where} lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors that "
            f"{type(skeleton.decoder).__name__} needs)",
            where=source.where,
            hint="download the checkpoint again, or use a weight-only recipe if it is complete",
        )
    for name, shape in wanted.items():
        if infos[name].shape != shape:
            raise InputError(
                f"{name} has shape {list(infos[name].shape)}, but config.json describes {list(shape)}",
                where=source.where,
                hint="use the config and weights of one model",
            )


def _find_joined(skeleton: Skeleton, missing: list[str]) -> None:
    """Note how the stored tensors make the layers' parameters that are not stored unchanged."""
    source, prefix = skeleton.source, skeleton.layer_prefix
    path = next(name for name, module in skeleton.full.named_modules() if module is skeleton.layers)
    shapes = {name: info.shape for name, info in source.infos().items() if name.startswith(f"{prefix}.")}
    stored = list(shapes)
    joined = joined_parameters(skeleton.full, stored)
    for name in missing:
        layer, _, inside = name.removeprefix(f"{prefix}.").partition(".")
        found = joined.get(f"{path}.{layer}.{inside}") if name.startswith(f"{prefix}.") else None
        if found is None or not layer.isdecimal() or int(layer) >= len(skeleton.layers):
            continue
        wanted = list(skeleton.layers[int(layer)].state_dict()[inside].shape)
        if joined_shape(found, shapes, inside, skeleton.full) == wanted:
            skeleton.joined.setdefault(int(layer), {})[inside] = found


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
