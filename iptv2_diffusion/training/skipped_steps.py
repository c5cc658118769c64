"""Optimiser steps that do not change the weights, because the loss or the gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable

from iptv2_diffusion.training.errors import NonFiniteLossError
from iptv2_diffusion.training.options import TrainingConfig

FP16_HALVINGS = 30  # largest number of overflows of fp16 in a row: the loss scale falls from 65,536 to 6e-5


class SkippedSteps:
    """Count the skipped steps of a run and end it after too many in a row.

    Attributes:
        total: number of skipped steps of the run, over all resumptions.
        in_a_row: number of skipped steps since the last step that was not skipped.
    """

    def __init__(self, config: TrainingConfig, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.total = self.in_a_row = 0

    def add(self, problem: str, step: int, limit: int, saved_step: int) -> None:
        """Count step `step` (from 1) and report it.

        Raises `NonFiniteLossError` after more than `limit` in a row, naming the checkpoint of `saved_step` (-1: none).
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row <= limit:
            self.say(
                f"{problem} at step {step}: skipped ({self.in_a_row} in a row, stops after {limit}; "
                f"{self.total} in total)"
            )
            return
        kept = f"checkpoint-{saved_step:08d} is kept" if saved_step >= 0 else "there was no checkpoint yet"
        after = f" after {limit} skipped steps" if limit else ""
        raise NonFiniteLossError(
            f"{problem} at step {step}: stopped{after} before the weights changed; {kept}. Continue with "
            f"--accept_changes and a lower --learning_rate (now {self.config.learning_rate:g}), with bf16 instead of "
            f"fp16, or with --max_skipped_steps {max(10, 2 * limit)} if such steps are rare"
        )
