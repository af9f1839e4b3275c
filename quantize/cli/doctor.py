"""`nvquant doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import debug_option, output_option
from .output import Output

LACKS = 3


@click.command("doctor")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Check the memory for requests of up to this length.",
    show_default="8192",
)
@click.option(
    "--kv-cache-dtype",
    default="auto",
    show_default=True,
    metavar="DTYPE",
    help="Assume this dtype of the server's KV cache, such as fp8.",
)
@click.option("--vllm", metavar="COMMAND", help="Inspect this vLLM.", show_default="the one that verify would start")
@output_option
@debug_option
def command(checkpoint: Path | None, context: int | None, kv_cache_dtype: str, vllm: str | None, out: Output) -> int:
    """Report how this machine runs NVFP4, whether CHECKPOINT fits, and everything that is missing.

    This command starts, downloads and loads nothing. The exit code is 3 if something necessary is missing.
    """
    from ..bench.doctor import Doctor
    from ..bench.doctor import as_json as document
    from ..bench.subject import open_subject

    subject = None if checkpoint is None else open_subject(checkpoint)
    doctor = Doctor(subject, context, vllm, kv_cache_dtype)
    findings = []
    for finding in doctor.run():
        findings.append(finding)
        out.tell(f"{finding.status:<8} {finding.name:<21} {finding.words}")
        if finding.hint:
            out.tell(f"{'':<30} {finding.hint}.")
    lacking = [finding.name for finding in findings if finding.status == "lacks"]
    missing = ", ".join(dict.fromkeys(lacking))
    out.report(lambda: document(doctor, findings), lambda: out.tell(f"Missing: {missing}.") if missing else None)
    return LACKS if lacking else 0
