from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.errors import InputError
from safetensors.torch import save_file

CONFIG = {"vocab_size": 100}


def load(path: Path, *, config: dict[str, object] = CONFIG, samples: int = 1, length: int = 8) -> CalibrationSet:
    # There is no model folder, hence no tokenizer: ids must not need one.
    return load_calibration(
        str(path), model_folder=path.parent / "none", config=config, samples=samples, sequence_length=length, seed=5
    )


def lists(result: CalibrationSet) -> list[list[int]]:
    return [ids.tolist() for ids in result.samples]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_tensors(path: Path, **tensors: object) -> Path:
    save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, path)
    return path


def test_rows_come_in_the_files_order_whatever_the_seed(tmp_path: Path) -> None:
    rows = [[1, index, index] for index in range(2, 40)]
    expected = rows[:20]
    from_lines = load(write_lines(tmp_path / "a.jsonl", *({"input_ids": row} for row in rows)), samples=20)
    from_tensors = load(write_tensors(tmp_path / "a.safetensors", input_ids=rows), samples=20)
    assert lists(from_lines) == lists(from_tensors) == expected
    assert from_lines.sha256 == from_tensors.sha256
    assert {ids.dtype for ids in from_tensors.samples} == {torch.int64}
    assert from_tensors.framing == "ids" and from_tensors.name == "a.safetensors"


def test_parquet_of_ids_is_read_too(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"input_ids": [[1, 2, 3], [4, 5]]}), tmp_path / "a.parquet")
    assert lists(load(tmp_path / "a.parquet", samples=2)) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_type_will_do(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.safetensors", input_ids=torch.tensor([[1, 2, 3]], dtype=dtype))
    assert lists(load(path)) == [[1, 2, 3]]


def test_rows_are_cut_to_the_sequence_length(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"input_ids": list(range(1, 20))}, {"input_ids": [1, 2, 3]})
    assert lists(load(path, samples=2)) == [list(range(1, 9)), [1, 2, 3]]


@pytest.mark.parametrize("mask_type", [torch.int64, torch.bool])
def test_masked_positions_never_arrive_on_either_side(mask_type: torch.dtype, tmp_path: Path) -> None:
    ids = [[0, 0, 1, 2, 3], [1, 2, 3, 0, 0], [0, 1, 0, 2, 0]]
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    expected = [[1, 2, 3], [1, 2, 3], [1, 0, 2]]
    path = write_tensors(tmp_path / "a.safetensors", input_ids=ids, attention_mask=torch.tensor(mask).to(mask_type))
    assert lists(load(path, config={"vocab_size": 9, "pad_token_id": 0}, samples=3)) == expected
    rows = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids, mask, strict=True)]
    assert lists(load(write_lines(tmp_path / "a.jsonl", *rows), samples=3)) == expected


@pytest.mark.parametrize(
    ("special", "row", "expected"),
    [
        ({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}, [2, 5, 0, 6, 0, 0], [2, 5, 0, 6]),
        ({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}, [2, 5, 6, 1, 0], [2, 5, 6, 1]),
        ({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}, [0, 0, 2, 5, 6], [2, 5, 6]),
        # Padding that is also the end of text: one end stays.
        ({"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 2}, [2, 5, 6, 1, 1, 1], [2, 5, 6, 1]),
        ({"pad_token_id": 1, "eos_token_id": [7, 1], "bos_token_id": 2}, [2, 5, 6, 1, 1], [2, 5, 6, 1]),
        ({"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 2}, [1, 1, 2, 5], [2, 5]),
        # One token for everything, as in GPT-2.
        ({"pad_token_id": 3, "eos_token_id": 3, "bos_token_id": 3}, [3, 3, 3, 5, 6, 3, 3], [3, 5, 6, 3]),
        ({"pad_token_id": None, "eos_token_id": 1}, [2, 5, 0, 0], [2, 5, 0, 0]),
        ({"text_config": {"pad_token_id": 0}}, [2, 5, 0, 0], [2, 5]),
    ],
)
def test_padding_without_a_mask_is_known_by_its_id(
    special: dict[str, object], row: list[int], expected: list[int], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"input_ids": row})
    assert lists(load(path, config=CONFIG | special)) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3, 4], "attention_mask": [1, 0, 1, 1]}, "row 1: attention_mask has a gap"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1, 1]}, "must have a 0 or 1 for each of the 2 ids"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "must have a 0 or 1 for each"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "row 1 has 0 tokens besides padding"),
        ({"input_ids": [1]}, "row 1 has 1 tokens besides padding"),
        ({"input_ids": []}, "row 1 has 0 tokens besides padding"),
        ({"input_ids": [[1, 2]]}, "row 1 is not a flat list of integers"),
        ({"input_ids": [1, 2.5]}, "row 1 is not a flat list of integers"),
        ({"input_ids": [1, True]}, "row 1 is not a flat list of integers"),
        ({"input_ids": "1 2"}, "row 1 is not a flat list of integers"),
        ({"input_ids": [1, 2**70]}, "row 1 contains a number beyond 64 bits"),
        ({"input_ids": [1, 100]}, "sample 1 has token id 100, but the model's vocabulary has 100 entries"),
        ({"input_ids": [1, -1]}, "sample 1 has token id -1"),
    ],
)
def test_wrong_rows_are_refused_by_number(row: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(write_lines(tmp_path / "a.jsonl", row))


def test_a_row_without_ids_among_others_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"input_ids": [1, 2]}, {"text": "x"})
    with pytest.raises(InputError, match=r"row 2 has no input_ids \(columns: text\)"):
        load(path, samples=2)


def test_too_few_rows_names_their_number(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.safetensors", input_ids=[[1, 2], [3, 4]])
    with pytest.raises(InputError, match="has only 2 samples of 8 tokens, not 3: use --samples 2"):
        load(path, samples=3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": [[1, 2]]}, r"no tensor input_ids \(it has ids\)"),
        ({"input_ids": [1, 2]}, r"input_ids is I64 \[2\], but must be integers \[N, S\]"),
        ({"input_ids": 1}, r"input_ids is I64 \[\], but must be integers \[N, S\]"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids is F32"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, r"attention_mask is I64 \[1, 3\]"),
    ],
)
def test_wrong_tensors_are_refused(tensors: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(write_tensors(tmp_path / "a.safetensors", **tensors))


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.safetensors", input_ids=[[1, 2]])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a\.safetensors is not a complete safetensors file"):
        load(path)


def test_rows_without_bos_are_reported_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"input_ids": [2, 5]}, {"input_ids": [5, 6]})
    with caplog.at_level(logging.WARNING, "nvquant"):
        assert lists(load(path, config=CONFIG | {"bos_token_id": 2}, samples=2)) == [[2, 5], [5, 6]]
    assert "1 of 2 rows do not begin with BOS (id 2)" in caplog.text
