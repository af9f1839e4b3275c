"""Keep the lines of other libraries off the user's screen while nvquant calls them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator

_descriptors = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers print errors only, no warnings and no progress bars, until the context ends."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_descriptors() -> Iterator[None]:
    """Discard all output to stdout and stderr, also of compiled code. Use it for short calls only.

    The tokenizers library prints unknown settings and the place of a panic.
    """
    with _descriptors, open(os.devnull, "wb") as nowhere, contextlib.ExitStack() as stack:  # noqa: PTH123
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed or absent stream stays so
                stream.flush()
                stack.callback(_restore, os.dup(descriptor), descriptor)
                os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()  # lines that Python code printed


def _restore(kept: int, descriptor: int) -> None:
    os.dup2(kept, descriptor)
    os.close(kept)
