"""The class that config.json names, and the model that it builds without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.json_text import quoted
from ..errors import EnvironmentLack
from ..weights.base import Weights
from .quiet import quiet_transformers

ATTENTION = "sdpa"
MOST_REASON = 300  # characters of an error of transformers that a message repeats


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


def model_ties_head(source: Weights) -> bool | None:
    """Whether the model of the class that config.json names gets its head from another weight, or None where
    transformers cannot build it or it has no head."""
    try:
        full = on_meta(source, torch.float32)
        head = full.get_output_embeddings()
    except (EnvironmentLack, AttributeError, NotImplementedError):
        return None
    if head is None:
        return None
    name = next(name for name, module in full.named_modules(remove_duplicate=False) if module is head)
    return f"{name}.weight" in full.all_tied_weights_keys


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
