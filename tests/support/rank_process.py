"""The process behind `WarmRanks`: reads tasks from its standard input, one a line, forks the ranks of each and says how
they ended. Nothing is computed here, so that forks have no threads to miss."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import transformers.models.gemma4.modeling_gemma4
import transformers.models.llama.modeling_llama  # noqa: F401 - imported once for all ranks
from nvquant.convert import ranks as ranks_module
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.convert.ranks import join_ranks
from nvquant.convert.stop import StopRequest
from nvquant.errors import NvquantError
from support.conversions import calibration_of, planned
from support.states import Kept, plain


class SignalAfter(StopRequest):
    """Sends this very process a signal when the run has asked so many times whether it shall end."""

    def __init__(self, asked: int, number: int) -> None:
        self._left, self._number = asked, number
        super().__init__()

    @property
    def number(self) -> int | None:  # type: ignore[override]
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._number)
        return self._told

    @number.setter
    def number(self, value: int | None) -> None:
        self._told = value


def run_rank(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    """Do this rank's part of a job.

    The job `merges` exchanges the states of a statistic. Any other job has `source` and `output`, perhaps `recipe`,
    `layout`, `quantizer`, `fold`, `batch_size` and `ids` (a file); a `signal` to `at_rank` when it has asked `asked`
    times whether to stop; and `others`, what differs on rank 1.
    """
    if "meeting_seconds" in job:
        ranks_module._MEETING = timedelta(seconds=job["meeting_seconds"])
    if rank == 1:
        job = job | job.get("others", {})
    if job.get("absent") == rank:
        return {"error": "never came"}
    device, ranks = join_ranks("cpu")
    if "merges" in job:
        return {"states": [plain(state) for state in ranks.merged(Kept(rank)).states]}
    source, output = Path(job["source"]), Path(job["output"])
    quantizer = job.get("quantizer", "rtn")
    plan = planned(source, job.get("recipe", "nvfp4-full"), job.get("layout", "compressed-tensors"), quantizer)
    calibration = calibration_of(source, Path(job["ids"])) if plan.needs_calibration else None
    stop = SignalAfter(job["asked"], job["signal"]) if job.get("at_rank") == rank else StopRequest()
    with stop:
        options = ConvertOptions(
            output,
            quantizer,
            device,
            job.get("batch_size", 1),
            ranks=ranks,
            stop=stop,
            fold=job.get("fold", False),
        )
        result = convert(plan, options, calibration)
    return {"resumed": result.layers_resumed, "finished": result.was_finished}


def child(rank: int, task: dict[str, Any]) -> None:
    """A rank from its fork to its end; does not return."""
    size = task["size"]
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task["port"])}
    try:
        told, code = run_rank(rank, task["job"]), 0
    except NvquantError as error:
        told, code = {"error": str(error)}, error.exit_code
    except BaseException as error:
        told, code = {"error": f"not meant for the user: {error!r}"}, 70
    (Path(task["folder"]) / f"rank-{rank}.json").write_text(json.dumps(told))
    os._exit(code)


def wait(pids: list[int], deadline: float) -> list[int | None]:
    """Exit codes, None for those that had to be killed at the deadline."""
    codes: dict[int, int | None] = {}
    end = time.monotonic() + deadline
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[pid] = None
    return [codes[pid] for pid in pids]


def main() -> None:
    """Serve tasks until the input ends."""
    for line in sys.stdin:
        task = json.loads(line)
        pids = []
        for rank in range(task["size"]):
            pid = os.fork()
            if pid == 0:
                child(rank, task)
            pids.append(pid)
        sys.stdout.write(json.dumps(wait(pids, task["deadline"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
