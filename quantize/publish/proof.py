"""The verification before a push: the stage structure always, numbers and serving where they were requested or known
from an earlier run of the same checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.source import Checkpoint, read_json
from ..errors import InputError
from ..quoting import argument, shell
from ..report.document import STAGES, at, document, publishable, stages_run
from ..report.measured import sizes_of
from ..report.write import refuse_unreadable
from ..verify.contents import checkpoint_identity
from ..verify.numerics.stage import NumericsOptions
from ..verify.run import Stage, Verification, VerifyOptions
from ..verify.threads import Progress

_KEYS = {"stage", "name", "passed", "detail", "looked_at", "faults"}  # of a check


def prove(
    folder: Path,
    source: Checkpoint | None,
    earlier: Mapping[str, Any] | None,
    progress: Progress,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run the checks that a push requires.

    Args:
        source: the model that it was made from. With it, numbers are measured too, unless `earlier` has them.
        earlier: a document of `read_earlier`, whose numbers, server and checks are reused.
        device: torch's name, for the numbers.
    Returns:
        The document of `verify --json`, fit to publish.
    Raises:
        InputError: no checkpoint, or an error of a stage.
    """
    known = [] if earlier is None else [stage for stage in stages_run(earlier) if stage != "structure"]
    stages: list[Stage] = ["structure"]
    if source is not None and "numerics" not in known:
        stages.append("numerics")
    run = Verification(folder, source, VerifyOptions(stages, NumericsOptions(device=device)), progress)
    for _ in run.run():
        pass
    made = document(run.report())
    whole = made if earlier is None else _joined(made, earlier, known)
    return without_folders(whole, [folder, *([source.folder] if source else [])])


def read_earlier(path: Path, folder: Path) -> dict[str, Any]:
    """Read the results of an earlier `nvquant verify --json` of this very checkpoint.

    Raises:
        InputError: the file is no such document, does not identify the checkpoint's bytes, or belongs to another one.
    """
    found = read_json(path, "`nvquant verify --json` writes one", is_named=True, way_out="write it again")
    of_checkpoint = found.get("checkpoint")
    if not _is_document(found) or not isinstance(of_checkpoint, Mapping):
        raise InputError(
            f"{path} is not a document of `nvquant verify --json`",
            where=path,
            hint="Give such a file with --verify-json",
        )
    stated, actual = {key: of_checkpoint.get(key) for key in checkpoint_identity(folder)}, checkpoint_identity(folder)
    if actual["manifest_sha256"] is None:
        raise InputError(
            f"{folder} has no manifest of nvquant, so {path} cannot be matched to its bytes",
            where=folder,
            hint="Drop --verify-json, and measure with --against MODEL",
        )
    if stated["manifest_sha256"] is None:
        raise InputError(
            f"{path} does not identify the bytes it describes",
            where=path,
            hint="Write it again with `nvquant verify --json`",
        )
    if stated != actual:
        raise InputError(
            f"{path} belongs to another checkpoint ({of_checkpoint.get('name')}, or an earlier state of it)",
            where=path,
            hint=f"Write it again with `{shell(['nvquant', 'verify', argument(folder), '--json'])}`",
        )
    whole = {"numerics": None, "serve": None, "bench": None, **found}
    refuse_unreadable(whole, path, "nvquant verify --json")
    return publishable(whole)


def failed_checks(found: Mapping[str, Any]) -> list[str]:
    """Names of the checks that failed."""
    return [str(check["name"]) for check in found["checks"] if not check["passed"]]


def without_folders(found: dict[str, Any], folders: list[Path]) -> dict[str, Any]:
    """The document with these folders, and the user's own, named by their last part alone."""
    paths = {str(path): folder.resolve().name for folder in folders for path in (folder.absolute(), folder.resolve())}
    names = {**paths, str(Path.home()): "~"}

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        if isinstance(value, str):
            for path in sorted(names, key=len, reverse=True):
                value = value.replace(path, names[path])
        return value

    whole: dict[str, Any] = cleaned(found)
    return whole


def _is_document(found: Mapping[str, Any]) -> bool:
    """Whether a document has the form that verify writes, as far as anything relies on it."""
    checks = found.get("checks")
    return (
        isinstance(checks, list)
        and all(isinstance(check, dict) and set(check) >= _KEYS and _is_check(check) for check in checks)
        and all(isinstance(found.get(key), (dict, type(None))) for key in ("numerics", "serve", "bench"))
    )


def _is_check(check: Mapping[str, Any]) -> bool:
    faults = check["faults"]
    return (
        check["stage"] in STAGES
        and all(isinstance(check[key], str) for key in ("name", "detail", "looked_at"))
        and isinstance(check["passed"], bool)
        and isinstance(faults, list)
        and all(isinstance(fault, str) for fault in faults)
    )


def _joined(made: dict[str, Any], earlier: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The new proof with the numbers and the checks of an earlier one."""
    checks = [*made["checks"], *(check for check in earlier["checks"] if check.get("stage") in known)]
    contents = made["checkpoint"]
    # Told by the earlier run, which had the source.
    if at(contents, "source_bytes") is None and sizes_of(earlier["checkpoint"]) is not None:
        contents = {**contents, **{key: earlier["checkpoint"].get(key) for key in ("source", "source_bytes", "groups")}}
    return {
        **made,
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
        "checkpoint": contents,
        **{stage: earlier.get(stage) for stage in known},
        "bench": earlier["bench"],
    }
