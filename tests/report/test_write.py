"""What the files of a report say, in all forms, whatever the document holds."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from nvquant.report import write_report
from nvquant.verify.report import Check, Finding, Report
from support import reports

VOID = {"meta", "link", "br", "img", "hr"}


class _Page(HTMLParser):
    """Tags that are closed in order, and the text of the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(report: Report, folder: Path, bench: dict[str, Any] | None = None) -> tuple[_Page, str, dict[str, Any]]:
    html, markdown, document, junit = write_report(report, folder, bench)
    assert [path.name for path in (html, markdown, document, junit)] == [
        "report.html",
        "report.md",
        "report.json",
        "junit.xml",
    ]
    return _Page(html.read_text("utf-8")), markdown.read_text("utf-8"), json.loads(document.read_text("utf-8"))


def test_a_good_report_says_the_numbers_in_the_promised_order(tmp_path: Path) -> None:
    page, markdown, _ = written(reports.good(), tmp_path)
    for text in (page.text, markdown.replace("\\", "").replace("**", "")):
        places = [
            text.index(words)
            for words in (
                "Passed",
                "All 29 checks passed.",
                "0.0831 nats",
                "89.2 %",
                "0.0831 ± 0.0033",
                "floor: the source with every module",
                "layer 20: 0.250 (4.1 times the median)",
                "Reduced from 62.5 GB to 32.6 GB.",
                "The capital of France is",
                "Paris. The city lies",
                "fused_groups",
                "model.language_model.layers.1.mlp.down_proj",
                "model.language_model.layers.21.mlp.gate_up_proj",
                "nvquant verify gemma-4-31b-nvfp4 --against gemma-4-31b --stage structure --stage numerics",
                "cuda, bfloat16",
            )
        ]
        assert places == sorted(places)


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_every_kind_of_text_has_a_row_with_its_loss_under_each_arithmetic(tmp_path: Path, form: str) -> None:
    page, markdown, document = written(reports.good(), tmp_path)
    text = page.text if form == "html" else markdown.replace("| ", "").replace(" |", "")
    for name, loss in document["numerics"]["arithmetics"]["w4a4"]["kinds"].items():
        other = document["numerics"]["arithmetics"]["weight_only"]["kinds"][name]
        cells = [
            f"{part['kl']['mean']:.4f} ± {part['kl']['standard_error']:.4f} {part['top1']['agreement'] * 100:.1f} %"
            f" {part['relative']:.2f}"
            for part in (loss, other)
        ]
        assert f"{name} 2,555 {' '.join(cells)}" in text
    assert "Loss by kind of text" in text and "A kind with 1 lost as much as the others." in text
    assert "Calibrate on more text of this kind" not in text


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_a_kind_that_lost_more_than_the_others_is_named(tmp_path: Path, form: str) -> None:
    page, markdown, _ = written(reports.failing(), tmp_path)
    text = page.text if form == "html" else markdown
    assert (
        "Text of the kind code lost 1.90 ± 0.10 times as much as the other kinds in weight-only (KL 0.0285 nats, "
        "compared by the floor of each kind). Calibrate on more text of this kind."
    ) in text


def test_a_document_without_kinds_has_no_table_of_them(tmp_path: Path) -> None:
    report = reports.good(3)
    assert report.numerics is not None
    for one in report.numerics["arithmetics"].values():
        del one["kinds"]
    page, markdown, _ = written(report, tmp_path)
    assert "kind of text" not in page.text and "kind of text" not in markdown


def test_a_failed_report_begins_with_what_failed_and_why(tmp_path: Path) -> None:
    page, markdown, document = written(reports.failing(), tmp_path)
    assert not document["passed"]
    for text in (page.text, markdown):
        head = text[: text.index("KL divergence")]
        assert "Failed" in head and "4 of 30 checks failed" in head
        assert "model.language_model.layers.0.mlp.gate_proj.weight_scale: NaN in block 17" in head
        assert "and 30 more" in head and "mean KL is not a number, layer 31 first; the limit is 0.2" in head
        assert "layer 31: not a number" in text
    checks = page.text[page.text.index("Checks") :]
    assert checks.index("answers") < checks.index("headers")


def test_what_was_not_run_is_said_beside_the_verdict(tmp_path: Path) -> None:
    page, markdown, document = written(reports.bare(), tmp_path)
    assert document["numerics"] is None and document["serve"] is None and document["bench"] is None
    assert "All 3 checks passed. Not part of this verdict: numbers not measured, not served." in page.text
    assert "numbers not measured" in markdown and "not served" in markdown
    for heading in ("Accuracy", "Layers", "Size", "Served", "Speed", "Matrices and inputs"):
        assert f"{heading}\n" not in markdown and heading not in page.words


def test_a_report_without_checks_is_not_called_passed(tmp_path: Path) -> None:
    page, markdown, _ = written(Report(()), tmp_path)
    assert "Nothing was checked" in page.text and "Nothing was checked" in markdown
    assert "Passed" not in page.text and "Passed" not in markdown


def test_many_failed_checks_are_counted(tmp_path: Path) -> None:
    checks = tuple(Check("structure", f"check_{at}", Finding("one", [f"fault {at}"])) for at in range(9))
    page, markdown, _ = written(Report(checks), tmp_path)
    assert "and 4 more failed checks" in page.text and "and 4 more failed checks" in markdown


@pytest.mark.parametrize("layers", [1, 2, 3, 60, 126])
def test_any_number_of_layers_is_drawn(tmp_path: Path, layers: int) -> None:
    page, _, document = written(reports.good(layers), tmp_path)
    assert len(document["numerics"]["layers"]) == layers
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 6  # own, accumulated and sizes, each for two widths
    points = [attrs for tag, attrs in page.tags if tag == "circle"]
    assert len(points) == layers * 2 * 2 * 2  # two arithmetics, two charts, two widths
    for attrs in points:
        assert 0 <= float(attrs["cx"] or "nan") <= 940 and 0 <= float(attrs["cy"] or "nan") <= 280


def test_values_that_are_no_numbers_are_said_and_are_valid_json(tmp_path: Path) -> None:
    _, markdown, document = written(reports.failing(), tmp_path)
    kl = document["numerics"]["arithmetics"]["w4a4"]["kl"]
    assert kl == {"mean": "NaN", "median": 2.31, "p99": "Infinity", "standard_error": None}
    assert "not a number" in markdown and "infinite" in markdown
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"\b(nan|None|inf)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.S))


@pytest.mark.parametrize(
    "missing", ["arithmetics", "layers", "matrices", "inputs", "text", "thresholds", "perplexity_source"]
)
@pytest.mark.parametrize("value", [None, "gone"])
def test_missing_parts_of_the_numbers_are_left_out(tmp_path: Path, missing: str, value: str | None) -> None:
    whole = reports.good()
    numerics: dict[str, Any] = {**(whole.numerics or {}), missing: value}
    if value:
        del numerics[missing]
    written(Report(whole.checks, whole.checkpoint, numerics, whole.serve), tmp_path)


@pytest.mark.parametrize("missing", ["server", "kernel", "memory", "answers", "logprobs", "hints"])
def test_missing_parts_of_serving_are_left_out(tmp_path: Path, missing: str) -> None:
    whole = reports.good()
    serve = {**(whole.serve or {}), missing: None}
    page, _, _ = written(Report(whole.checks, whole.checkpoint, whole.numerics, serve), tmp_path)
    assert "Served" in page.words


def test_every_single_value_may_be_missing(tmp_path: Path) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        return [emptied(item) for item in value] if isinstance(value, list) else None

    whole = reports.good(3)
    for name in ("checkpoint", "numerics", "serve"):
        parts = {key: getattr(whole, key) for key in ("checkpoint", "numerics", "serve")}
        parts[name] = emptied(parts[name])
        page, _, _ = written(Report(whole.checks, **parts), tmp_path / name)
        assert "None" not in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title><b>",
    "{{ 7 * 7 }}{% raw %}",
    "a | b\n| --- | ---\n# title",
    "```\n<details>\n````",
    "[link](https://example.org) ![image](https://example.org/x.png) @someone #12 https://example.org",
    "\x00\x07\x1b[31mred \u202egnp.exe \ud800 \ufffe",
    "]]> &amp; &#x3c;script&#x3e; \" ' `",
    "日本語 العربية 🙂 ▁the",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_strings_of_a_checkpoint_cannot_become_markup(tmp_path: Path, text: str) -> None:
    whole = reports.good(3)
    serve: Any = {**(whole.serve or {})}
    serve["answers"] = [{"prompt": text, "endpoint": text, "text": text, "finish_reason": text, "fault": text}]
    serve["hints"], serve["kernel"] = [text], {"words": text, "class": text}
    numerics: Any = {**(whole.numerics or {})}
    numerics["matrices"] = [{**reports.matrix(0, text), "scheme": text}, reports.matrix(1, "up_proj")]
    numerics["text"] = {**numerics["text"], "name": text, "framing": text}
    checkpoint = {
        **whole.checkpoint,
        "name": text,
        "recipe": text,
        "groups": [{"name": text, "tensors": 1, "bytes": 9}],
    }
    checks = (Check(text, text, Finding(text, [text])), *whole.checks)
    page, markdown, document = written(Report(checks, checkpoint, numerics, serve), tmp_path)

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "b", "iframe", "object"}
    assert {attrs.get("href") for tag, attrs in page.tags if tag in ("a", "link")} <= {"data:,", "#checks"}
    assert "49" not in page.text.split()
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown)
    allowed = {"h2", "h3", "p", "ul", "li", "strong", "code", "pre", "details", "summary"}
    assert {tag for tag, _ in _Page(html).tags} <= allowed | {"table", "thead", "tbody", "tr", "th", "td"}
    assert document["checkpoint"]["name"] == text.encode("utf-8", "replace").decode() or "\ud800" in text


def test_the_same_report_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from support import reports; from nvquant.report import write_report\n"
        "write_report(reports.good(), Path(sys.argv[2])); write_report(reports.failing(), Path(sys.argv[2]) / 'f')"
    )
    for at, zone in enumerate(("UTC", "Asia/Tokyo")):
        work = tmp_path / f"place{at}"
        work.mkdir()
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": str(at), "LC_ALL": "C", "COLUMNS": str(80 + at)}
        tests = str(Path(__file__).parents[1])
        subprocess.run([sys.executable, "-c", code, tests, str(work / "out")], cwd=work, env=environment, check=True)
    first, second = (sorted((tmp_path / f"place{at}" / "out").rglob("*.*")) for at in range(2))
    assert len(first) == 8
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_no_folder_host_or_port_is_published(tmp_path: Path) -> None:
    whole = reports.good()
    server = {
        "vllm": "0.32.0",
        "command": "X=1 /home/ada/bin/vllm serve --model=/data/m --host=box.lan --port=43117 --name m nv-43117",
        "url": "http://box.lan:8000",
    }
    write_report(
        Report(whole.checks, whole.checkpoint, whole.numerics, {**(whole.serve or {}), "server": server}), tmp_path
    )
    for path in tmp_path.iterdir():
        text = path.read_text("utf-8")
        for secret in ("/home", "ada", "/data", "43117", "box.lan", str(tmp_path)):
            assert secret not in text, (path.name, secret)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["serve"]["server"]["command"] == (
        "X=1 vllm serve --model=m --host=… --port=… --name m nv-…"
    )


def test_a_benchmark_becomes_tables(tmp_path: Path) -> None:
    bench = reports.bench()
    bench["points"][1]["itl_p99_ms"] = math.nan
    page, markdown, document = written(reports.bare(), tmp_path, bench)
    for text in (page.text, markdown.replace("\\", "")):
        for words in ("decode, tok/s", "74.8", "1,721", "50 %", "33,950", "not a number", "weight-only, by Marlin"):
            assert words in text
        assert "gemma-4-31b, context 65,536, 8 users: failed: CUDA out of memory" in text
        assert "the KV cache holds 1.5 of 8 users at a time" in text
        assert "NVIDIA H200 (151 GB)" in text and "4.80 TB/s" in text
    assert document["bench"]["points"][1]["itl_p99_ms"] == "NaN"
    assert document["bench"]["servers"][0]["command"] == "vllm serve m --port …"


@pytest.mark.parametrize("bench", [{}, {"points": []}, {"points": None}, {"points": [{}]}, {"points": [{"users": 1}]}])
def test_an_empty_benchmark_is_no_trouble(tmp_path: Path, bench: dict[str, Any]) -> None:
    page, _, _ = written(reports.bare(), tmp_path, bench)
    assert ("Speed" in page.words) == ("users" in str(bench))


def test_more_groups_than_colours_are_still_told(tmp_path: Path) -> None:
    groups = [{"name": f"group {at}", "tensors": 1, "bytes": at * 10**6, "source_bytes": None} for at in range(14)]
    report = Report(reports.bare().checks, {"name": "m", "bytes": 91 * 10**6, "groups": groups})
    page, markdown, _ = written(report, tmp_path)
    assert all(f"group {at}" in page.text and f"group {at}" in markdown for at in range(14))
    assert "91.0 MB in total." in page.text
