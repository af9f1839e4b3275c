"""Reading and writing bytes that are used once, without keeping them in the page cache where the kernel supports that.

A streamed model then neither drives out the pages of other programs nor waits for free pages. Written bytes go to the
disk at once instead of piling up until fsync. Pages that were in the cache before stay there and are used.
Source: RWF_DONTCACHE of Linux 6.14, linux/fs.h. Other kernels and file systems (tmpfs) read and write as usual.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

RWF_DONTCACHE = 0x80  # the os module has no name for it


def read(descriptor: int, buffer: memoryview, begin: int) -> int:
    """Fill `buffer` from the file's byte `begin` on, as preadv does. Returns the number of bytes read, 0 at the end."""
    return _past_cache(os.preadv, descriptor, buffer, begin)


def write(descriptor: int, data: memoryview, begin: int) -> int:
    """Write `data` at the file's byte `begin`, as pwritev does. Returns the number of bytes written."""
    return _past_cache(os.pwritev, descriptor, data, begin)


def _past_cache(call: Callable[..., int], descriptor: int, data: memoryview, begin: int) -> int:
    if sys.platform == "linux":
        try:
            return call(descriptor, [data], begin, RWF_DONTCACHE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
    return call(descriptor, [data], begin)
