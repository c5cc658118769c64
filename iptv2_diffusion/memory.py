"""Memory of a process: its peak, and what a CPU run has freed kept, for fresh pages cost more than the arithmetic.

glibc hands blocks above 32 MB back to the system whenever they are freed, and the kernel clears every page again at the
next use: one sixth of the seconds of an S-size forward at batch 32 (one core of a virtual Intel Xeon).
"""

import ctypes
import os
import sys
from pathlib import Path

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


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would be that of the process that started this one, if it held more
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
