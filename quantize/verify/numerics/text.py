"""The tokens on which numbers are measured: held-out text of all kinds, framed as the model requires."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...calibrate.samples import CalibrationSet, load_calibration
from ...calibrate.specs import shipped_folder
from ...errors import InputError

HELDOUT = "heldout.jsonl.xz"
REFERENCE_TOKENS = 512
SEED = 1


def load_text(
    text: Path | None,
    folder: Path,
    config: Mapping[str, Any],
    samples: int,
    sequence_length: int,
    seed: int = SEED,
) -> CalibrationSet:
    """Load samples of a file, or of the shipped held-out text, of each kind of text equally many where it has kinds.

    That text shares no document with the shipped calibration text.

    Args:
        text: a file of text or conversations, or of token ids, as for `--calibration`. None for the shipped text.
        folder: the checkpoint's own, which contains the tokenizer and its chat template.
        seed: of the order of the documents.
    Raises:
        InputError: see `load_calibration`.
    """
    name = str(text if text is not None else shipped_folder() / HELDOUT)
    try:
        return load_calibration(
            name,
            model_folder=folder,
            config=config,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            in_equal_kinds=True,
        )
    except InputError as error:
        error.rename("--calibration", "--text")
        raise


def reference_ids(folder: Path, config: Mapping[str, Any], tokens: int = REFERENCE_TOKENS) -> list[int]:
    """The token ids of one sequence of the held-out text, of any kind, for a request to a server."""
    name = str(shipped_folder() / HELDOUT)
    text = load_calibration(name, model_folder=folder, config=config, samples=1, sequence_length=tokens, seed=SEED)
    ids: list[int] = text.samples[0].tolist()
    return ids
