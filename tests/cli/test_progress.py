"""The display of progress: a live block on a terminal that leaves nothing behind, few plain lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nvquant.cli.progress import progress_display
from nvquant.convert.progress import Progress
from rich.console import Console

LAYERS = 60
FULL = Progress("layers", 17, LAYERS, 40.0, 2_440_000, 8_612_000, 76 * 10**9, 36 * 10**9, 5_200_000_000, 5_400_000_000)
LINE = re.compile(r"\d\d:\d\d:\d\d convert (layer=\d+/\d+ )?phase=(\w+|\"[^\"]+\")( [\w/]+=\S+)*")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def layer(done: int, seconds: float, phase: str = "layers") -> Progress:
    """A run of 60 layers that reads 1.9 GB and writes 0.9 GB a second."""
    return Progress(
        phase, done, LAYERS, seconds, tokens_done=done * 262_144, tokens_total=LAYERS * 262_144,
        bytes_read=int(1.9e9 * seconds), bytes_written=int(0.9e9 * seconds), host_bytes=5_200_000_000,
    )  # fmt: skip


def plain(tell: Callable[[Callable[[Progress], None], Clock], None]) -> list[str]:
    """The lines that a plain display writes while it is told; each has the right form."""
    stream, clock = io.StringIO(), Clock()
    with progress_display(stream, clock=clock) as sink:
        tell(sink, clock)
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert not text or text.endswith("\n")
    lines = text.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    return lines


def fields(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in line.split()[2:])


# The state itself


def test_eta_comes_from_the_layers_of_this_run() -> None:
    assert Progress("layers", 15, 60, seconds=30.0).eta_seconds == 90.0
    resumed = Progress("layers", 45, 60, seconds=30.0, layers_skipped=30)
    assert resumed.eta_seconds == 30.0
    assert replace(resumed, setup_seconds=15.0).eta_seconds == 15.0


def test_eta_is_unknown_before_the_first_layer_and_nothing_after_the_last() -> None:
    assert Progress("record", 0, 60, seconds=3.0).eta_seconds is None
    assert Progress("replay", 30, 60, seconds=3.0, layers_skipped=30).eta_seconds is None
    assert Progress("layers", 1, 60, seconds=0.0).eta_seconds is None
    assert Progress("starting").eta_seconds is None
    assert Progress("finish", 60, 60, seconds=50.0).eta_seconds == 0.0
    assert Progress("finish", 60, 60, seconds=50.0, layers_skipped=60).eta_seconds == 0.0


def test_tokens_per_second_leaves_the_setup_out_and_is_unknown_without_tokens() -> None:
    assert FULL.tokens_per_second == 61_000
    assert replace(FULL, setup_seconds=20.0).tokens_per_second == 122_000
    assert replace(FULL, tokens_done=0).tokens_per_second is None
    assert replace(FULL, seconds=0.0).tokens_per_second is None


# Plain lines


def test_a_plain_line_has_every_figure() -> None:
    first = plain(lambda sink, clock: sink(FULL))[0]
    assert first.split(" ", 1)[1] == (
        "convert layer=17/60 phase=layers read=1.9GB/s write=0.9GB/s tokens/s=61,000 rss=5.2GB gpu=5.4GB eta=1m41s"
    )


def test_what_comes_from_the_hub_is_told_while_layers_wait_for_it() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for gigabytes in (1, 2, 3):
            sink(Progress("record", seconds=clock.now, bytes_fetched=gigabytes * 10**9, bytes_to_fetch=4 * 10**9))
            clock.now += 8

    lines = [line.split("fetched=")[1].split()[0] for line in plain(tell)]
    assert lines[:2] == ["1.0GB/4.0GB", "3.0GB/4.0GB"]  # the first of the phase, and one every ten seconds
    shown = "\n".join(Screen(live(replace(FULL, bytes_fetched=10**9, bytes_to_fetch=4 * 10**9))).frames)
    assert "fetched 1.0 GB / 4.0 GB" in shown


def test_what_a_run_does_not_have_is_left_out() -> None:
    (line,) = plain(lambda sink, clock: sink(Progress("layers", 0, 3)))
    assert line.split(" ", 1)[1] == "convert layer=0/3 phase=layers"
    first, last = plain(lambda sink, clock: sink(Progress("llm compressor", seconds=2.0, bytes_read=8_000_000)))
    assert first.split(" ", 1)[1] == 'convert phase="llm compressor" read=4MB/s write=0MB/s'
    assert "phase=done" in last


def test_layers_are_told_at_most_every_ten_seconds() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for done in range(LAYERS + 1):
            sink(layer(done, seconds=2.0 * done))
            clock.now += 2.0

    lines = [fields(line) for line in plain(tell)]
    assert [line["layer"] for line in lines] == [*(f"{done}/60" for done in range(0, 61, 5)), "60/60"]
    assert {line["phase"] for line in lines[:-1]} == {"layers"} and lines[-1]["phase"] == "done"


def test_a_slow_layer_is_told_once() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for at in range(100):
            sink(layer(at // 50, seconds=float(at)))
            clock.now += 1.0

    assert [fields(line)["layer"] for line in plain(tell)] == ["0/60", "1/60"]


def test_many_fast_layers_make_three_lines() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for done in range(LAYERS + 1):
            sink(layer(done, seconds=0.001 * done))
            clock.now += 0.001
        sink(layer(LAYERS, seconds=0.07, phase="finish"))

    lines = [fields(line) for line in plain(tell)]
    assert [(line["layer"], line["phase"]) for line in lines] == [
        ("0/60", "layers"), ("60/60", "finish"), ("60/60", "done"),
    ]  # fmt: skip


def test_each_phase_is_told_once_however_often_it_comes_back() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for done in range(4):
            for phase in ("forward", "quantize"):
                sink(layer(done, float(done), phase))

    assert [fields(line)["phase"] for line in plain(tell)] == ["forward", "quantize"]


def test_speeds_are_of_the_last_ten_seconds_and_of_the_whole_run_at_the_end() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        for second in range(101):  # 1 GB/s for 50 s, then 3 GB/s
            read = second if second <= 50 else 50 + 3 * (second - 50)
            sink(Progress("layers", second, 100, float(second), bytes_read=read * 10**9))
            clock.now += 1.0

    lines = [fields(line) for line in plain(tell)]
    assert (lines[3]["layer"], lines[3]["read"]) == ("30/100", "1.0GB/s")
    assert (lines[8]["layer"], lines[8]["read"]) == ("80/100", "3.0GB/s")
    assert (lines[-1]["phase"], lines[-1]["read"]) == ("done", "2.0GB/s")


def test_the_remaining_time_counts_down_while_a_layer_takes_long() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        sink(layer(30, 30.0, "forward"))  # 30 s to come
        clock.now += 12.0
        sink(layer(30, 42.0, "quantize"))

    assert [fields(line)["eta"] for line in plain(tell)] == ["30s", "18s"]


def test_after_an_error_no_line_claims_the_end() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), progress_display(stream) as sink:
        sink(layer(LAYERS, 60.0))
        raise ValueError("no")
    assert stream.getvalue().count("\n") == 1 and "done" not in stream.getvalue()


def test_an_unfinished_run_is_not_called_done() -> None:
    assert [fields(line)["layer"] for line in plain(lambda sink, clock: sink(layer(17, 17.0)))] == ["17/60"]


def test_a_late_report_of_another_thread_does_not_take_the_run_back() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        sink(layer(18, 20.0))
        clock.now += 11.0
        sink(layer(17, 19.0))

    assert len(plain(tell)) == 1


def test_reports_of_many_threads_come_out_as_whole_lines() -> None:
    def tell(sink: Callable[[Progress], None], clock: Clock) -> None:
        def work(thread: int) -> None:
            for at in range(200):
                sink(layer(at % 60, 0.0, f"phase{thread}x{at}"))

        threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(fields(line)["phase"] for line in plain(tell)) == sorted(
        f"phase{thread}x{at}" for thread in range(8) for at in range(200)
    )


def test_forced_colours_bring_no_escapes_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "log").open("w") as stream, progress_display(stream) as sink:
        sink(FULL)
    assert (tmp_path / "log").read_text().count("\n") == 1 and "\x1b" not in (tmp_path / "log").read_text()


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with progress_display(stream) as sink:
        sink(FULL)
    with pytest.raises(BrokenPipeError):
        stream.close()


# The live block, on rich's own idea of a terminal


def live(progress: Progress | None, width: int = 100, **environ: str) -> str:
    """All that a terminal gets from a live display for one state, escapes included."""
    console = Console(
        force_terminal=True, file=io.StringIO(), width=width, _environ={"TERM": "xterm-256color", **environ}
    )
    with progress_display(io.StringIO(), console=console) as sink:
        if progress is not None:
            sink(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().replace("\n", "\r\n")  # as a terminal's driver does


class Screen:
    """What a terminal shows: the few control sequences that rich's live block uses, and nothing else."""

    SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")

    def __init__(self, text: str) -> None:
        self.lines, self.row, self.column, self.shows_cursor = [""], 0, 0, True
        self.frames: list[str] = []
        at = 0
        while at < len(text):
            match = self.SEQUENCE.match(text, at)
            assert match, repr(text[at : at + 20])
            at = match.end()
            self._apply(*match.groups())

    def _apply(self, numbers: str | None, letter: str | None, move: str | None, words: str | None) -> None:
        if words is not None:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + words + line[self.column + len(words) :]
            self.column += len(words)
            self.frames.append("\n".join(self.lines))
        elif move == "\r":
            self.column = 0
        elif move == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif letter == "A":
            self.row -= int(numbers or 1)
        elif letter == "K":
            assert numbers == "2"
            self.lines[self.row] = ""
        elif letter in ("h", "l"):
            assert numbers == "?25"
            self.shows_cursor = letter == "h"
        else:
            assert letter == "m", letter

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip()


def test_the_block_shows_every_figure_and_is_gone_at_the_end() -> None:
    screen = Screen(live(FULL))
    shown = "\n".join(screen.frames)
    for words in (
        "layer 17/60", "layers", "61,000 tokens/s", "read 1.9 GB/s", "write 0.9 GB/s", "RSS 5.2 GB", "GPU 5.4 GB",
        "ETA 1m41s", "elapsed 0s",
    ):  # fmt: skip
        assert words in shown, words
    assert screen.text == "" and screen.shows_cursor


def test_the_block_tells_of_an_earlier_run_and_of_ranks() -> None:
    shown = "\n".join(Screen(live(replace(FULL, layers_skipped=12, ranks=4))).frames)
    assert "(12 by an earlier run)" in shown and "4 ranks" in shown


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_is_left_clean_too(width: int) -> None:
    screen = Screen(live(FULL, width))
    assert all(len(line) <= width for frame in screen.frames for line in frame.splitlines())
    assert screen.text == ""


def test_a_run_that_never_reports_leaves_nothing() -> None:
    assert Screen(live(None)).text == ""


def test_no_color_is_respected() -> None:
    colour = re.compile(r"\x1b\[[\d;]*(3[0-8]|9\d)[\d;]*m")
    assert colour.search(live(FULL))
    assert not colour.search(live(FULL, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines() -> None:
    console = Console(force_terminal=True, file=io.StringIO(), _environ={"TERM": "dumb"})
    stream = io.StringIO()
    with progress_display(stream, console=console) as sink:
        sink(FULL)
    assert LINE.fullmatch(stream.getvalue().strip())


def test_many_reports_are_drawn_at_most_eight_times_a_second() -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=100, _environ={"TERM": "xterm"})
    began, told = time.monotonic(), 0
    with progress_display(io.StringIO(), console=console) as sink:
        while time.monotonic() - began < 1.0:
            told += 1
            sink(layer(told % 60, told * 1e-6))
    seconds = time.monotonic() - began
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue().count("layer ")
    assert 2 <= drawn <= 8 * seconds + 2 < told


# The live block, on a real terminal

CHILD = """
import os, sys, time
os.close(os.open(os.ttyname(2), os.O_RDWR))  # the session's leader opens a terminal: it becomes the session's own
from nvquant.cli.progress import progress_display
from nvquant.convert.progress import Progress
with progress_display() as sink:
    for at in range({rounds}):
        sink(Progress("layers", at % 60, 60, float(at), host_bytes=5_200_000_000))
        if at == 1:
            print("a warning", file=sys.stderr)
            print("the result")
        {action}
        time.sleep(0.1)
print("after", file=sys.stderr)
"""


def on_terminal(action: str, keys_when: bytes = b"", keys: bytes = b"", rounds: int = 8) -> tuple[str, str, int]:
    """Run the child on a pseudo-terminal: (what the terminal got, what stdout got, exit code)."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(action=action, rounds=rounds)],
        stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, start_new_session=True, env=environ,
    )  # fmt: skip
    got = b""
    while child.poll() is None or select.select([ours], [], [], 0.2)[0]:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        got += os.read(ours, 65536)
        if keys and keys_when in got:
            os.write(ours, keys)
            keys = b""
    assert child.stdout is not None
    with child.stdout:
        stdout = child.stdout.read().decode()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
    return got.decode(), stdout, child.returncode


def test_on_a_real_terminal_only_what_was_said_beside_the_block_is_left() -> None:
    text, stdout, code = on_terminal("pass")
    screen = Screen(text)
    assert code == 0
    assert any(re.search(r"layer [1-7]/60 layers\n.*\n.*RSS 5.2 GB", frame) for frame in screen.frames)
    assert screen.text == "a warning\nafter"
    assert stdout == "the result\n"
    assert screen.shows_cursor


def test_after_an_error_the_terminal_is_as_before() -> None:
    text, _, code = on_terminal("1 / (at < 3)")
    screen = Screen(text)
    assert code == 1 and screen.shows_cursor
    assert screen.text.startswith("a warning\nTraceback") and screen.text.endswith(
        "ZeroDivisionError: division by zero"
    )
    assert "layer" not in screen.text.replace('"layers"', "")


def test_after_ctrl_c_the_terminal_is_as_before() -> None:
    text, _, code = on_terminal("pass", keys_when=b"RSS 5.2 GB", keys=b"\x03", rounds=600)
    screen = Screen(text)
    assert code == -2 and screen.shows_cursor
    assert screen.text.endswith("KeyboardInterrupt") and "RSS" not in screen.text


def test_a_killed_process_leaves_the_cursor_visible() -> None:
    text, _, code = on_terminal("if at == 5: os.kill(os.getpid(), 9)")
    assert code == -9
    assert Screen(text).shows_cursor
