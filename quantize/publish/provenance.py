"""The provenance of a checkpoint from its manifest, for people: source, versions, calibration, command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..calibrate.specs import CalibrationSpec, load_spec, shipped_folder, shipped_names
from ..checkpoint.hub.repository import hub_name
from ..checkpoint.source import read_json
from ..errors import InputError
from ..quoting import argument, shell
from ..report.distilled import distillation_words
from ..report.document import at, rows
from ..report.parts import Column, Table
from ..report.words import ABSENT, number
from ..stream.manifest import MANIFEST_NAME, Manifest, held_to

DISTILLED_SET = "offline"  # of `convert --distill`
HUB = "https://huggingface.co"
FRAMINGS = {
    "chat": "conversations in the model's own chat template",
    "prose": "text packed to equal lengths",
    "ids": "token ids as given",
}


@dataclass(frozen=True)
class Provenance:
    """The origin of a checkpoint.

    Attributes:
        form: nvquant_manifest.json in its form. None where there is none.
        manifest: its JSON. Empty where there is none.
        base_model: the source's id on the Hub. None where it is unknown.
        commit: of the source. None for a local folder.
    """

    form: Manifest | None
    manifest: Mapping[str, Any]
    base_model: str | None
    commit: str | None

    @property
    def source(self) -> str:
        """The source as a command names it, or a placeholder where it is unknown."""
        if self.base_model is None:
            return "MODEL"
        return self.base_model if self.commit is None else f"{self.base_model}@{self.commit}"

    @property
    def source_file_bytes(self) -> int | None:
        """The size of the source's weight files. None where it is unknown."""
        shards = self.form.source.shards.values() if self.form is not None else ()
        sizes = [shard.bytes for shard in shards if shard.bytes is not None]
        return sum(sizes) if sizes and len(sizes) == len(shards) else None

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs were observed."""
        return self.form is not None and self.form.calibration is not None


def read_provenance(folder: Path, base_model: str | None) -> Provenance:
    """Read a checkpoint's manifest, with the user's name of the source where the manifest has none.

    Args:
        base_model: of `--base-model`.
    Raises:
        InputError: `base_model` is no id or differs from the manifest, or the manifest is not as nvquant writes it.
    """
    name = None if base_model is None else hub_name(base_model)
    if base_model is not None and (name is None or name[1] is not None):
        raise InputError(
            f"--base-model {base_model} is not a model's id", where="--base-model", hint="Give it as org/name"
        )
    path = folder / MANIFEST_NAME
    manifest = read_json(path, "nvquant writes one") if path.is_file() else {}
    form = held_to(Manifest, manifest, str(path)) if manifest or path.is_file() else None
    known = None if form is None else form.source.hub
    if known is None:
        return Provenance(form, manifest, base_model, None)
    if base_model is not None and base_model != known.id:
        raise InputError(
            f"{MANIFEST_NAME} names {known.id} as the source",
            where=f"--base-model {base_model}",
            hint="Drop the option",
        )
    return Provenance(form, manifest, known.id, known.commit)


def _fold_by_default(form: Manifest) -> str | None:
    """`Manifest.fold` of a run without --fold."""
    chosen = form.recipe.fold
    if chosen is not None:
        return chosen if chosen == "auto" else None
    from ..quantizers import QUANTIZERS

    quantizer = QUANTIZERS.get(form.quantizer)
    return "auto" if quantizer is not None and quantizer.folds and form.calibration is not None else None


def convert_command(provenance: Provenance) -> str | None:
    """The command that makes this checkpoint from its source, as far as the manifest contains it. None without one."""
    form = provenance.form
    if form is None:
        return None
    words = ["nvquant", "convert", provenance.source, "--recipe", form.recipe.name, "--format", form.format]
    if form.quantizer != form.recipe.quantizer:
        words += ["--quantizer", form.quantizer]
    if form.fold != _fold_by_default(form):
        words += ["--fold", form.fold or "off"]
    if form.calibration is not None:
        words += ["--calibration", argument(form.calibration.name)]
        words += ["--samples", str(form.calibration.samples)]
        for option, value in (
            ("--sequence-length", form.calibration.sequence_length),
            ("--seed", form.calibration.seed),
        ):
            words += [] if value is None else [option, str(value)]
    if form.distillation is not None and form.distillation.text.name == DISTILLED_SET:
        text = form.distillation.text
        words += ["--distill", str(text.samples * (text.sequence_length or 1))]
    if form.run.batch_size not in (None, 1):
        words += ["--batch-size", str(form.run.batch_size)]
    if form.run.device in ("cpu", "cuda"):
        words += ["--device", form.run.device]
    return shell(words)


def source_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """The facts about the source, as name and value."""
    if provenance.base_model is not None:
        is_recorded = provenance.commit is not None
        yield "Source" if is_recorded else "Source, as its publisher names it", provenance.base_model
    if provenance.commit is not None:
        yield "Source's commit", provenance.commit
    form = provenance.form
    if form is not None and form.source.decoded is not None:
        yield "Source's form", f"{form.source.decoded}, decoded before quantization"
    if form is not None and form.source.integrity is not None:
        yield "Source's integrity", form.source.integrity


def cast_sentence(provenance: Provenance) -> str:
    """Words on the matrices that keep the codes of a quantized source. Empty where there are none."""
    groups = () if provenance.form is None else provenance.form.groups.values()
    casts = [(len(group.record.members), group.record.cast) for group in groups if group.record.cast is not None]
    if not casts:
        return ""
    forms = " and ".join(sorted({cast.source for _, cast in casts}))
    rounded, blocks = (sum(getattr(cast, key) for _, cast in casts) for key in ("rounded", "blocks"))
    lost = f"{number(rounded)} of their {number(blocks)} blocks lost bits" if rounded else "no value of them changed"
    return f"{number(sum(members for members, _ in casts))} matrices keep the {forms} codes of the source, and {lost}."


def source_shards(provenance: Provenance) -> Table | None:
    """A table of the shards of a local folder. None for a source on the Hub, which its commit identifies."""
    if provenance.commit is not None or provenance.form is None or not provenance.form.source.shards:
        return None
    lines = [
        (name, number(shard.bytes), shard.header_sha256 or ABSENT)
        for name, shard in provenance.form.source.shards.items()
    ]
    columns = (Column("shard", "code"), Column("bytes"), Column("sha256 of its header", "code"))
    return Table("Shards of the source", columns, tuple(lines))


def run_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """The versions and settings of the run, as name and value."""
    form = provenance.form
    if form is None:
        return
    yield "nvquant", form.nvquant
    yield from form.run.versions.items()
    yield "Computed on", ", ".join(part for part in (form.run.device, form.run.processor, form.run.dtype) if part)


def distillation_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """The distillation, as name and value."""
    words = distillation_words(provenance.manifest.get("distillation"))
    if words is not None:
        yield "Distillation of block scales and norms", words


def calibration_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """The facts about the calibration, as name and value."""
    found = None if provenance.form is None else provenance.form.calibration
    if found is None:
        return
    yield "Set", found.name
    tokens = f"{number(found.samples)} with {number(found.tokens)} tokens"
    yield "Samples", f"{tokens}, {FRAMINGS.get(found.framing, found.framing)}"
    yield "sha256 of the token ids", found.sha256


def calibration_licence(provenance: Provenance) -> str:
    """A sentence in Markdown on the calibration set and its licence."""
    assert provenance.form is not None and provenance.form.calibration is not None
    name = provenance.form.calibration.name
    if name in shipped_names():
        spec = load_spec(shipped_folder() / f"{name}.yaml")
        return f"{spec.description} Licence: {spec.licence}.{_origins(spec)}"
    known = hub_name(name)
    if known is not None:
        revision = f"/tree/{known[1]}" if known[1] else ""
        where = f"[{known[0]}]({HUB}/datasets/{known[0]}{revision})"
        return f"The Hub data set {where}. See its page for the licence, which is not recorded here."
    return "A file supplied by the maker of this checkpoint. Its origin and licence are not recorded."


def nvquant_page() -> str:
    """Address of nvquant's repository, from the package's own metadata."""
    urls = dict(line.split(", ", 1) for line in metadata.metadata("nvquant").get_all("Project-URL") or ())
    return str(urls.get("Repository", ""))


def source_bytes(document: Mapping[str, Any], provenance: Provenance) -> int | None:
    """The size of the source: of its tensors where they were read, else of its weight files."""
    found = at(document, "checkpoint", "source_bytes")
    return found if isinstance(found, int) else provenance.source_file_bytes


def group_names(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Groups of tensors in `NVFP4`, in `FP8` and not quantized (an empty text), largest first, as `MLP, NVFP4 W4A4`."""
    found: dict[str, list[str]] = {"NVFP4": [], "FP8": [], "": []}
    for group in rows(at(document, "checkpoint", "groups")):
        name = str(group.get("name"))
        scheme = name.partition(", ")[2].partition(" ")[0]
        found[scheme if scheme in found else ""].append(name)
    return found


def _origins(spec: CalibrationSpec) -> str:
    links = [
        f"[{part.hub}]({HUB}/datasets/{part.hub}{f'/tree/{part.revision}' if part.revision else ''})"
        for part in spec.parts
        if part.hub is not None
    ]
    if any(part.bundled for part in spec.parts):
        links.append(f"[ORIGINS.md]({nvquant_page()}/blob/main/calibration/ORIGINS.md)")
    return f" Origins: {', '.join(dict.fromkeys(links))}."
