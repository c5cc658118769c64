"""The training loop that every train script shares.

A script describes *what* is trained as a `TrainingTask`; `Trainer` owns *how*: accelerate, AdamW, schedule, averaged
weights, accumulation, clipping, checkpoints and exact resumption, held-out losses, previews, logs, signals, NaN stop.

Everything random at step n must be drawn by the task as a pure function of (seed, n) (see `data/draws.py`). Then a
checkpoint needs no random state, and the loss curve depends neither on the number of processes nor on accumulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.memory import keep_freed_memory
from iptv2_diffusion.training.checkpoint import CheckpointManager, is_ours
from iptv2_diffusion.training.cuda_graphs import GraphedModel, wants_graphs
from iptv2_diffusion.training.ema import ModelState, StateDict
from iptv2_diffusion.training.errors import ConfigError, NonFiniteLossError, user_errors
from iptv2_diffusion.training.logging import MetricLog, ProgressBar, available_trackers, plot_curves
from iptv2_diffusion.training.optimisation import LearningRate, make_optimizer
from iptv2_diffusion.training.options import TrainingConfig, config_to_dict, frozen_fields, save_config
from iptv2_diffusion.training.power_ema import forget_snapshots_after
from iptv2_diffusion.training.precision import device_of_sums, fastest_precision
from iptv2_diffusion.training.sharding import refuse_other_sharding, shard, whole
from iptv2_diffusion.training.signals import Interrupted, StopSignal, no_interruption

# How long one process may wait for another, as for the one that writes a checkpoint or the samples at the end.
PROCESS_TIMEOUT = timedelta(hours=2)
FP16_HALVINGS = 30  # steps in a row that fp16 may overflow: from a loss scale of 65,536 to 6e-5


class TrainingTask(Protocol):
    """What is trained. Called by every process alike."""

    #: How many there are to train on, or None; told if it is another number after resumption.
    images: int | None
    #: Set by the trainer, for `evaluate` (and a `preview` that all processes draw) to call between batches, equally
    #: often on each process: it raises `Interrupted` if a stop was asked for. The work is then done after resumption.
    interrupt: Callable[[], None]

    def micro_batches(self, step: int) -> Iterable[Any]:
        """This process's `gradient_accumulation_steps` micro-batches of optimiser step `step` (from 0)."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a micro-batch: a scalar with gradient. `model` is the prepared one."""

    def evaluate(self, model: nn.Module, step: int, last: bool) -> Mapping[str, float]:
        """Held-out figures of the averaged weights after `step`, the same on every process; may be empty."""

    def preview(self, model: nn.Module, step: int) -> Path | None:
        """Write a picture from the averaged weights; None if there is none.

        Called on the main process only, unless the task has an attribute `works_together` that is true: then all
        processes are called, and `evaluate` and this run the model equally often in each, as a sharded model needs.
        """

    def position(self, step: int) -> Mapping[str, Any] | None:
        """Where the data are at the start of `step`, if its number does not say: `Trainer.position` after `resume`.

        Plain values, the same on every process; None, as a task without this method gives, if there is no more to say.
        """


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a training run; checks that the batch divides over processes and micro-batches."""
    accelerator = start_accelerator(config)
    check_batch_size("batch_size", config.batch_size, accelerator, config.gradient_accumulation_steps)
    return accelerator


def check_batch_size(name: str, batch_size: int, accelerator: Accelerator, micro_batches: int) -> None:
    """Raise `ConfigError` unless a batch, named `name`, divides over processes and micro-batches."""
    parts = accelerator.num_processes * micro_batches
    if batch_size % parts:
        raise ConfigError(
            f"{name} {batch_size} does not divide over {accelerator.num_processes} processes x {micro_batches} "
            f"micro-batches; use {math.ceil(batch_size / parts) * parts}"
        )


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator, for whatever batch."""
    refuse_other_sharding()
    trackers, messages = available_trackers(config.report_to)
    precision = config.mixed_precision
    if precision == "auto":
        # The processes meet here already, to agree. PartialState, unlike Accelerator, does not read the variable.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PROCESS_TIMEOUT)
        precision = fastest_precision()
    with user_errors(ValueError, ImportError):  # such as fp16 on a CPU
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
            # the loop divides by its micro-batches: accelerate must not, whatever the environment says
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    if accelerator.device.type == "cuda":  # elsewhere too this sets the precision of float32 products
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_threads(config.num_threads, accelerator)
    for message in messages:
        accelerator.print(message)
    return accelerator


def set_threads(num_threads: int | None, accelerator: Accelerator) -> None:
    """CPU threads of this process. `accelerate launch` sets one a process, which leaves a CPU run's cores idle."""
    if num_threads is None and accelerator.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_threads = max(1, available_cores() // max(1, processes))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trainer:
    """Trains a model on a task, from the newest checkpoint of the output folder if there is one.

    Args:
        config: the run; `config.output_dir` is created and gets config.yaml, metrics.jsonl and checkpoints.
        accelerator: from `make_accelerator`.
        model: the bare model, on any device, in float32.
        curves: names of the metrics drawn in loss_curve.png.
        result: takes the model's state dict and returns the part of it that a result keeps, for snapshots of averages.
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
        graphs = wants_graphs(config, accelerator)
        self.config, self.accelerator, self.curves, self.result = config, accelerator, curves, result
        self.output_dir = Path(config.output_dir)
        with user_errors(OSError, ValueError):
            if accelerator.is_main_process:
                claim_run_folder(self.output_dir)
            self.output_dir.mkdir(parents=True, exist_ok=True)
        model.to(accelerator.device)
        self.sharded = config.sharding != "none" and accelerator.num_processes > 1
        if config.sharding != "none" and not self.sharded:
            accelerator.print(f"sharding is {config.sharding}, but there is one process only: nothing is sharded")
        if config.channels_last and not self.sharded:  # fully_shard takes contiguous parameters only
            model.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.torch_compile:
            compile_blocks(model)
        if self.sharded and accelerator.mixed_precision == "fp16":  # as `accelerate launch` may have it
            raise ConfigError("sharding does not go with fp16, whose loss scaling it lacks; use bf16")
        if self.sharded:
            shard(model, accelerator, reshard_after_forward=config.sharding == "zero3")
        optimizer = make_optimizer(model, config, fused=accelerator.scaler is None)
        self.schedule = LearningRate(optimizer, config)
        if self.sharded:  # the engine is torch's: accelerate only adds its autocast
            self.model, self.optimizer = accelerator.prepare_model(model, evaluation_mode=True), optimizer
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._trained = GraphedModel(self.model) if graphs else self.model  # what the losses call
        self.state = ModelState(
            accelerator,
            self.model,
            self.optimizer,
            decay=config.ema_decay,
            power=config.ema_power,
            sigma_rels=config.ema_sigma_rels if config.ema == "power" else (),
        )
        self.snapshots = self.output_dir / "ema"  # of power-function averages
        self.checkpoints = CheckpointManager(
            self.output_dir,
            accelerator,
            frozen_fields(config),
            defaults=frozen_fields(type(config)()),
            accept_changes=config.accept_changes,
            keep_last=config.keep_last,
            state=self.state,
            sharded=self.sharded and config.sharded_checkpoints,
        )
        self.step = 0  # optimiser steps done
        self.position: Mapping[str, Any] | None = None  # of the data, as the task told it when the checkpoint was saved
        self._task: TrainingTask | None = None
        self.seconds = 0.0  # spent in training steps over all resumptions; all processes agree on it
        self._clock = 0.0  # the same, as this process measures it
        self._budget = 60.0 * config.max_train_minutes if config.max_train_minutes else math.inf
        self._saved_step = -1
        self._images: int | None = None  # of the training data when the checkpoint was saved
        self._due = False  # whether what follows a step (`_after_step`) is still to be done for this one
        self.skipped = self._skipped_in_a_row = 0  # steps whose loss or gradient was not finite
        self._next_batches: list[Any] = []

    # ----------------------------------------------------------------------------------------------------------------
    # Running

    def resume(self) -> int:
        """Go to the newest whole checkpoint, or start new; returns the steps already done."""
        if self.config.overwrite:
            self.checkpoints.delete_all()
        found = self.checkpoints.latest()
        if found is not None:
            self.checkpoints.load(found)
            self.step = found.step
            self.seconds = self._clock = float(found.progress["seconds"])
            self.skipped, self._skipped_in_a_row = found.progress.get("skipped", (0, 0))
            self.position = found.progress.get("position")
            self._due, self._images = found.progress.get("due", False), found.progress.get("images")
            self._saved_step = found.step
            self.accelerator.print(f"resumed from {found.path} at step {self.step}")
        main = self.accelerator.is_main_process
        if main:
            forget_snapshots_after(self.snapshots, self.state.averaged_steps)
        path = self.output_dir / "metrics.jsonl"
        self.metrics = MetricLog(path, resumed_step=self.step, evaluated=not self._due, enabled=main)
        if main:
            # Without what holds for one start only: a run begun from this file must not delete anything.
            once: dict[str, Any] = {"overwrite": False, "accept_changes": False}
            if self.config.mixed_precision == "auto":
                once["mixed_precision"] = (
                    self.accelerator.mixed_precision
                )  # what this machine was found to be fast with
            save_config(dataclasses.replace(self.config, **once), self.output_dir / "config.yaml")
        self.accelerator.init_trackers("logs", config=_flat(config_to_dict(self.config)))
        return self.step

    def fit(self, task: TrainingTask) -> str | None:
        """Train to the end. Returns None, or the name of the signal that stopped the run (saved, and told)."""
        config, self._task = self.config, task
        if self.sharded and not _works_together(task):
            raise ConfigError(f"sharding is {config.sharding}; this training runs unsharded only: use --sharding none")
        images = getattr(task, "images", None)
        if self._images not in (None, images):
            self.accelerator.print(f"the data has {images} images now, {self._images} before: their order changes here")
        bar = ProgressBar(
            max(self.step, config.max_train_steps),
            initial=self.step,
            batch_size=config.batch_size,
            enabled=self.accelerator.is_main_process,
        )
        with StopSignal() as stop:
            task.interrupt = partial(self._interrupt, stop)
            try:
                if self._due:
                    self._after_step(task, bar)
                while not self.finished:
                    started = time.perf_counter()
                    values = self._train_step(task, stop)
                    self._clock += time.perf_counter() - started
                    bar.update(self.step, {"loss": values["loss"], "lr": values["lr"]}, self._time_fraction)
                    self._log_step(values, bar)
                    self._due = True
                    if values["stop"] > 0:
                        raise Interrupted
                    self._after_step(task, bar)
                self.save()
            except Interrupted:
                self.save()
                reason = stop.reason or "a signal to another process"
                bar.say(f"stopped by {reason} at step {self.step}, saved; the same command goes on from there")
                return reason
            finally:
                task.interrupt = no_interruption
                bar.close()
        return None

    def _interrupt(self, stop: StopSignal) -> None:
        """Raise `Interrupted` on every process if one of them was asked to stop."""
        asked = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum") > 0:
            raise Interrupted

    @property
    def fraction(self) -> float:
        """How much of the run is done, in [0, 1]: steps or time, whichever is further along."""
        return min(1.0, max(self.step / self.config.max_train_steps, self._time_fraction))

    @property
    def _time_fraction(self) -> float:
        """How much of the time budget is spent; 0 where there is none."""
        return self.seconds / self._budget

    @property
    def finished(self) -> bool:
        """Whether the run has reached its number of steps or its time."""
        return self.fraction >= 1.0

    @property
    def command_to_train_longer(self) -> str:
        """This run's command, for twice its steps and for whatever time they take."""
        words = ["accelerate launch", *(shlex.quote(word) for word in sys.argv), f"--max_train_steps {2 * self.step}"]
        words += ["--overwrite false"] if self.config.overwrite else []
        words += ["--max_train_minutes none"] if self.config.max_train_minutes else []
        return " ".join(words)

    def save(self) -> None:
        """Write a checkpoint of the current step, if it has none yet."""
        if self._saved_step != self.step:
            skipped = (self.skipped, self._skipped_in_a_row)
            progress: dict[str, Any] = {"seconds": self.seconds, "skipped": skipped, "due": self._due}
            progress["images"] = getattr(self._task, "images", None)
            tell = getattr(self._task, "position", None)
            if tell is not None and (position := tell(self.step)) is not None:
                progress["position"] = position
            self.checkpoints.save(self.step, progress)
            self._saved_step = self.step

    def check_resume(self) -> None:
        """Load the newest checkpoint and check that it holds the present state exactly (for dry runs)."""
        before = self._snapshot()
        found = self.checkpoints.latest()
        if found is None or found.step != self.step:
            raise RuntimeError(f"no checkpoint of step {self.step} in {self.output_dir}")
        self.checkpoints.load(found)
        differing = [name for name, value in self._snapshot().items() if not torch.equal(value, before[name])]
        if differing:
            raise RuntimeError(f"a reloaded checkpoint differs in {', '.join(differing[:5])}")

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies of all that a checkpoint must bring back: weights, averages, optimiser state."""
        tensors = {f"weights.{k}": v for k, v in self.state.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.state.averaged_state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
        return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Draw the loss curve and close the trackers."""
        self._plot()
        self.accelerator.end_training()

    # ----------------------------------------------------------------------------------------------------------------
    # One step

    def _train_step(self, task: TrainingTask, stop: StopSignal) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        rate = self.schedule.set(self.step, self._time_fraction)
        total = torch.zeros((), device=accelerator.device)
        batches = self._next_batches or list(task.micro_batches(self.step))
        for index, batch in enumerate(batches):
            # Gradients are averaged over the processes once a step, with the last micro-batch.
            with accelerator.no_sync(self.model) if index + 1 < len(batches) else contextlib.nullcontext():
                loss = task.loss(self._trained, batch) / len(batches)
                accelerator.backward(loss)
            total += loss.detach()
        # Drawn and sent while the device still computes: `_agree` waits for it.
        self._next_batches = list(task.micro_batches(self.step + 1)) if self.step + 1 < config.max_train_steps else []
        limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        norm = whole(accelerator.clip_grad_norm_(self.state.parameters, limit))
        values = self._agree(total, norm, bool(stop))
        skipped = self._problem(values)
        if skipped:
            self._skip_or_stop(skipped, config.max_skipped_steps)
        if not skipped or accelerator.scaler is not None:  # fp16's scaler must see every step, to halve its scale
            self.optimizer.step()
        if not skipped and accelerator.scaler is not None and self.optimizer.step_was_skipped:
            skipped = f"fp16 overflows; the loss scale becomes {accelerator.scaler.get_scale():g}"
            self._skip_or_stop(skipped, FP16_HALVINGS)
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped:
            self._skipped_in_a_row = 0
            self.state.step()
        self.step += 1
        counter = {"skipped_steps": self.skipped} if self.skipped else {}
        return {**values, "lr": rate, "ema_decay": self.state.decay, **counter}

    def _agree(self, loss: Tensor, norm: Tensor, stop: bool) -> dict[str, float]:
        """Loss (mean over processes), gradient norm, stop flag and time: the same numbers on every process.

        Reading them waits for the device, once a step and before the weights are touched: a NaN never enters them.
        """
        device = device_of_sums(self.accelerator)
        own = torch.tensor([float(stop), self._clock], dtype=torch.float64, device=device)
        figures = torch.stack([loss, torch.as_tensor(norm, device=loss.device)])
        vector = torch.cat([figures.to(device).double(), own])
        if self.accelerator.num_processes > 1:
            vector = self.accelerator.reduce(vector, "mean")
        loss_value, norm_value, stop_value, self.seconds = vector.tolist()
        return {"loss": loss_value, "grad_norm": norm_value, "stop": stop_value}

    def _problem(self, values: Mapping[str, float]) -> str | None:
        """What is not finite; None if all is well."""
        if not math.isfinite(values["loss"]):
            return f"the loss is {values['loss']}"
        # With fp16 an infinite gradient is everyday: the scaler skips the step and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(values["grad_norm"]):
            return f"the gradient norm is {values['grad_norm']}"
        return None

    def _skip_or_stop(self, problem: str, limit: int) -> None:
        """Count a step whose weights are not to be touched, and tell; stop after more than `limit` in a row."""
        self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
        if self._skipped_in_a_row <= limit:
            self.accelerator.print(
                f"{problem} at step {self.step + 1}: skipped ({self._skipped_in_a_row} in a row, stops after {limit}; "
                f"{self.skipped} in all)"
            )
            return
        kept = f"checkpoint-{self._saved_step:08d} is kept" if self._saved_step >= 0 else "there was no checkpoint yet"
        after = f" after {limit} skipped steps" if limit else ""
        raise NonFiniteLossError(
            f"{problem} at step {self.step + 1}: stopped{after} before the weights were touched; {kept}. Go on with "
            f"--accept_changes and a lower --learning_rate (now {self.config.learning_rate:g}), with bf16 instead of "
            f"fp16, or with --max_skipped_steps {max(10, 2 * limit)} if such steps are rare"
        )

    def _log_step(self, values: Mapping[str, float], bar: ProgressBar) -> None:
        if self.step % self.config.log_every == 0 or self.step == 1 or self.finished:
            row = {k: v for k, v in values.items() if k != "stop"}
            self._log({**row, "images_per_second": bar.images_per_second, "seconds": round(self.seconds, 2)})

    def _after_step(self, task: TrainingTask, bar: ProgressBar) -> None:
        """Held-out losses, previews and checkpoints that are due after `self.step` steps.

        The checkpoint comes last: a run killed in between repeats what was due, and its log reads as if undisturbed.
        """
        config, last, worked = self.config, self.finished, False
        if config.ema == "power" and (self.step % config.ema_snapshot_every == 0 or last):
            with user_errors(OSError, SafetensorError):
                self.state.write_snapshots(self.snapshots, self.result)
            worked = True
        if config.eval_every and (self.step % config.eval_every == 0 or last):
            with self.state.averaged() as model:
                figures = dict(task.evaluate(model, self.step, last))
            if figures:
                self._log(figures)
                bar.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            worked = True
        if config.preview_every and (self.step % config.preview_every == 0 and not last):
            if self.accelerator.is_main_process or _works_together(task):
                with self.state.averaged() as model:
                    task.preview(model, self.step)
            self._plot()
            worked = True
        self._due = False
        if config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self.save()
            worked = True
        if worked:
            bar.pause()

    def _log(self, values: Mapping[str, float]) -> None:
        self.metrics.write(self.step, values)
        self.accelerator.log(dict(values), step=self.step)

    def _plot(self) -> None:
        if self.accelerator.is_main_process:
            path = self.output_dir / "loss_curve.png"
            plot_curves(self.metrics.path, path, curves=self.curves, title=self.output_dir.name)


def _works_together(task: TrainingTask) -> bool:
    return getattr(task, "works_together", False)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile in place: the repeated blocks where the model names them (fast to compile), else the whole."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(dynamic=False)  # dynamic shapes recompile slowly, and there are few shapes
    else:
        model.compile()


def claim_run_folder(folder: Path) -> OwnFolder:
    """A run's output folder with our record; a `ForeignFolderError`, a ValueError, for a folder of something else."""

    def made_before_records(folder: Path) -> list[str] | None:
        known = (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
        known = known or any(is_ours(path) for path in folder.glob("*checkpoint-*"))
        return [] if known else None

    return OwnFolder.claim(folder, "a training run", earlier=made_before_records)


RunConfig = TypeVar("RunConfig", bound=TrainingConfig)


def prepare_dry_run(config: RunConfig, **shorter: Any) -> RunConfig:
    """Shorten a configuration so that every stage runs once: two steps, a checkpoint and a preview after the first.

    Args:
        config: the whole run. The output folder of its dry run, OUTPUT_DIR/dry_run, is emptied here.
        shorter: options of the recipe that are cut as well.
    """
    folder = Path(config.output_dir) / "dry_run"
    if os.environ.get("RANK", "0") == "0":
        with user_errors(OSError, ValueError):
            claim_run_folder(folder.parent)
            claim_run_folder(folder)  # refuses a folder of that name that is not ours
        shutil.rmtree(folder, ignore_errors=True)
    every = dict.fromkeys(("checkpoint_every", "eval_every", "preview_every", "log_every"), 1)
    length = {"max_train_steps": 2, "max_train_minutes": None}
    return dataclasses.replace(config, output_dir=str(folder), report_to="none", **length, **every, **shorter)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Trackers take numbers, words and booleans only."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
