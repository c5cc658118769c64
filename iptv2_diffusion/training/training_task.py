"""The interface between a recipe, which says what is trained, and the loop, which owns how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iptv2_diffusion.training.signals import no_interruption

__all__ = ["TrainingTask"]


class TrainingTask(ABC):
    """What is trained. A recipe derives from this class; every process calls the methods alike.

    Attributes:
        images: number of images to train on, or None; a resumed run reports a change of it.
        works_together: `preview` needs all processes, and `evaluate` and `preview` run the model equally often on
            each, as a sharded model needs. Otherwise the main process alone calls `preview`.
    """

    images: int | None = None
    works_together: bool = False

    @abstractmethod
    def micro_batches(self, step: int) -> Iterable[Any]:
        """This process's `gradient_accumulation_steps` micro-batches of optimiser step `step` (from 0)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a micro-batch: a scalar with gradient. `model` is the prepared one."""

    def evaluate(
        self, model: nn.Module, step: int, last: bool, interrupt: Callable[[], None] = no_interruption
    ) -> Mapping[str, float]:
        """Held-out figures of the averaged weights after `step`, the same on every process; none by default.

        Call `interrupt` between batches, equally often on each process. It raises `Interrupted` where the run is asked
        to stop; the resumed run then evaluates this step again.
        """
        return {}

    def preview(self, model: nn.Module, step: int, interrupt: Callable[[], None] = no_interruption) -> Path | None:
        """Write a picture from the averaged weights and return its path; None, the default, without one.

        `interrupt` is as for `evaluate` if the task `works_together`; otherwise it does nothing.
        """
        return None

    def position(self, step: int) -> Mapping[str, Any] | None:
        """Where the data are at the start of `step`, as plain values that are the same on every process.

        The resumed run finds it in `Trainer.position`. None, the default, if the step's number says it.
        """
        return None
