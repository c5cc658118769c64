"""Memory that a CPU run has freed stays with the process: fresh pages cost more than the arithmetic on them.

glibc hands blocks above 32 MB back to the system whenever they are freed, and the kernel clears every page again at the
next use: one sixth of the seconds of an S-size forward at batch 32 (one core of a virtual Intel Xeon).
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the rest of this process; returns whether the C library is one that can.

    A no-op but on Linux with glibc, and where the user has set one of malloc's own variables (`MALLOC_…`). Peak memory
    stays about the same; what was once taken is not given back.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has no mallopt
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
