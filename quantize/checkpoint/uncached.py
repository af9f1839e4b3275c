"""Reading and writing what is used once, without keeping it in the page cache where the kernel can do that.

A model that is streamed then neither drives out what others use nor waits for pages to be found for it, and what is
written goes to the disk at once instead of piling up until fsync. What was in the cache before stays and is used.
Source: RWF_DONTCACHE of Linux 6.14, linux/fs.h; other kernels and file systems (tmpfs) read and write as usual.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

RWF_DONTCACHE = 0x80  # the os module has no name for it


def read(descriptor: int, buffer: memoryview, begin: int) -> int:
    """Fill `buffer` from the file's byte `begin` on, as preadv does; returns how many bytes came, 0 at the end."""
    return _past_cache(os.preadv, descriptor, buffer, begin)


def write(descriptor: int, data: memoryview, begin: int) -> int:
    """Write `data` at the file's byte `begin`, as pwritev does; returns how many bytes were taken."""
    return _past_cache(os.pwritev, descriptor, data, begin)


def _past_cache(call: Callable[..., int], descriptor: int, data: memoryview, begin: int) -> int:
    if sys.platform == "linux":
        try:
            return call(descriptor, [data], begin, RWF_DONTCACHE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
    return call(descriptor, [data], begin)
