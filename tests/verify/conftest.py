"""Good checkpoints, made once by the real conversion from tiny models, and copies of them to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.convert.pipeline import ConvertOptions, convert
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.recipe.roles import text_config
from support.tiny_models import tiny_gemma4, tiny_llama

WRITERS = {"llama": tiny_llama, "gemma4": tiny_gemma4}
# Name: model, layout, recipe, quantizer, and whether the manifest is kept; without it another tool might have made it.
GOOD = {
    "llama-ct": ("llama", "compressed-tensors", "nvfp4-full", "rtn", True),
    "llama-mo": ("llama", "modelopt", "nvfp4-full", "mse", True),
    "llama-a16-ct": ("llama", "compressed-tensors", "nvfp4-a16", "mse", True),
    "llama-a16-mo": ("llama", "modelopt", "nvfp4-a16", "rtn", True),
    "gemma4-ct": ("gemma4", "compressed-tensors", "nvfp4-full", "mse", True),
    "gemma4-mo": ("gemma4", "modelopt", "nvfp4-full", "mse", True),
    "gemma4-a16-ct": ("gemma4", "compressed-tensors", "nvfp4-a16", "rtn", True),
    "gemma4-a16-mo": ("gemma4", "modelopt", "nvfp4-a16", "mse", True),
    "gemma4-mlp-ct": ("gemma4", "compressed-tensors", "nvfp4", "rtn", True),
    "llama-foreign": ("llama", "compressed-tensors", "nvfp4-full", "rtn", False),
}


@dataclass(frozen=True)
class Copy:
    """A checkpoint that a test may change, and the source that it may not."""

    folder: Path
    source: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The BF16 sources by name."""
    return {name: write(tmp_path_factory.mktemp("models") / name) for name, write in WRITERS.items()}


def token_ids(source: Checkpoint, folder: Path) -> CalibrationSet:
    """Two samples of 61 token ids, the first of them BOS."""
    bos = text_config(source.config)["bos_token_id"]
    path = folder / f"{source.folder.name}.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [bos, *range(first, first + 60)]}) for first in (20, 130)))
    return load_calibration(
        str(path), model_folder=source.folder, config=source.config, samples=2, sequence_length=64, seed=0
    )


@pytest.fixture(scope="session")
def good(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the good checkpoint of a name in `GOOD`, converted when first asked for."""
    folder = tmp_path_factory.mktemp("good")

    def make(name: str) -> Path:
        model, layout, recipe, quantizer, keeps_manifest = GOOD[name]
        output = folder / name
        if not output.exists():
            plan = compute_plan(open_checkpoint(models[model]), load_recipe(recipe), LAYOUTS[layout], model)
            samples = token_ids(plan.source, folder) if plan.recipe.needs_calibration else None
            convert(plan, ConvertOptions(output, quantizer), samples)
            if not keeps_manifest:
                (output / "nvquant_manifest.json").unlink()
        return output

    return make


@pytest.fixture
def copy(good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path) -> Callable[[str], Copy]:
    """Gives a fresh copy of a good checkpoint, with its source beside it."""

    def make(name: str) -> Copy:
        shutil.copytree(good(name), tmp_path / "checkpoint")
        (tmp_path / "source").symlink_to(models[GOOD[name][0]])
        return Copy(tmp_path / "checkpoint", tmp_path / "source")

    return make
