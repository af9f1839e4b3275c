"""A program named nvidia-smi that prints what the real one prints, on machines without a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

RECORDED_H100 = (Path(__file__).parents[1] / "data" / "bench" / "nvidia_smi_h100.csv").read_text().strip()
# What nvidia-smi says, with exit code 9, where the driver does not run.
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def row(index: int, name: str, capability: str, total: str, free: str, driver: str = "580.159.04") -> str:
    """A line of the query, in the form of the recorded one."""
    return f"{index}, GPU-{index:08x}-e2e5-8676-5fbb-23eba0a706ac, {name}, {capability}, {total}, {free}, {driver}"


RTX_5090 = row(0, "NVIDIA GeForce RTX 5090", "12.0", "32607", "32105")
RTX_PRO_6000 = row(0, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", "97887", "97001")


def put_nvidia_smi(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: Sequence[str], used: Sequence[str] = (), code: int = 0
) -> None:
    """Make it the first on PATH; `used` are the lines of a query for used memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows").write_text("".join(f"{line}\n" for line in rows))
    (folder / "used").write_text("".join(f"{line}\n" for line in used))
    names = "".join(f"GPU {at}: {line.split(', ')[2]}\n" for at, line in enumerate(rows) if line.count(", ") > 2)
    (folder / "names").write_text(names)
    program = folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in\n-L) cat "{folder}/names";;\n*memory.used*) cat "{folder}/used";;\n'
        f'*) cat "{folder}/rows";;\nesac\nexit {code}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
