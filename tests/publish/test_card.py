"""What the card says, from what was recorded and measured; and what it says of what was not."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from nvquant.errors import InputError
from nvquant.publish.card import CardFacts, render_card
from nvquant.publish.frontmatter import split_card
from nvquant.publish.proof import prove
from nvquant.publish.provenance import read_provenance
from nvquant.publish.target import MARKER
from nvquant.quoting import one_line
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import KvCache
from nvquant.report.page import page_of
from nvquant.report.words import ABSENT, number
from nvquant.serving.machine import FP4_WORDS
from support import reports
from support.conversions import Conversions, TinyModels
from support.conversions import converted as converted_anew
from support.distilling import distilled

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "me/llama-NVFP4"


def card_of(
    folder: Path,
    document: dict[str, Any],
    base_model: str | None = "org/base",
    source: dict[str, Any] | None = None,
    has_chart: bool = False,
) -> str:
    return render_card(CardFacts(REPO, folder, document, read_provenance(folder, base_model), source or {}, has_chart))


def edit_manifest(folder: Path, **changes: Any) -> Path:
    path = folder / "nvquant_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def from_hub(folder: Path) -> Path:
    """As convert writes it for a source on the Hub."""
    source = {
        "hub": {"id": "org/base", "commit": COMMIT},
        "integrity": "every file has its published sha256",
        "config_sha256": "0" * 64,
        "shards": {"model.safetensors": {"bytes": 290_640, "etag": "0" * 64}},
    }
    return edit_manifest(folder, source=source)


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_card_begins_with_its_data_the_marker_and_one_sentence(converted: Path, measured: dict[str, Any]) -> None:
    card = card_of(converted, measured, source={"license": "mit", "language": ["en"]})
    data, body = split_card(card)
    assert data["license"] == "mit" and data["language"] == ["en"]
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert {"nvfp4", "compressed-tensors", "vllm", "nvquant"} <= set(data["tags"])
    lines = [line for line in body.splitlines() if line]
    assert lines[:2] == [MARKER, "# llama-NVFP4"]
    assert lines[2] == (
        "[org/base](https://huggingface.co/org/base) with MLP in NVFP4, 4-bit floating point, for vLLM, made by "
        "nvquant 0.1.0."
    )
    checks = len(measured["checks"])
    assert lines[3].startswith(f"✅ **All {checks} checks passed.** structure: all ") and "not served" in lines[3]


def test_measured_accuracy_stands_in_a_table_with_standard_errors_and_the_chart(
    converted: Path, measured: dict[str, Any]
) -> None:
    accuracy = section(card_of(converted, measured, has_chart=True), "Accuracy")
    own = measured["numerics"]["arithmetics"]
    assert f"| {own['w4a4']['words']} | {own['w4a4']['kl']['mean']:.5f} ± " in accuracy
    assert f"{own['weight_only']['top1']['agreement'] * 100:.1f} % ± " in accuracy
    assert f"| {measured['numerics']['perplexity_source']:.0f} |" in accuracy
    assert "Text: heldout.jsonl.xz" in accuracy and "![Relative output error" in accuracy
    assert "](nvquant_layers.svg)" in accuracy


def test_the_loss_of_each_kind_of_text_stands_in_a_table_and_a_lost_kind_is_named(
    converted: Path, measured: dict[str, Any]
) -> None:
    kinds = measured["numerics"]["arithmetics"]["w4a4"]["kinds"]
    assert set(kinds) == {"code", "dialogue", "language", "mathematics", "prose", "technical"}
    warning = {"arithmetic": "w4a4", "kind": "code", "kl": 0.5, "relative": 1.8, "relative_error": 0.1}
    numerics = {**measured["numerics"], "kind_warnings": [warning]}
    sound, lost = (
        section(card_of(converted, {**measured, "numerics": one}), "Accuracy")
        for one in ({**numerics, "kind_warnings": []}, numerics)
    )
    for kind, loss in kinds.items():
        assert f"| {kind} | {loss['tokens']:,} | {loss['kl']['mean']:.1g}"[:-3] in sound
    assert "⚠️" not in sound
    assert "⚠️ Text of the kind code lost 1.80 ± 0.10 times as much as the other kinds in W4A4" in lost


def test_what_was_not_measured_is_said_to_be_so(converted: Path, proved: dict[str, Any]) -> None:
    card = card_of(converted, proved)
    assert section(card, "Accuracy").strip() == (
        "Accuracy against the source was not measured before it was published."
    )
    assert "It was not served before it was published." in section(card, "Serve it")
    assert "nvquant_layers.svg" not in card
    assert "numbers not measured, not served." in card


def test_what_was_served_is_told(converted: Path, measured: dict[str, Any]) -> None:
    serving = section(card_of(converted, {**measured, "serve": reports.serve()}), "Serve it")
    assert "Served before it was published:" in serving and "- Server: vLLM 0.32.0" in serving
    assert "- Kernel: weight-only (Marlin)" in serving and "not served" not in serving


def test_a_checkpoint_that_failed_says_so_before_anything_else(converted: Path, measured: dict[str, Any]) -> None:
    checks = [
        {**check, "passed": check["name"] not in ("kl", "hashes"), "faults": [f"{check['name']} | is *wrong*"]}
        for check in measured["checks"]
    ]
    body = split_card(card_of(converted, {**measured, "checks": checks}))[1]
    lines = [line for line in body.splitlines() if line]
    assert lines[2] == (
        f"> ❌ **This checkpoint did not pass verification.** 2 of {len(checks)} checks failed. Its publisher "
        f"chose to publish it anyway (`--unverified`)."
    )
    assert lines[4] == "> - **hashes** (structure): `hashes | is *wrong*`"
    assert lines[5] == "> - **kl** (numerics): `kl | is *wrong*`"
    assert "✅" not in body


def test_a_checkpoint_that_nobody_checked_says_so(converted: Path, proved: dict[str, Any]) -> None:
    body = split_card(card_of(converted, {**proved, "checks": []}))[1]
    assert "> ⚪ **This checkpoint was not verified.**" in body and "✅" not in body


def test_sizes_before_and_after_stand_by_group(
    converted: Path, measured: dict[str, Any], proved: dict[str, Any]
) -> None:
    size = section(card_of(converted, measured), "Size")
    assert "Reduced from 288 kB to 182 kB." in size and "| MLP, NVFP4 W4A4 | 36 | 147 kB | 41.5 kB | 28 % |" in size
    files = section(card_of(converted, proved), "Size")  # without the source, its files tell
    assert "Reduced from 291 kB to 182 kB." in files
    assert f"| MLP, NVFP4 W4A4 | 36 | {ABSENT} | 41.5 kB | {ABSENT} |" in files


def test_what_is_quantized_and_by_which_recipe(converted: Path, proved: dict[str, Any]) -> None:
    text = section(card_of(converted, proved), "Quantized modules")
    assert "In 4 bits: MLP (NVFP4 W4A4). As in the source: attention (BF16), embedding (BF16)" in text
    assert "Recipe nvfp4, scales by the quantizer rtn, in the layout of compressed-tensors." in text
    recipe = yaml.safe_load(text.split("```text\n", 1)[1].split("\n```", 1)[0])
    assert recipe == json.loads((converted / "nvquant_manifest.json").read_text())["recipe"]


def test_a_mixed_checkpoint_names_both_formats(conversions: Conversions) -> None:
    folder = conversions("llama", "nvfp4-fp8")
    card = card_of(folder, prove(folder, None, None, lambda _done, _total, _phase: None))
    assert "with MLP in NVFP4, 4-bit floating point, and attention in FP8, 8-bit floating point, for vLLM" in card
    text = section(card, "Quantized modules")
    assert "In 4 bits: MLP (NVFP4 W4A4). In 8 bits: attention (FP8 " in text
    assert "As in the source: embedding (BF16)" in text
    assert "FP8 keeps it in 8 bits (E4M3), with one scale in 32 bits for each row or matrix." in text
    assert "KV cache" not in text


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (
            "fp8",
            "with unit scales, so it stores magnitudes up to 448 times the scale. Keys and values: 6 observed to be",
        ),
        (
            "fp8-calibrated",
            "with stored scales, so it stores magnitudes up to 448 times the scale. Keys and values: 6 ",
        ),
    ],
)
def test_what_is_known_of_keys_and_values(tiny: TinyModels, tmp_path: Path, dtype: str, words: str) -> None:
    recipe = load_recipe("nvfp4").model_copy(update={"kv_cache": KvCache(dtype=dtype)})  # type: ignore[arg-type]
    folder = converted_anew(tiny("llama"), tmp_path / "out", recipe)
    text = section(card_of(folder, prove(folder, None, None, lambda _done, _total, _phase: None)), "Quantized modules")
    assert f"The KV cache is FP8 {words}" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offline", "Licence: each text its own, see ORIGINS.md"),
        ("offline", "[ORIGINS.md](https://github.com/nvquant/nvquant/blob/main/calibration/ORIGINS.md)"),
        ("ultrachat", "Licence: MIT. Origins: [HuggingFaceH4/ultrachat_200k](https://huggingface.co/datasets/"),
        ("nemotron", "[nvidia/Nemotron-Post-Training-Dataset-v2]("),
        (f"org/set@{COMMIT}", f"The Hub data set [org/set](https://huggingface.co/datasets/org/set/tree/{COMMIT})"),
        ("mine.jsonl", "A file supplied by the maker of this checkpoint. Its origin and licence are not recorded."),
    ],
)
def test_the_calibration_set_and_its_licence_are_told(
    copy: Callable[[], Path], proved: dict[str, Any], name: str, words: str
) -> None:
    calibration = {"name": name, "samples": 128, "tokens": 262_144, "framing": "chat", "sha256": "ab" * 32}
    text = section(card_of(edit_manifest(copy(), calibration=calibration), proved), "Calibration")
    assert words in text and "abab" in text
    assert f"- Set: `{name}`" in text and "`128 with 262,144 tokens, conversations in the model's own chat" in text


def test_weights_alone_need_no_calibration_and_the_card_says_so(
    conversions: Callable[..., Path], proved: dict[str, Any]
) -> None:
    folder = conversions("llama", "nvfp4-a16")
    card = card_of(folder, proved)
    assert section(card, "Calibration").strip() == "None. Only weights are quantized, and they need no calibration."
    assert "--calibration" not in card


def test_what_fp4_does_on_which_gpu_is_what_doctor_says(converted: Path, proved: dict[str, Any]) -> None:
    serving = section(card_of(converted, proved), "Serve it").replace("\\", "")
    rows = [line for line in serving.splitlines() if line.startswith("| ")]
    for words, kind in (
        ("Blackwell |", "native"),
        ("Hopper, Ada, Ampere, Turing |", "weight_only"),
        ("CPU |", "emulated"),
    ):
        assert any(row.startswith(f"| {words}") and FP4_WORDS[kind] in row for row in rows)  # type: ignore[index]
    assert f"\nvllm serve {REPO}\n" in serving and f"api_server --model {REPO} " in serving
    assert "vLLM 0.24.0 to 0.33.0" in serving


def test_known_faults_are_those_that_concern_the_checkpoint(
    conversions: Callable[..., Path], proved: dict[str, Any]
) -> None:
    tied = "tied models in the modelopt layout do not start"
    modelopt = card_of(conversions("llama", "nvfp4-full", "modelopt"), proved)
    assert tied in modelopt and "| from 0.24.0 on, before 0.32.0 | issue 48238 |" in modelopt
    assert tied not in card_of(conversions("llama", "nvfp4-full"), proved)
    assert "--vllm-flag" not in modelopt


def test_a_source_on_the_hub_is_told_with_its_commit(copy: Callable[[], Path], proved: dict[str, Any]) -> None:
    folder = from_hub(copy())
    card = card_of(folder, proved, base_model=None)
    text = section(card, "Provenance")
    assert "- Source: `org/base`" in text and f"- Source's commit: `{COMMIT}`" in text
    assert "- Source's integrity: `every file has its published sha256`" in text
    digest = hashlib.sha256((folder / "nvquant_manifest.json").read_bytes()).hexdigest()
    assert f"- sha256 of nvquant\\_manifest.json: `{digest}`" in text
    for name, version in json.loads((folder / "nvquant_manifest.json").read_text())["run"]["versions"].items():
        assert f"- {name}: `{version}`" in text
    assert f"nvquant convert org/base@{COMMIT} --recipe nvfp4 --format compressed-tensors --quantizer rtn" in text
    assert f"nvquant verify {REPO} --against org/base@{COMMIT}\n" in section(card, "Check it again")
    assert "shards, by which" not in card


def test_a_source_that_was_a_folder_is_told_by_its_shards(converted: Path, proved: dict[str, Any]) -> None:
    manifest = json.loads((converted / "nvquant_manifest.json").read_text())
    for base_model in ("org/base", None):
        text = section(card_of(converted, proved, base_model=base_model), "Provenance")
        for name, shard in manifest["source"]["shards"].items():
            assert f"| `{name}` | {shard['bytes']:,} | `{shard['header_sha256']}` |" in text
        assert ("Source, as its publisher names it" in text) == (base_model is not None)
        assert ("the publisher did not name it" in text) == (base_model is None)
        assert f"nvquant convert {base_model or 'MODEL'} " in text
    assert "base_model" not in split_card(card_of(converted, proved, base_model=None))[0]


def test_the_command_is_the_one_that_makes_the_checkpoint(copy: Callable[[], Path], proved: dict[str, Any]) -> None:
    folder = from_hub(copy())
    manifest = json.loads((folder / "nvquant_manifest.json").read_text())
    text = section(card_of(folder, proved, base_model=None), "Provenance").split("```sh\n")[1].split("\n```")[0]
    words = shlex.split(text)
    assert words[:2] == ["nvquant", "convert"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--calibration"] == manifest["calibration"]["name"]
    for key, option in (("samples", "--samples"), ("sequence_length", "--sequence-length"), ("seed", "--seed")):
        assert options[option] == str(manifest["calibration"][key])
    assert (options["--device"], options["--recipe"]) == ("cpu", "nvfp4")


def test_a_distillation_is_told_with_its_gain_and_repeated_by_the_command(tiny: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    source = tiny("llama")
    record = distilled(converted_anew(source, tmp_path / "out"), source, folder).record
    document = prove(folder, None, None, lambda _done, _total, _phase: None)
    card = card_of(folder, document)
    before, after = (number(value) for value in (record.total.before, record.total.after))
    words = f"{record.tokens:,} tokens, held-out KL {before} to {after} nats (even "
    assert words in section(card, "Provenance")
    assert "--distill" not in section(card, "Provenance")  # which uses the shipped set
    assert dict(page_of(document).reproduce)["Distilled"].startswith(words)
    of_shipped_set = {**record.as_json(), "text": {**record.text.as_json(), "name": "offline"}, "is_kept": False}
    card = card_of(edit_manifest(folder, distillation={**of_shipped_set, "reason": "the kind prose lost"}), document)
    assert f"{record.tokens:,} tokens, not kept: the kind prose lost" in section(card, "Provenance")
    assert "--distill 4096" in section(card, "Provenance")


def test_another_tools_checkpoint_says_what_is_not_known(copy: Callable[[], Path], proved: dict[str, Any]) -> None:
    (folder := copy()).joinpath("nvquant_manifest.json").unlink()
    contents = {**proved["checkpoint"], "made_by": None, "recipe": None, "manifest_sha256": None}
    card = card_of(folder, {**proved, "checkpoint": contents})
    assert "It has no nvquant manifest, so there is no record of how it was made." in card
    assert section(card, "Calibration").strip() == "Not recorded."
    assert "nvquant convert" not in card and "made by" not in card and "nvquant_manifest.json" not in card
    assert "182 kB in total." in card


def test_a_licence_file_is_named(copy: Callable[[], Path], proved: dict[str, Any]) -> None:
    (folder := copy()).joinpath("LICENSE.txt").write_text("terms")
    assert "The licence of the source is included: LICENSE.txt." in card_of(folder, proved)


def test_the_same_facts_give_the_same_bytes_without_this_machines_folders(
    converted: Path, measured: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    first, second = (card_of(converted, measured, has_chart=True) for _ in range(2))
    assert first == second
    for folder in (converted, tiny("llama")):
        assert str(folder.parent) not in first
    assert "\n\n\n" not in first and "None" not in first.replace("None: weights", "")


def test_a_base_model_must_be_an_id_and_what_the_manifest_says(copy: Callable[[], Path]) -> None:
    folder = copy()
    for wrong in ("base", "org/base@main", "/data/base", "org/base/x", ""):
        with pytest.raises(InputError, match=r"is not a model's id\. Give it as org/name"):
            read_provenance(folder, wrong)
    from_hub(folder)
    assert read_provenance(folder, "org/base").commit == COMMIT
    with pytest.raises(InputError, match=r"names org/base as the source. Drop the option"):
        read_provenance(folder, "org/other")


# Texts of any kind, which the card fences and quotes.
FREE = {("recipe", "description"), *(("recipe", "quantize", 0, "modules", at) for at in range(4))}
UNREAD = {"config_sha256", "attention", "source_sha256"}
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b\n| --- |\n# title",
    "```\n<details>\n````",
    "---\nlicense: mit\n---",
    "[link](https://example.org) ![image](https://example.org/x.png) @someone",
    "{{ 7 * 7 }}{% raw %}",
    "\x00\x1b[31m \u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_out_of_a_checkpoint_becomes_markup(
    copy: Callable[[], Path], measured: dict[str, Any], text: str
) -> None:
    folder = copy()
    manifest = json.loads((folder / "nvquant_manifest.json").read_text())
    line = one_line(text)
    shard = line.replace("/", "-").replace("\\", "-")
    edit_manifest(
        folder,
        recipe={**manifest["recipe"], "description": text},
        calibration={**manifest["calibration"], "name": line},
        run={**manifest["run"], "processor": line},
        source={"integrity": line, "shards": {shard: {"bytes": 5, "header_sha256": "0" * 64}}},
    )
    contents = {**measured["checkpoint"], "name": text, "made_by": text, "recipe": text, "source": text}
    contents["groups"] = [{"name": f"{text}, NVFP4 {text}", "tensors": 1, "bytes": 9, "source_bytes": None}]
    serve = {**reports.serve(), "kernel": {"words": text, "class": text}, "attention": text}
    document = {**measured, "checkpoint": contents, "serve": serve}
    card = card_of(folder, document, base_model=None, source={"license": text, "tags": [text]})

    data, body = split_card(card.encode("utf-8", "replace").decode())
    assert data["tags"][1:] == ["nvfp4", str(measured["checkpoint"]["layout"]), "vllm", "nvquant"]
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)
    assert "<script" not in html and "<img" not in html and "example.org</a>" not in html
    assert html.count("<h1>") == 1 and html.count("<h2>") == 7
    assert html.count("<details>") == html.count("</details>") and "49" not in html.split()


@pytest.mark.parametrize("text", ["a\n```\nrm -rf ~\n```", "\x1b[31m", "a\u202eb", "../../x\n"])
def test_a_manifest_is_held_to_its_form_wherever_a_stranger_wrote_something(
    copy: Callable[[], Path], text: str
) -> None:
    folder = from_hub(copy())
    path = folder / "nvquant_manifest.json"
    manifest = json.loads(path.read_text())
    refused = 0
    for at in places(manifest):
        path.write_text(json.dumps(changed(manifest, at, text)))
        try:
            read_provenance(folder, None)
        except InputError as error:
            refused += 1
            assert "nvquant_manifest.json" in str(error) and len(str(error)) < 1000
        else:
            assert at[-1] in UNREAD or at in FREE, at
    assert refused > 40


def test_a_command_of_the_card_is_one_line_of_quoted_words(copy: Callable[[], Path], measured: dict[str, Any]) -> None:
    folder = from_hub(copy())
    manifest = json.loads((folder / "nvquant_manifest.json").read_text())
    for name in ("--trust-remote-code", "$(touch owned).jsonl", "`id`; rm -rf ~", "a'b.jsonl", "```"):
        edit_manifest(folder, calibration={**manifest["calibration"], "name": name})
        command = next(line for line in card_of(folder, measured).splitlines() if line.startswith("nvquant convert"))
        words = shlex.split(command)
        assert (f"./{name}" if name.startswith("-") else name) in words


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each text of a document."""
    for at, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from places(item, (*path, at))
        elif isinstance(item, str):
            yield (*path, at)


def changed(document: dict[str, Any], at: tuple[Any, ...], text: str) -> dict[str, Any]:
    """A copy of a document with another text at that place."""
    whole: dict[str, Any] = json.loads(json.dumps(document))
    inner: Any = whole
    for step in at[:-1]:
        inner = inner[step]
    inner[at[-1]] = text
    return whole
