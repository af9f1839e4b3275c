"""One model class in the families sweep: a tiny random checkpoint, its plan, its conversion, its verification.

The checkpoint is made by general means (`tiny_config`), with random weights of unit scale, so that its logits differ
from token to token. After the conversion, the loss that nvquant measures in the source must be the one that
transformers computes on the same tokens. A wrong walk shows there.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from nvquant import convert, plan, verify
from nvquant.errors import NvquantError
from nvquant.recipe.load import load_recipe
from tiny_config import tiny_configs

SEQUENCES, TOKENS, SMALLEST_ID, LARGEST_ID = 4, 24, 8, 250
MOST_PARAMETERS = 100_000_000
MOST_LOSS_ERROR = 2e-3  # nats a token between nvquant's loss of the source and transformers'
MOST_TEXT = 400  # characters of a reason


@dataclass
class Row:
    """The result of a class.

    Attributes:
        outcome: `whole` (every linear that servers can load is in NVFP4), `partly` (some stay in BF16), `refused`,
            `failed` (a check of verify), `traceback`, `unbuildable` (no tiny checkpoint), `ended` (time or a signal).
        stage: in which it ended: build, plan, convert, verify, loss.
        reason: the sentence of a refusal or of a failed check, or the last lines of a traceback.
        stays: the shares of the decoder's matrices that stay unquantized, by role.
        quantized: number of quantized matrices.
    """

    name: str
    model_type: str = ""
    outcome: str = ""
    stage: str = ""
    reason: str = ""
    stays: dict[str, float] = field(default_factory=dict)
    quantized: int = 0

    def as_json(self) -> dict[str, Any]:
        """The row of the document."""
        return asdict(self)


def sweep_class(name: str, folder: Path) -> Row:
    """Build, plan, convert and verify a class.

    Args:
        folder: empty. The checkpoints are written there.
    """
    row = Row(name)
    stages: dict[str, Callable[[Row, Path], None]] = {
        "build": _build,
        "plan": _plan,
        "convert": _convert,
        "verify": _verify,
    }
    for stage, run in stages.items():
        row.stage = stage
        try:
            run(row, folder)
        except NvquantError as error:
            row.outcome, row.reason = "refused", _one_line(str(error), folder)
        except Exception as error:
            row.outcome = "unbuildable" if stage == "build" else "traceback"
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if stage == "build" else f" at {Path(last.filename).name}:{last.lineno}"
            row.reason = _one_line(f"{type(error).__name__}: {error}{place}", folder)
        if row.outcome:
            return row
    row.stage, row.outcome = "", "partly" if row.stays else "whole"
    return row


def _one_line(text: str, folder: Path) -> str:
    return " ".join(text.replace(f"{folder}/", "").split())[:MOST_TEXT]


def _build(row: Row, folder: Path) -> None:
    model_class: Any = getattr(transformers, row.name)
    row.model_type = getattr(model_class.config_class, "model_type", "")
    model = _tiny_model(model_class)
    model.save_pretrained(folder / "model")
    ids = torch.randint(SMALLEST_ID, LARGEST_ID, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    rows = [json.dumps({"input_ids": one}) for one in ids.tolist()]
    (folder / "ids.jsonl").write_text("\n".join(rows) + "\n")


def _tiny_model(model_class: Any) -> Any:
    """The class with the first tiny configuration that it takes, in BF16.

    Raises:
        Exception: of the last configuration.
    """
    refusal: Exception = ValueError("the class has no default configuration")
    needs_more: Any = None
    for config in tiny_configs(model_class.config_class):
        try:
            with torch.device("meta"):
                count = sum(part.numel() for part in model_class._from_config(config).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(f"the smallest configuration has {count:,} parameters")
            torch.manual_seed(0)
            model = model_class._from_config(config, dtype=torch.bfloat16)
            _randomize(model)
        except Exception as error:  # each class raises what it likes
            refusal = error
            continue
        try:
            with torch.no_grad():
                model.eval().float()(input_ids=torch.arange(SMALLEST_ID, SMALLEST_ID + TOKENS)[None], use_cache=False)
            return model.bfloat16()
        except Exception:  # sizes that do not fit each other, or a class that needs more than token ids
            needs_more = needs_more or model.bfloat16()
    if needs_more is None:
        raise refusal
    return needs_more


def _randomize(model: Any) -> None:
    """Random weights that keep signals at unit scale, so that each tensor matters to the logits."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            else:
                weight.copy_((weight * (1 + 0.1 * noise)) if weight.any() else 0.1 * noise)


def _recipe() -> Any:
    return load_recipe("nvfp4-full").model_copy(update={"experts": "bf16", "quantizer": "rtn"})


def _plan(row: Row, folder: Path) -> None:
    planned = plan(folder / "model", _recipe())
    row.quantized = len(planned.matrices)
    row.stays = {role: round(share, 4) for role, share in planned.kept_shares.items()}


def _convert(row: Row, folder: Path) -> None:
    convert(
        folder / "model",
        folder / "output",
        _recipe(),
        calibration=folder / "ids.jsonl",
        samples=SEQUENCES,
        sequence_length=TOKENS,
        device="cpu",
    )


def _verify(row: Row, folder: Path) -> None:
    report = verify(
        folder / "output",
        against=folder / "model",
        stages=("structure", "numerics"),
        text=folder / "ids.jsonl",
        samples=SEQUENCES,
        sequence_length=TOKENS,
        min_top1=0.0,
        device="cpu",
    )
    # A loss of random weights says nothing about quantization, and neither do its layers' errors.
    faults = [check for check in report.checks if not check.passed and check.name not in ("nll", "layers", "top1")]
    if faults:
        row.outcome, row.reason = "failed", _one_line(f"{faults[0].name}: {faults[0].detail}", folder)
        return
    assert report.numerics is not None
    ours, theirs = float(report.numerics["nll_source"]), _loss_of(row.name, folder)
    if theirs is None:
        row.reason = "its own forward requires more than text, so that the loss was not compared"
    elif not abs(ours - theirs) <= MOST_LOSS_ERROR:
        row.stage, row.outcome = "loss", "failed"
        row.reason = f"nvquant measures a loss of {ours:.4f} in the source, transformers {theirs:.4f}"


@torch.no_grad()
def _loss_of(name: str, folder: Path) -> float | None:
    """The loss that transformers computes of the source on the same tokens, in nats a token, or None for a class that
    requires more than tokens."""
    model_class: Any = getattr(transformers, name)
    model = model_class.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = [json.loads(line)["input_ids"] for line in (folder / "ids.jsonl").read_text().splitlines()]
    losses = []
    for row in rows:
        ids = torch.tensor(row)
        try:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        except Exception:  # each class raises what it likes
            return None
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
    return float(torch.stack(losses).mean())
