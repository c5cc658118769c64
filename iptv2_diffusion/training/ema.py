"""Exponential moving average (EMA) of the weights: diffusers' `EMAModel`, saved by name in the run's checkpoint.

    shadow <- d shadow + (1 - d) weights,   d(n) = min(decay, 1 - (1 + n)^-power)

The ramp of d lets short runs forget their random start. With power 3/4, d passes 0.99 at step 464 and 0.999 at 10 K.
Several averages by power functions of time (`power_ema.py`) can replace the one of constant length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from iptv2_diffusion.training.power_ema import PowerEMA, write_snapshot
from iptv2_diffusion.training.sharding import (
    forget_gathered,
    from_local,
    full_tensor,
    optimizer_tensors,
    shard_like,
    to_local,
)

StateDict = dict[str, torch.Tensor]

# Whole tensors on the CPU, only on the first process: no other process needs a second copy of the model.
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE = StateDictOptions(full_state_dict=True)  # whole tensors on every process, as read from a file

_MODEL_FILE = "model.safetensors"
_OPTIMIZER_FILE = "optimizer.bin"


class ModelState:
    """The model's weights and their average, as the checkpoint stores them.

    Hooks of the accelerator make `save_state` and `load_state` write and read both as safetensors under the plain
    parameter names. A checkpoint of two processes therefore loads on one, and the files are usable without this class.

    Args:
        accelerator: after `prepare`; every process calls this.
        model: the prepared model, sharded or not.
        optimizer: AdamW on its parameters, for sharded models and checkpoints.
        decay: largest decay. 0 turns averaging off, and the average equals the current weights.
        power: exponent of the ramp.
        sigma_rels: relative widths of power-function averages to keep instead. The first one is the average in use.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        decay: float = 0.9999,
        power: float = 0.75,
        sigma_rels: Sequence[float] = (),
    ):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.module = accelerator.unwrap_model(model)
        self.parameters = list(self.module.parameters())  # once, because iterating over the modules takes a millisecond
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters)
        # Averages of this process's shards, if the model is sharded. `averaged` and the results use the first.
        self.averages: list[EMAModel] = [PowerEMA(self._own(), sigma_rel) for sigma_rel in sigma_rels]
        if not sigma_rels and decay > 0:
            self.averages = [EMAModel(self._own(), decay=decay, use_ema_warmup=True, power=power, foreach=True)]
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self) -> None:
        """Update the averages with the current weights. Call this after every optimiser step."""
        own = self._own()
        for average in self.averages:
            average.step(own)

    def _own(self) -> list[torch.Tensor]:
        """Return this process's parts of the parameters."""
        return [to_local(p) for p in self.parameters] if self.sharded else self.parameters

    @property
    def averaged_steps(self) -> int:
        """Number of steps in the averages."""
        return self.averages[0].optimization_step if self.averages else 0

    @property
    def decay(self) -> float:
        """Decay of the last step (0 before the first)."""
        return (self.averages[0].cur_decay_value or 0.0) if self.averages else 0.0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Yield the unwrapped model in eval mode with the EMA weights, then restore its state bit for bit."""
        training = self.module.training
        own = self._own()
        kept = [p.detach().clone() for p in own] if self.averages else None
        if self.averages:
            self.averages[0].copy_to(own)
            forget_gathered(self.module)
        self.module.eval()
        try:
            yield self.module
        finally:
            if kept is not None:
                with torch.no_grad():
                    torch._foreach_copy_(own, kept)
                forget_gathered(self.module)
            self.module.train(training)

    def averaged_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict with the EMA weights (detached, on the model's device).

        If the model is sharded, the weights are gathered, and every process must call this.
        """
        state = {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        for average in self.averages[:1]:
            state |= self._by_name(average)
        return {name: full_tensor(tensor) for name, tensor in state.items()}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return complete copies of everything that a checkpoint restores: weights, averages, optimiser state."""
        tensors = {f"weights.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averaged_state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
        return {name: full_tensor(tensor).detach().clone() for name, tensor in tensors.items()}

    def write_snapshots(self, folder: Path, result: Callable[[StateDict], StateDict] = dict) -> None:
        """Write a snapshot of the power-function averages (see `power_ema.py`). All processes call this.

        `result` takes a state dict and returns the part of it that a result keeps.
        """
        for average in self.averages:
            tensors = self._gathered(average)
            if self.accelerator.is_main_process:
                write_snapshot(folder, average.optimization_step, average.sigma_rel, result(tensors))

    def _by_name(self, average: EMAModel) -> dict[str, torch.Tensor]:
        """Return an average by the names of the parameters, sharded like them."""
        pairs = zip(self.module.named_parameters(), average.shadow_params, strict=True)
        return {name: from_local(part, parameter) for (name, parameter), part in pairs}

    def _gathered(self, average: EMAModel) -> dict[str, torch.Tensor]:
        """Return a whole average on the CPU, empty on the other processes. If sharded, every process must call this."""
        main, state = self.accelerator.is_main_process, {}
        for name, tensor in self._by_name(average).items():
            whole = full_tensor(tensor)
            if main:
                state[name] = whole.contiguous().cpu()
        return state

    def _set_average(self, average: EMAModel, state: dict[str, torch.Tensor], steps: int) -> None:
        names = [name for name, _ in self.module.named_parameters()]
        parts = [to_local(shard_like(state[name], p)) for name, p in zip(names, self.parameters, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(average.shadow_params, parts)
        average.optimization_step = steps

    # ----------------------------------------------------------------------------------------------------------------
    # accelerate's hooks. accelerate saves or loads what they leave in `weights` or `models`, so both are emptied.

    def _save(self, models: list[nn.Module], weights: list[dict[str, torch.Tensor]], output_dir: str) -> None:
        weights.clear()
        main, folder = self.accelerator.is_main_process, Path(output_dir)
        if not main and not self.sharded:
            return
        state = get_model_state_dict(self.module, options=_GATHERED)
        shadows = [self._gathered(average) for average in self.averages]
        optimizer = self._gathered_optimizer() if self.sharded else None
        if not main:
            return
        save_file({k: v.contiguous() for k, v in state.items()}, folder / _MODEL_FILE, metadata={"format": "pt"})
        for number, (average, shadow) in enumerate(zip(self.averages, shadows, strict=True)):
            # Only one entry: safetensors writes several in any order, and equal states must give equal files.
            metadata = {"optimization_step": str(average.optimization_step)}
            save_file(shadow, folder / _file(number), metadata=metadata)
        if optimizer is not None:  # accelerate writes only optimisers that are not sharded
            torch.save(optimizer, folder / _OPTIMIZER_FILE)

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        folder = Path(input_dir)
        state, _ = _read(folder / _MODEL_FILE)
        missing = self.module.state_dict().keys() - state.keys()
        if missing:  # torch would leave these unchanged
            raise KeyError(f"{_MODEL_FILE} lacks {', '.join(sorted(missing)[:3])}")
        set_model_state_dict(self.module, state, options=_WHOLE)
        for number, average in enumerate(self.averages):
            state, metadata = _read(folder / _file(number))
            self._set_average(average, state, int(metadata["optimization_step"]))
        if self.sharded:
            self._load_optimizer(torch.load(folder / _OPTIMIZER_FILE, map_location="cpu", weights_only=True))
            forget_gathered(self.module)

    # Files number the parameters, as `Optimizer.state_dict` does. torch's functions for sharded state name them.

    def _optimized_names(self) -> list[str]:
        """Return the names of the parameters in the order of the optimiser's groups."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]

    def _gathered_optimizer(self) -> dict[str, Any]:
        """Return the optimiser's whole state dict, which is complete only on the first process."""
        optimizer_tensors(self.optimizer)  # torch would create missing state by a step of the optimiser
        gathered = get_optimizer_state_dict(self.module, self.optimizer, options=_GATHERED).get("state", {})
        state = {number: gathered[name] for number, name in enumerate(self._optimized_names()) if name in gathered}
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Load a state dict that is whole on every process into the sharded optimiser."""
        optimizer_tensors(self.optimizer)
        names = self._optimized_names()
        state = {names[number]: values for number, values in saved["state"].items()}
        groups = [{**group, "params": [names[number] for number in group["params"]]} for group in saved["param_groups"]]
        named = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.module, self.optimizer, named, options=_WHOLE)

    def lay_out_optimizer(self) -> None:
        """Convert loaded moments to the memory layout of their parameters, which fused AdamW requires.

        A sharded run, or one with another `channels_last`, writes another layout.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})  # a look-up by [] would create an entry
                for name, value in state.items():
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter.detach()).copy_(value)

    # ----------------------------------------------------------------------------------------------------------------
    # Sharded checkpoints: every process writes its part. Any number of processes can read them, sharded or not

    def save_sharded(self, folder: Path) -> None:
        """Write weights, averages and optimiser by torch.distributed.checkpoint. All processes call this."""
        checkpoint.save(self._sharded_state(), checkpoint_id=folder)

    def load_sharded(self, folder: Path) -> None:
        """Read the files of `save_sharded`. All processes call this."""
        state = self._sharded_state()
        checkpoint.load(state, checkpoint_id=folder)  # in place
        for number, average in enumerate(self.averages):
            average.optimization_step = int(state[_key(number, "average_steps")])
        forget_gathered(self.module)

    def _sharded_state(self) -> dict[str, Any]:
        weights = {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        state: dict[str, Any] = {"weights": weights, "optimizer": optimizer_tensors(self.optimizer)}
        for number, average in enumerate(self.averages):
            state[_key(number, "average")] = self._by_name(average)
            state[_key(number, "average_steps")] = torch.tensor(average.optimization_step)
        return state


def _key(number: int, name: str) -> str:
    """Return the name of an average's entry. The first, or only, average has the plain name."""
    return f"{name}_{number}" if number else name


def _file(number: int) -> str:
    return _key(number, "ema") + ".safetensors"


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
