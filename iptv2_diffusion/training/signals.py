"""Orderly stop: on SIGTERM, SIGUSR1 (pre-emption) or Ctrl-C the loop saves and stops. A second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(Exception):
    """Raised on every process if a signal to stop arrives during an evaluation or a preview."""


def no_interruption() -> None:
    """Do nothing: the `interrupt` of evaluations and previews outside of training."""


class StopSignal:
    """Record of a signal to stop. Use it as a context manager around the training loop."""

    _SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, object] = {}
        # `accelerate launch` of one process ends at SIGTERM without notifying its child. An orphan then stops by
        # itself.
        self._parent = os.getppid() if _is_launcher(os.getppid()) else None

    def __enter__(self) -> StopSignal:
        for name in self._SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and self._parent is not None and os.getppid() != self._parent:
            self.reason = "the end of its launcher"
        return self.reason is not None


def _is_launcher(process: int) -> bool:
    """Return whether a process is `accelerate launch` or torchrun, whose end stops the run, unlike that of a shell."""
    import psutil

    try:
        command = " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return False
    return "accelerate" in command or "torchrun" in command or "torch.distributed" in command
