"""Choice of the device for a command."""

from __future__ import annotations

__all__ = ["find_device"]


def find_device(name: str = "auto") -> str:
    """Return the name of a torch device. "auto" is the GPU if there is one, otherwise the CPU."""
    if name != "auto":
        return name
    import torch  # late: it takes seconds

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
