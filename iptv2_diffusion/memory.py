"""Process memory: its peak, and reuse of freed memory in CPU runs.

glibc returns freed blocks above 32 MB to the system, and the kernel clears every page again at the next allocation.
This takes one sixth of the time of a forward pass of iptv2-s at batch size 32 (one core of a virtual Intel Xeon).
"""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for reuse until the process ends.

    Peak memory stays about the same, but the process does not return memory to the system. The function does nothing
    on systems other than Linux with glibc, or if the user has set one of malloc's variables (`MALLOC_…`).

    Returns:
        Whether malloc now keeps freed memory.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has no mallopt
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss inherits the peak of the parent process
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
