"""Conversion as a user does it, for tests that need its result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def run_convert(source: Path, recipe: str, layout: str, folder: Path, quantizer: str = "rtn") -> Path:
    """Convert with the command line, with little calibration; returns the output."""
    command = [sys.executable, "-m", "nvquant", "convert", source, "--recipe", recipe, "--format", layout, "-o", folder]
    command += ["--quantizer", quantizer, "--samples", "4", "--sequence-length", "256", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    return folder
