"""The process that renders a model's chat template, which is an untrusted program and may never end or take all memory.
It reads a request a line from stdin and writes an answer a line to stdout, both JSON.

Only `template.py` starts it. Its environment contains no token of the user. It opens no file and ends with its stdin.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import date
from typing import Any

# Templates that write today's date get this one, or two days would give two calibration sets.
TODAY = date(2026, 1, 1)
MOST_SECONDS = 20  # of one conversation; templates of released models take some milliseconds
MOST_BYTES = 1 << 30  # beside what the interpreter takes
MOST_REASON = 300  # characters of what a template raised


def main() -> None:
    """Answer until stdin ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201  stdout is the way back
    for line in sys.stdin:
        _limit_time()
        print(json.dumps(_answer(render_jinja_template, json.loads(line))), flush=True)  # noqa: T201


def _answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: `text`, or the reason for none: `refused` by the template, or `beyond` a bound."""
    try:
        rendered, _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["generation_prompt"],
            strftime_now=TODAY.strftime,
            **request["variables"],
        )
        text = str(rendered[0])
    except MemoryError:
        return {"beyond": f"takes more than {MOST_BYTES >> 30} GB of memory"}
    except Exception as error:  # a template is a program and may raise anything
        return {"refused": (str(error) or type(error).__name__)[:MOST_REASON]}
    if len(text) > request["most"]:
        return {"beyond": f"makes {len(text):,} characters of a conversation of {request['given']:,}"}
    return {"text": text}


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  as little as possible is imported here
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, taken + MOST_BYTES))


def _limit_time() -> None:
    """Limit the time of this process, in case the process that would end it is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + 2 * MOST_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
