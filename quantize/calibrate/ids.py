"""Samples given as token ids, which need no tokenizer: `.jsonl` or `.safetensors` with `input_ids`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .rows import data_suffix, read_rows
from .text import columns_of

logger = logging.getLogger("nvquant.calibrate.ids")

MOST_ID = (1 << 63) - 1  # that an id of int64 can be
IDS_SUFFIX = ".safetensors"
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def holds_ids(path: Path) -> bool:
    """Whether a file contains token ids, not text, judged by its suffix or the first row of a table."""
    if path.suffix == IDS_SUFFIX:
        return True
    return data_suffix(path.name) in (".jsonl", ".parquet") and "input_ids" in next(read_rows(path, None))[1]


def read_id_samples(path: Path, config: Mapping[str, Any], *, samples: int, sequence_length: int) -> list[torch.Tensor]:
    """The first rows of a file in the file's order, whatever the seed: the user has chosen the ids.

    Each row is cut to the tokens that its `attention_mask` attends to, which must be one run. Without a mask, runs of
    the config's `pad_token_id` at either end are padding. Where that id is also an end of text, one is kept at the end.
    Where it is also BOS, one is kept at the front. Then the row is cut to `sequence_length`.

    Args:
        path: `.jsonl` or `.parquet` with a list a row, or `.safetensors` with integers [N, S].
        config: the model's config.json, for its special ids. A composite model may have them in `text_config`.
        samples: how many rows.
        sequence_length: in tokens.

    Returns:
        int64 vectors of 2 to `sequence_length` ids.

    Raises:
        InputError: unreadable or malformed file, a mask with holes, a row of fewer than two ids.
    """
    rows = _safetensors_rows(path, samples) if path.suffix == IDS_SUFFIX else _table_rows(path, samples)
    result = [_unpadded(ids, mask, config, where)[:sequence_length] for where, ids, mask in rows]
    for index, ids in enumerate(result, 1):
        if len(ids) < 2:
            raise InputError(
                f"{path.name}, row {index} has {len(ids)} tokens besides padding",
                where=path.name,
                hint="give at least two",
            )
    bos_id = config_value(config, "bos_token_id")
    without_bos = sum(int(ids[0]) != bos_id for ids in result)
    if isinstance(bos_id, int) and without_bos:
        logger.warning("%s: %d of %d rows do not begin with BOS (id %d)", path.name, without_bos, len(result), bos_id)
    return result


def id_kinds(path: Path, samples: int) -> tuple[str, ...]:
    """The kinds of the rows that `read_id_samples` reads, by their column `kind`. Empty where a row has none."""
    if path.suffix == IDS_SUFFIX:
        return ()
    rows = [row for _, row in islice(read_rows(path, None), samples)]
    kinds = tuple(kind for kind in (row.get("kind") for row in rows) if isinstance(kind, str) and kind)
    return kinds if len(kinds) == len(rows) else ()


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the language model: the value of `text_config` where it has one, else that of the top level."""
    text = config.get("text_config")
    value = text.get(key) if isinstance(text, Mapping) else None
    return config.get(key) if value is None else value


def check_vocabulary(samples: list[torch.Tensor], config: Mapping[str, Any], origin: str) -> None:
    """Refuse ids for which the embedding has no row.

    Raises:
        InputError: an id has no row. The message names the first sample and id.
    """
    size = config_value(config, "vocab_size")
    if not isinstance(size, int) or not 0 < size <= MOST_ID:
        return
    for number, ids in enumerate(samples, 1):
        wrong = ids[(ids < 0) | (ids >= size)]
        if wrong.numel():
            raise InputError(
                f"{origin}, sample {number} has token id {int(wrong[0])}, but the model's vocabulary has {size} "
                "entries",
                hint="use this model's tokenizer",
            )


def _table_rows(path: Path, samples: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    for number, row in islice(read_rows(path, None), samples):
        where = f"{path.name}, row {number}"
        if "input_ids" not in row:
            raise InputError(
                f"{where} has no input_ids (columns: {columns_of(row)})", where=where, hint="give ids in every row"
            )
        mask = row.get("attention_mask")
        yield (
            where,
            _vector(row["input_ids"], where),
            None if mask is None else _vector(mask, f"{where}: attention_mask"),
        )


def _vector(value: object, where: str) -> torch.Tensor:
    """A flat list of integers as int64."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InputError(f"{where} is not a flat list of integers", where=where, hint="write one sequence a line")
    try:
        return torch.tensor(value, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise InputError(f"{where} contains a number beyond 64 bits", where=where, hint="write token ids") from error


def _safetensors_rows(path: Path, samples: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} is not a file", where=path, hint="name an existing file with --calibration")
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if "input_ids" not in names:
                raise InputError(
                    f"{path.name} has no tensor input_ids (it has {', '.join(names) or 'none'})",
                    where=path.name,
                    hint="give ids under that name",
                )
            present = [name for name in ("input_ids", "attention_mask") if name in names]
            shapes = [file.get_slice(name).get_shape() for name in present]
            for name, shape in zip(present, shapes, strict=True):
                dtype = file.get_slice(name).get_dtype()
                if len(shape) != 2 or shape != shapes[0] or dtype not in INTEGERS:
                    raise InputError(
                        f"{path.name}: {name} is {dtype} {shape}, but must be integers [N, S] "
                        "(the mask of the same shape as the ids)."
                    )
            tensors = {name: file.get_slice(name)[:samples].long() for name in present}
    except SafetensorError as error:
        raise InputError(
            f"{path.name} is not a complete safetensors file ({error})", where=path.name, hint="write it again"
        ) from error
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    for row in range(len(ids)):
        yield f"{path.name}, row {row + 1}", ids[row], None if mask is None else mask[row]


def _unpadded(ids: torch.Tensor, mask: torch.Tensor | None, config: Mapping[str, Any], where: str) -> torch.Tensor:
    """The attended part of a row."""
    if mask is None:
        return _without_pad_runs(ids, config)
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(f"{where}: attention_mask must have a 0 or 1 for each of the {len(ids)} ids.")
    attended = mask.nonzero().flatten()
    if not len(attended):
        return ids[:0]
    first, last = int(attended[0]), int(attended[-1])
    if last - first + 1 != len(attended):
        raise InputError("attention_mask has a gap", where=where, hint="mask only padding at the ends")
    return ids[first : last + 1]


def _without_pad_runs(ids: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    pad_id = config_value(config, "pad_token_id")
    if not isinstance(pad_id, int) or not 0 <= pad_id <= MOST_ID:
        return ids
    others = (ids != pad_id).nonzero().flatten()
    if not len(others):
        return ids[:0]
    eos = config_value(config, "eos_token_id")
    keeps_end = pad_id in (eos if isinstance(eos, list) else [eos])
    keeps_front = pad_id == config_value(config, "bos_token_id")
    first, last = int(others[0]), int(others[-1])
    return ids[max(0, first - keeps_front) : last + 1 + keeps_end]
