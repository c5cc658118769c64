"""Averaged weights (EMA): diffusers' `EMAModel`, saved by name inside the run's checkpoint.

    shadow <- d shadow + (1 - d) weights,   d(n) = min(decay, 1 - (1 + n)^-power)

The ramp of d lets short runs forget their random start: with power 3/4 it passes 0.99 at step 464 and 0.999 at 10 K.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

_FILE = "ema.safetensors"
_MODEL_FILE = "model.safetensors"


class ModelState:
    """The model's weights and their average, as the checkpoint stores them.

    Registers hooks with the accelerator, so that `save_state` and `load_state` carry both as safetensors under the
    plain parameter names: a checkpoint of two processes loads on one, and the files are usable without this class.

    Args:
        accelerator: after `prepare`; every process calls this.
        model: the prepared model.
        decay: largest decay; 0 turns averaging off, and the "averaged" weights are then the current ones.
        power: exponent of the ramp.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, *, decay: float = 0.9999, power: float = 0.75):
        self.accelerator = accelerator
        self.module = accelerator.unwrap_model(model)
        self.parameters = list(self.module.parameters())  # once: walking the modules costs a millisecond a time
        self.average: EMAModel | None = None
        if decay > 0:
            self.average = EMAModel(self.parameters, decay=decay, use_ema_warmup=True, power=power, foreach=True)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self) -> None:
        """Take the current weights into the average; call after every optimiser step."""
        if self.average is not None:
            self.average.step(self.parameters)

    @property
    def decay(self) -> float:
        """The decay that the last step used (0 before the first)."""
        return (self.average.cur_decay_value or 0.0) if self.average is not None else 0.0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The unwrapped model in eval mode holding the averaged weights; afterwards all is as before, bit for bit."""
        training = self.module.training
        kept = None if self.average is None else [p.detach().clone() for p in self.parameters]
        if self.average is not None:
            self.average.copy_to(self.parameters)
        self.module.eval()
        try:
            yield self.module
        finally:
            if kept is not None:
                with torch.no_grad():
                    torch._foreach_copy_(self.parameters, kept)
            self.module.train(training)

    def averaged_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's state dict with the averaged weights in it (detached; on the model's device)."""
        state = {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        if self.average is not None:
            names = [name for name, _ in self.module.named_parameters()]
            state.update(zip(names, self.average.shadow_params, strict=True))
        return state

    # ----------------------------------------------------------------------------------------------------------------
    # accelerate's hooks: what they leave in `weights`/`models` accelerate saves/loads itself, so both are emptied

    def _save(self, models: list[nn.Module], weights: list[dict[str, torch.Tensor]], output_dir: str) -> None:
        weights.clear()
        if not self.accelerator.is_main_process:
            return
        state = {name: tensor.detach().contiguous() for name, tensor in self.module.state_dict().items()}
        save_file(state, Path(output_dir) / _MODEL_FILE, metadata={"format": "pt"})
        if self.average is not None:
            names = [name for name, _ in self.module.named_parameters()]
            shadow = dict(zip(names, (p.contiguous() for p in self.average.shadow_params), strict=True))
            # One entry only: safetensors writes several in any order, and equal states must give equal files.
            metadata = {"optimization_step": str(self.average.optimization_step)}
            save_file(shadow, Path(output_dir) / _FILE, metadata=metadata)

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        state, _ = _read(Path(input_dir) / _MODEL_FILE)
        self.module.load_state_dict(state)
        if self.average is not None:
            state, metadata = _read(Path(input_dir) / _FILE)
            names = [name for name, _ in self.module.named_parameters()]
            with torch.no_grad():
                torch._foreach_copy_(
                    self.average.shadow_params, [state[name].to(self.parameters[0].device) for name in names]
                )
            self.average.optimization_step = int(metadata["optimization_step"])


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
