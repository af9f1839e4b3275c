"""A fleet of conversions as jobs of the Hugging Face Hub, one for each line of a list of models.

usage: hf auth login; python hf_fleet.py OWNER [models.txt] [--flavor h200] [--timeout 2h]

Prints a line for each job, with the model that it makes and the address of its log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, run_job

IMAGE = "python:3.12"
SCRIPT = """
pip install --quiet "git+https://github.com/nvquant/nvquant"
nvquant convert "$MODEL" --recipe "$RECIPE" --low-disk -o out --push-to "$TARGET"
"""


def main() -> None:
    """Submit a job for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("owner")
    parser.add_argument("models", type=Path, nargs="?", default=Path(__file__).with_name("models.txt"))
    parser.add_argument("--flavor", default="h200")
    parser.add_argument("--timeout", default="2h", help="A job that takes longer is ended, and its disk is lost.")
    options = parser.parse_args()
    token = get_token()
    if token is None:
        raise SystemExit("no token: run `hf auth login`, or set HF_TOKEN")
    for request in requests(options.models.read_text(encoding="utf-8"), options.owner, token):
        job = run_job(flavor=options.flavor, timeout=options.timeout, **request)
        sys.stdout.write(f"{request['env']['TARGET']} {job.url}\n")


def requests(listed: str, owner: str, token: str) -> Iterator[dict[str, Any]]:
    """The arguments of `run_job` for each line `MODEL RECIPE`. The token is passed as a secret."""
    for line in listed.splitlines():
        words = line.partition("#")[0].split()
        if words:
            model, recipe = words
            target = f"{owner}/{model.rpartition('/')[2]}-{recipe}"
            yield {
                "image": IMAGE,
                "command": ["bash", "-ec", SCRIPT],
                "env": {"MODEL": model, "RECIPE": recipe, "TARGET": target},
                "secrets": {"HF_TOKEN": token},
            }


if __name__ == "__main__":
    main()
