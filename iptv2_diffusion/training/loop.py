"""The training loop that every recipe shares.

A recipe defines *what* is trained by a `TrainingTask`. `Trainer` defines *how*. Optimiser step n, counted from 0, is

    loss      mean of task.loss over the micro-batches of task.micro_batches(n) and over the processes
    gradient  of the loss with respect to the weights, clipped by its norm; a step that is not finite changes nothing
    weights   AdamW at the learning rate of step n
    average   exponential moving average of the weights, which is evaluated, sampled and saved

followed, at their intervals, by snapshots of the average, `task.evaluate`, `task.preview` and a checkpoint.

All random numbers of step n are a function of (seed, n) (see `data/draws.py`). A checkpoint therefore needs no random
state, and the loss curve does not depend on the number of processes or on gradient accumulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from iptv2_diffusion.training.accelerator import is_sharded, prepare
from iptv2_diffusion.training.checkpoint import Checkpoint, CheckpointManager
from iptv2_diffusion.training.cuda_graphs import GraphedModel, wants_graphs
from iptv2_diffusion.training.ema import ModelState, StateDict
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.logging import MetricLog, ProgressBar, log_picture, plot_curves
from iptv2_diffusion.training.options import TrainingConfig, config_to_dict, frozen_fields, save_config
from iptv2_diffusion.training.power_ema import forget_snapshots_after
from iptv2_diffusion.training.precision import device_of_sums
from iptv2_diffusion.training.run_folder import claim_run_folder
from iptv2_diffusion.training.sharding import full_tensor
from iptv2_diffusion.training.signals import Interrupted, StopSignal, no_interruption
from iptv2_diffusion.training.skipped_steps import FP16_HALVINGS, SkippedSteps
from iptv2_diffusion.training.training_task import TrainingTask


class Outcome(enum.Enum):
    """Outcome of `Trainer.fit`. The state is saved in both cases."""

    FINISHED = "finished"  # the number of steps or the time of the configuration is reached
    STOPPED = "stopped"  # by a signal; the same command resumes the run


class StepResult(NamedTuple):
    """Result of a training step, the same on every process."""

    loss: float  # mean over the processes
    grad_norm: float  # before clipping
    stop: bool  # whether a process received a signal to stop


class Trainer:
    """Train a model on a task, from the newest checkpoint of the output folder if there is one.

    Call `resume`, then `fit`, then `finish`.

    Args:
        config: configuration of the run. config.yaml, metrics.jsonl and checkpoints are written to `config.output_dir`.
        accelerator: result of `make_accelerator`.
        model: the model, not prepared, on any device, in float32.
        curves: names of the metrics to plot in loss_curve.png.
        result: function that takes the model's state dict and returns the part to keep in snapshots of averages.

    Attributes:
        step: number of optimiser steps done.
        seconds: time spent in training steps over all resumptions, the same on every process.
        position: position in the data, from the task, at the time of the checkpoint.
        skipped: counter of the steps whose loss or gradient was not finite.
        state: the weights and their average.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        curves: tuple[str, ...] = ("loss", "heldout_loss"),
        result: Callable[[StateDict], StateDict] = dict,
    ) -> None:
        self.config, self.accelerator, self.curves, self.result = config, accelerator, curves, result
        graphs = wants_graphs(config, accelerator)
        self.output_dir = Path(config.output_dir)
        self.snapshots = self.output_dir / "ema"  # folder of power-function averages
        with user_errors(OSError, ValueError):
            if accelerator.is_main_process:
                claim_run_folder(self.output_dir)
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.sharded = is_sharded(config, accelerator)
        self.model, self.optimizer, self.schedule = prepare(model, config, accelerator, sharded=self.sharded)
        self._trained = GraphedModel(self.model) if graphs else self.model  # the losses call this module
        self.state = self._make_state()
        self.checkpoints = self._make_checkpoints()
        self.step = 0
        self.seconds = self._clock = 0.0  # this process's own clock; `seconds` is the common one
        self.position: Mapping[str, Any] | None = None
        self.skipped = SkippedSteps(config, accelerator.print)
        self._budget = 60.0 * config.max_train_minutes if config.max_train_minutes else math.inf
        self._saved_step = -1
        self._images: int | None = None  # number of training images when the checkpoint was saved
        self._due = False  # whether `_after_step` must still run for this step
        self._next_batches: list[Any] = []

    def _make_state(self) -> ModelState:
        config = self.config
        widths = config.ema_sigma_rels if config.ema == "power" else ()
        averaging: dict[str, Any] = {"decay": config.ema_decay, "power": config.ema_power, "sigma_rels": widths}
        return ModelState(self.accelerator, self.model, self.optimizer, **averaging)

    def _make_checkpoints(self) -> CheckpointManager:
        config = self.config
        return CheckpointManager(
            self.output_dir,
            self.accelerator,
            frozen_fields(config),
            defaults=frozen_fields(type(config)()),
            accept_changes=config.accept_changes,
            keep_last=config.keep_last,
            state=self.state,
            sharded=self.sharded and config.sharded_checkpoints,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # A run: resume, fit, finish

    def resume(self) -> None:
        """Load the newest complete checkpoint, or start from step 0."""
        if self.config.overwrite:
            self.checkpoints.delete_all()
        found = self.checkpoints.latest()
        if found is not None:
            self._go_to(found)
            self.accelerator.print(f"resumed from {found.path} at step {self.step}")
        main, path = self.accelerator.is_main_process, self.output_dir / "metrics.jsonl"
        self.metrics = MetricLog(path, resumed_step=self.step, evaluated=not self._due, enabled=main)
        if main:
            forget_snapshots_after(self.snapshots, self.state.averaged_steps)
            # Without options that hold for one start only: a run from this file must not delete or upload anything.
            once: dict[str, Any] = {"overwrite": False, "accept_changes": False, "push_to_hub": False}
            if self.config.mixed_precision == "auto":  # chosen by timing this machine
                once["mixed_precision"] = self.accelerator.mixed_precision
            save_config(dataclasses.replace(self.config, **once), self.output_dir / "config.yaml")
        self.accelerator.init_trackers("logs", config=_flat(config_to_dict(self.config)))

    def fit(self, task: TrainingTask) -> Outcome:
        """Train to the end of the run or until a signal to stop."""
        self._check_task(task)
        with StopSignal() as stop, contextlib.closing(self._progress_bar()) as bar:
            interrupt = partial(self._interrupt, stop)
            try:
                if self._due:
                    self._after_step(task, bar, interrupt)
                while not self.finished:
                    started = time.perf_counter()
                    result = self.train_step(task, stop)
                    self._clock += time.perf_counter() - started
                    self._log_step(result, bar)
                    self._due = True
                    if result.stop:
                        raise Interrupted
                    self._after_step(task, bar, interrupt)
                self.save(task)
            except Interrupted:
                self.save(task)
                reason = stop.reason or "a signal to another process"
                bar.say(f"stopped by {reason} at step {self.step}, saved; run the same command to continue")
                return Outcome.STOPPED
        return Outcome.FINISHED

    def finish(self) -> None:
        """Draw the loss curve and close the trackers."""
        self._plot()
        self.accelerator.end_training()

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, in [0, 1]: that of the steps or of the time, whichever is larger."""
        return min(1.0, max(self.step / self.config.max_train_steps, self._time_fraction))

    @property
    def _time_fraction(self) -> float:
        """Fraction of the time budget that has passed; 0 without a budget."""
        return self.seconds / self._budget

    @property
    def finished(self) -> bool:
        """Whether the run has reached its number of steps or its time budget."""
        return self.fraction >= 1.0

    # ----------------------------------------------------------------------------------------------------------------
    # One step

    def train_step(self, task: TrainingTask, stop: StopSignal) -> StepResult:
        """Run one optimiser step: gradients, agreement of the processes, and the update."""
        self.schedule.set(self.step, self._time_fraction)
        loss = self._accumulate_gradients(task)
        # Draws and sends the batch while the device still computes. `_agree` waits for the device.
        more = self.step + 1 < self.config.max_train_steps
        self._next_batches = list(task.micro_batches(self.step + 1)) if more else []
        limit = self.config.max_grad_norm if self.config.max_grad_norm > 0 else math.inf
        norm = full_tensor(self.accelerator.clip_grad_norm_(self.state.parameters, limit))
        result = self._agree(loss, norm, bool(stop))
        self._update(result)
        self.step += 1
        return result

    def _accumulate_gradients(self, task: TrainingTask) -> Tensor:
        """Compute the step's gradients, averaged over micro-batches and processes; return this process's loss."""
        batches = self._next_batches or list(task.micro_batches(self.step))
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches, start=1):
            # The processes exchange gradients once per step, at the last micro-batch.
            last = index == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = task.loss(self._trained, batch) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _agree(self, loss: Tensor, norm: Tensor, stop: bool) -> StepResult:
        """Return loss, gradient norm, stop flag and time, the same on every process.

        Reading them waits for the device, once per step and before the weights change. A NaN never reaches the weights.
        """
        device = device_of_sums(self.accelerator)
        own = torch.tensor([float(stop), self._clock], dtype=torch.float64, device=device)
        figures = torch.stack([loss, torch.as_tensor(norm, device=loss.device)])
        vector = torch.cat([figures.to(device).double(), own])
        if self.accelerator.num_processes > 1:
            vector = self.accelerator.reduce(vector, "mean")
        loss_value, norm_value, stop_value, self.seconds = vector.tolist()
        return StepResult(loss_value, norm_value, stop_value > 0)

    def _update(self, result: StepResult) -> None:
        """Update the weights and the average, unless the loss or the gradient is not finite."""
        scaler, problem = self.accelerator.scaler, self._problem(result)
        if problem:
            self._skip(problem, self.config.max_skipped_steps)
        if not problem or scaler is not None:  # fp16's scaler needs every step, to halve its scale
            self.optimizer.step()
        if not problem and scaler is not None and self.optimizer.step_was_skipped:
            problem = f"fp16 overflows; the loss scale becomes {scaler.get_scale():g}"
            self._skip(problem, FP16_HALVINGS)
        self.optimizer.zero_grad(set_to_none=True)
        if not problem:
            self.skipped.in_a_row = 0
            self.state.step()

    def _problem(self, result: StepResult) -> str | None:
        """Describe a loss or gradient that is not finite; None if both are finite."""
        if not math.isfinite(result.loss):
            return f"the loss is {result.loss}"
        # An infinite gradient is normal with fp16: the scaler skips the step and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(result.grad_norm):
            return f"the gradient norm is {result.grad_norm}"
        return None

    def _skip(self, problem: str, limit: int) -> None:
        self.skipped.add(problem, self.step + 1, limit, self._saved_step)

    # ----------------------------------------------------------------------------------------------------------------
    # Between steps

    def _after_step(self, task: TrainingTask, bar: ProgressBar, interrupt: Callable[[], None]) -> None:
        """Run what is due after `self.step` steps: snapshots, held-out metrics, a preview, a checkpoint.

        The checkpoint comes last. A run that is killed before it repeats the rest, and its log reads as undisturbed.
        """
        config, last = self.config, self.finished
        snapshot = config.ema == "power" and (last or self._every(config.ema_snapshot_every))
        evaluation = config.eval_every > 0 and (last or self._every(config.eval_every))
        preview = not last and self._every(config.preview_every)
        checkpoint = self._every(config.checkpoint_every)
        if snapshot:
            with user_errors(OSError, SafetensorError):
                self.state.write_snapshots(self.snapshots, self.result)
        if evaluation:
            self._evaluate(task, bar, interrupt)
        if preview:
            self._preview(task, interrupt)
        self._due = False
        if checkpoint:
            self.save(task)
        if snapshot or evaluation or preview or checkpoint:
            bar.pause()

    def _every(self, interval: int) -> bool:
        """Return whether the number of steps is a multiple of an interval; False for an interval of 0."""
        return interval > 0 and self.step % interval == 0

    def _evaluate(self, task: TrainingTask, bar: ProgressBar, interrupt: Callable[[], None]) -> None:
        with self.state.averaged() as model:
            figures = dict(task.evaluate(model, self.step, self.finished, interrupt))
        if figures:
            self._log(figures)
            bar.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))

    def _preview(self, task: TrainingTask, interrupt: Callable[[], None]) -> None:
        if self.accelerator.is_main_process or task.works_together:
            with self.state.averaged() as model:
                picture = task.preview(model, self.step, interrupt if task.works_together else no_interruption)
            log_picture(self.accelerator, "preview", picture, self.step)
        self._plot()

    def _interrupt(self, stop: StopSignal) -> None:
        """Raise `Interrupted` on every process if one of them received a signal to stop."""
        asked = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum") > 0:
            raise Interrupted

    def _check_task(self, task: TrainingTask) -> None:
        if self.sharded and not task.works_together:
            raise ConfigError(
                f"sharding is {self.config.sharding}; this training only runs unsharded: use --sharding none"
            )
        if self._images not in (None, task.images):
            self.accelerator.print(
                f"the data has {task.images} images instead of {self._images}: their order changes from this step"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self, task: TrainingTask) -> None:
        """Write a checkpoint of the current step unless it exists."""
        if self._saved_step == self.step:
            return
        progress: dict[str, Any] = {
            "seconds": self.seconds,
            "skipped": (self.skipped.total, self.skipped.in_a_row),
            "due": self._due,
            "images": task.images,
        }
        if (position := task.position(self.step)) is not None:
            progress["position"] = position
        self.checkpoints.save(self.step, progress)
        self._saved_step = self.step

    def _go_to(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.load(checkpoint)
        progress = checkpoint.progress
        self.step = self._saved_step = checkpoint.step
        self.seconds = self._clock = float(progress["seconds"])
        self.skipped.total, self.skipped.in_a_row = progress.get("skipped", (0, 0))
        self.position = progress.get("position")
        self._due, self._images = progress.get("due", False), progress.get("images")

    def check_resume(self) -> None:
        """Load the newest checkpoint and check that it equals the current state exactly (for dry runs)."""
        before = self.state.snapshot()
        found = self.checkpoints.latest()
        if found is None or found.step != self.step:
            raise RuntimeError(f"no checkpoint of step {self.step} in {self.output_dir}")
        self.checkpoints.load(found)
        differing = [name for name, value in self.state.snapshot().items() if not torch.equal(value, before[name])]
        if differing:
            raise RuntimeError(f"a reloaded checkpoint differs in {', '.join(differing[:5])}")

    # ----------------------------------------------------------------------------------------------------------------
    # Logs

    def _progress_bar(self) -> ProgressBar:
        total, main = max(self.step, self.config.max_train_steps), self.accelerator.is_main_process
        return ProgressBar(total, initial=self.step, batch_size=self.config.batch_size, enabled=main)

    def _log_step(self, result: StepResult, bar: ProgressBar) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        bar.update(self.step, {"loss": result.loss, "lr": rate}, self._time_fraction)
        if self._every(self.config.log_every) or self.step == 1 or self.finished:
            figures = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": rate, "ema_decay": self.state.decay}
            if self.skipped.total:
                figures["skipped_steps"] = self.skipped.total
            speed = {"images_per_second": bar.images_per_second, "seconds": round(self.seconds, 2)}
            self._log({**figures, **speed})

    def _log(self, values: Mapping[str, float]) -> None:
        self.metrics.write(self.step, values)
        self.accelerator.log(dict(values), step=self.step)

    def _plot(self) -> None:
        if self.accelerator.is_main_process:
            path = self.output_dir / "loss_curve.png"
            plot_curves(self.metrics.path, path, curves=self.curves, title=self.output_dir.name)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep only numbers, strings and booleans, the types that trackers accept."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
