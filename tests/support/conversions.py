"""Conversions of tiny models as tests want them: token ids as calibration, everything on the CPU, in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.calibrate.skeleton import Skeleton, build_skeleton
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.recipe.roles import decoder_prefix
from nvquant.recipe.schema import Recipe
from safetensors.torch import load_file, save_file
from support.tiny_models import WRITERS
from torch import Tensor

# Tokens in each sequence. The tiny models' sliding window is 16: some are longer, some shorter, some just that long.
LENGTHS = (40, 40, 7, 24, 16, 17)
COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"


class TinyModels:
    """Folders of tiny models by name, each written when it is first asked for; they are shared, so only to be read."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        folder = self._root / name
        return folder if folder.exists() else WRITERS[name](folder)


def random_samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Sequences of ids that every tiny vocabulary has, none of them special but the first (Gemma's BOS)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.tensor([2]), torch.randint(10, 490, (n - 1,), generator=generator)]) for n in lengths]


def write_ids(path: Path, samples: Sequence[Tensor]) -> Path:
    """A `.jsonl` file of token ids."""
    path.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in samples))
    return path


def calibration_of(source: Path, ids: Path) -> CalibrationSet:
    """All rows of a file of ids."""
    rows = len(ids.read_text().splitlines())
    config = json.loads((source / "config.json").read_text())
    return load_calibration(str(ids), model_folder=source, config=config, samples=rows, sequence_length=4096, seed=0)


def as_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its shipped name, or one of the test's own."""
    return load_recipe(recipe) if isinstance(recipe, str) else recipe


def experts_in_bf16(recipe: str) -> Recipe:
    """A shipped recipe for a mixture of experts: they stay as they are."""
    return load_recipe(recipe).model_copy(update={"experts": "bf16"})


def planned(
    source: Path,
    recipe: str | Recipe = "nvfp4-full",
    layout: str = COMPRESSED_TENSORS,
    quantizer: str | None = None,
) -> Plan:
    """The plan of a conversion; the recipe's quantizer where none is given."""
    return compute_plan(open_checkpoint(source), as_recipe(recipe), LAYOUTS[layout], source.name, quantizer)


def converted(
    source: Path,
    output: Path,
    recipe: str | Recipe = "nvfp4-full",
    layout: str = COMPRESSED_TENSORS,
    quantizer: str = "rtn",
    samples: Sequence[Tensor] | None = None,
    batch_size: int = 1,
    fold: bool = False,
) -> Path:
    """Convert; `samples` are `random_samples()` where not given."""
    plan = planned(source, recipe, layout, quantizer)
    calibration = None
    if plan.needs_calibration:
        ids = write_ids(output.with_name(f"{output.name}.jsonl"), random_samples() if samples is None else samples)
        calibration = calibration_of(source, ids)
        ids.unlink()
    convert(plan, ConvertOptions(output, quantizer, batch_size=batch_size, fold=fold), calibration)
    return output


class Conversions:
    """Converted tiny models, each made when it is first asked for; they are shared, so only to be read."""

    def __init__(self, tiny: TinyModels, root: Path) -> None:
        self._tiny, self._root = tiny, root

    def __call__(
        self, name: str, recipe: str = "nvfp4-full", layout: str = COMPRESSED_TENSORS, quantizer: str = "rtn"
    ) -> Path:
        """A converted model; experts stay in BF16."""
        output = self._root / f"{name}-{recipe}-{layout}-{quantizer}"
        if not output.exists():
            converted(self._tiny(name), output, recipe_for(name, recipe), layout, quantizer)
        return output


def recipe_for(name: str, recipe: str) -> Recipe:
    """A shipped recipe, with leave to keep experts as they are where a tiny model has some."""
    return experts_in_bf16(recipe) if name == "gemma4_moe" else load_recipe(recipe)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cast_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """Store a checkpoint's tensors in another dtype, in place."""
    for shard in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    return folder


def edit_tensors(folder: Path, edit: Callable[[str, Tensor], Tensor]) -> Path:
    """Change a checkpoint's tensors by name, in place; the result keeps its dtype."""
    for shard in folder.glob("*.safetensors"):
        tensors = {name: edit(name, tensor).to(tensor.dtype).contiguous() for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json, in place."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))
    return folder


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The skeleton of a checkpoint, on the CPU."""
    source = open_checkpoint(folder)
    prefix = decoder_prefix({name: info.shape for name, info in source.infos().items()})
    assert prefix is not None
    return build_skeleton(source, prefix, torch.device("cpu"), dtype)


def layer_weights(skeleton: Skeleton, layer: int) -> dict[str, Tensor]:
    """What a walk reads of a layer."""
    joined = [name for one in skeleton.layer_joined(layer).values() for name in one.stored]
    return {name: skeleton.source.read(name) for name in (*skeleton.layer_tensors(layer).values(), *joined)}
