"""The model card: everything that a reader of the repository's page should know, from the manifest and measurements.
It names the numbers that were not measured, and invents none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.sidefiles import side_files
from ..quoting import code, fenced, one_line, shell
from ..quoting import markdown as escaped
from ..recipe.kept import kept_words
from ..report.document import at, rows
from ..report.markdown import table
from ..report.measured import known_shares
from ..report.page import page_of
from ..report.parts import Page, Stage
from ..report.words import size
from ..stream.manifest import MANIFEST_NAME
from .files import CHART_NAME
from .frontmatter import card_data
from .provenance import (
    Provenance,
    calibration_facts,
    calibration_licence,
    cast_sentence,
    convert_command,
    distillation_facts,
    group_names,
    nvquant_page,
    run_facts,
    source_bytes,
    source_facts,
    source_shards,
)
from .served_by import cpu_command, faults_table, hardware_table, serve_command, versions_sentence
from .target import LEGAL, MARKER


@dataclass(frozen=True)
class CardFacts:
    """The facts behind a card.

    Attributes:
        repo: its repository.
        folder: of the checkpoint.
        document: the results of verify, fit to publish (`report.document.document`).
        source_data: the metadata of the source's own card. Empty where there is none.
        has_chart: whether the chart lies beside it.
    """

    repo: str
    folder: Path
    document: Mapping[str, Any]
    provenance: Provenance
    source_data: Mapping[str, Any]
    has_chart: bool = False


def render_card(facts: CardFacts) -> str:
    """Render the README.md. The same facts give the same bytes."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )  # escaped by the filters: this is Markdown
    environment.filters |= {"md": _markdown, "code": code, "table": table, "fenced": fenced}
    text = resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8")
    return _without_gaps(environment.from_string(text).render(_context(facts)))


def _context(facts: CardFacts) -> dict[str, Any]:
    page = page_of(facts.document)
    return {
        "data": card_data(facts.source_data, facts.provenance.base_model, _layout(facts)),
        "marker": MARKER,
        "title": facts.repo.rpartition("/")[2],
        "what": _what(facts),
        "verdict": page.verdict,
        "failures": page.verdict.failures,
        "stages": [_stage(stage) for stage in page.verdict.stages],
        **_measured(facts, page),
        **_serving(facts, page),
        **_making(facts),
        **_checking(facts),
    }


def _measured(facts: CardFacts, page: Page) -> dict[str, Any]:
    before, after = source_bytes(facts.document, facts.provenance), at(facts.document, "checkpoint", "bytes")
    assert page.sizes is not None  # every checkpoint has tensors
    return {
        "accuracy": page.accuracy,
        "accuracy_notes": page.accuracy_notes,
        "kinds": page.kinds,
        "kind_warnings": page.kind_warnings,
        "worst": page.layers.worst if page.layers else (),
        "chart": CHART_NAME if facts.has_chart else None,
        "size_sentence": f"Reduced from {size(before)} to {size(after)}." if before else f"{size(after)} in total.",
        "sizes": page.sizes.table,
    }


def _serving(facts: CardFacts, page: Page) -> dict[str, Any]:
    kv_cache = at(facts.provenance.manifest, "recipe", "kv_cache", "dtype")
    return {
        "serve_command": serve_command(facts.repo),
        "cpu_command": cpu_command(facts.repo),
        "vllm_versions": versions_sentence(),
        "hardware": hardware_table(),
        "plugin_link": f"[integrations/vllm_cpu]({nvquant_page()}/tree/main/integrations/vllm_cpu)",
        "served": page.served.facts if page.served else (),
        "faults": faults_table(facts.folder, "fp8" if str(kv_cache).startswith("fp8") else "auto"),
    }


def _making(facts: CardFacts) -> dict[str, Any]:
    import yaml

    provenance, manifest = facts.provenance, facts.provenance.manifest
    recipe = at(manifest, "recipe")
    groups = group_names(facts.document)
    listed = {"In 4 bits": groups["NVFP4"], "In 8 bits": groups["FP8"], "As in the source": groups[""]}
    return {
        "quantized_sentence": " ".join(
            [*(f"{where}: {_listed(names)}." for where, names in listed.items() if names), *_kept(facts)]
        ),
        "cast_sentence": cast_sentence(provenance),
        "has_fp8": bool(groups["FP8"]),
        "cache_sentence": _cache_sentence(facts),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip() if recipe else None,
        "recipe_sentence": (
            f"Recipe {at(recipe, 'name')}, scales by the quantizer {at(manifest, 'quantizer')}"
            f"{' after exact folds' if at(manifest, 'fold') else ''}, in the layout of {_layout(facts)}. "
            f"{at(recipe, 'description') or ''}"
        ),
        "calibration": list(calibration_facts(provenance)),
        "calibration_licence": calibration_licence(provenance) if provenance.is_calibrated else "",
        "command": convert_command(provenance),
    }


def _kept(facts: CardFacts) -> list[str]:
    """A sentence about matrices of the decoder that stay as in the source, if there are any."""
    words = kept_words(known_shares(at(facts.document, "checkpoint") or {}))
    return [] if words is None else [words]


def _checking(facts: CardFacts) -> dict[str, Any]:
    manifest = facts.folder / MANIFEST_NAME
    made = [*source_facts(facts.provenance), *run_facts(facts.provenance), *distillation_facts(facts.provenance)]
    if manifest.is_file():
        made.append((f"sha256 of {MANIFEST_NAME}", hashlib.sha256(manifest.read_bytes()).hexdigest()))
    made.append(("Verified and published with nvquant", __version__))
    return {
        "provenance": [(name, one_line(value)) for name, value in made],
        "source_unknown": facts.provenance.base_model is None,
        "source_shards": source_shards(facts.provenance),
        "has_manifest": manifest.is_file(),
        "nvquant_page": nvquant_page(),
        "verify_command": "\n".join(
            [
                shell(["nvquant", "verify", facts.repo]),
                shell(["nvquant", "verify", facts.repo, "--against", facts.provenance.source]),
            ]
        ),
        "licence_files": [
            name for name in side_files(facts.folder) if any(fnmatch(name, pattern) for pattern in LEGAL)
        ],
    }


def _what(facts: CardFacts) -> str:
    """One sentence: what this is."""
    base = facts.provenance.base_model
    name = f"[{base}](https://huggingface.co/{base})" if base else "A model"
    groups, forms = group_names(facts.document), {"NVFP4": "4-bit floating point", "FP8": "8-bit floating point"}
    parts = ", and ".join(
        f"{' and '.join(dict.fromkeys(name.partition(',')[0] for name in groups[scheme]))} in {scheme}, {form}"
        for scheme, form in forms.items()
        if groups[scheme]
    )
    made_by = at(facts.document, "checkpoint", "made_by")
    by = f", made by {one_line(made_by)}" if made_by else ""
    return f"{name} with {escaped(f'{one_line(parts)}, for vLLM{by}')}."


def _cache_sentence(facts: CardFacts) -> str | None:
    """What is known of keys and values where the checkpoint requires an FP8 KV cache."""
    checks = {str(check.get("name")): str(check.get("looked_at")) for check in rows(at(facts.document, "checks"))}
    scheme, _, known = checks.get("kv_cache", "").partition("; ")
    if not scheme.startswith("FP8"):
        return None
    scales = "unit scales" if scheme.endswith(" 0 scales") else "stored scales"
    words = f"The KV cache is FP8 with {scales}, so it stores magnitudes up to 448 times the scale."
    return f"{words} {known.capitalize()}."


def _stage(stage: Stage) -> str:
    return stage.words if stage.state == "absent" else f"{stage.name}: {stage.words}"


def _layout(facts: CardFacts) -> str:
    return str(at(facts.document, "checkpoint", "layout"))


def _listed(names: list[str]) -> str:
    """`MLP, NVFP4 W4A4` as `MLP (NVFP4 W4A4)`."""
    parts = [name.partition(", ") for name in names]
    return ", ".join(f"{name} ({scheme})" for name, _, scheme in parts) or "nothing"


def _markdown(text: object) -> str:
    return escaped(one_line(text))


def _without_gaps(text: str) -> str:
    """The page without the double blank lines that conditions leave."""
    head, fence, body = text.partition(MARKER)
    lines: list[str] = []
    for line in body.split("\n"):
        if line.strip() or not lines or lines[-1].strip():
            lines.append(line.rstrip())
    return f"{head}{fence}\n" + "\n".join(lines).rstrip() + "\n"
