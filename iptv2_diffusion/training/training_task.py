"""The interface between a recipe, which defines what is trained, and the loop, which defines how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iptv2_diffusion.training.signals import no_interruption

__all__ = ["TrainingTask"]


class TrainingTask(ABC):
    """Definition of a training. Each recipe derives from this class, and all processes call the same methods.

    Attributes:
        images: number of images to train on, or None. A resumed run reports a change.
        works_together: whether `preview` needs all processes, and `evaluate` and `preview` run the model equally often
            on each, as a sharded model requires. Otherwise only the main process calls `preview`.
    """

    images: int | None = None
    works_together: bool = False

    @abstractmethod
    def micro_batches(self, step: int) -> Iterable[Any]:
        """Return this process's `gradient_accumulation_steps` micro-batches of optimiser step `step` (from 0)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a micro-batch, a scalar with gradient. `model` is the prepared model."""

    def evaluate(
        self, model: nn.Module, step: int, last: bool, interrupt: Callable[[], None] = no_interruption
    ) -> Mapping[str, float]:
        """Return held-out metrics of the EMA weights after `step`, the same on every process; none by default.

        Call `interrupt` between batches, equally often on each process. It raises `Interrupted` if the run must stop.
        The resumed run then evaluates this step again.
        """
        return {}

    def preview(self, model: nn.Module, step: int, interrupt: Callable[[], None] = no_interruption) -> Path | None:
        """Write an image from the EMA weights and return its path; None, the default, for no image.

        `interrupt` works as for `evaluate` if the task `works_together`. Otherwise it does nothing.
        """
        return None

    def position(self, step: int) -> Mapping[str, Any] | None:
        """Return the position in the data at the start of `step`, as plain values that are the same on every process.

        The resumed run finds it in `Trainer.position`. None, the default, means that the step's number determines it.
        """
        return None
