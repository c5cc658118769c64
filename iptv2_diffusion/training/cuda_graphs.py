"""A model's forward and backward as CUDA graphs: recorded once for each shape, then replayed as two launches.

A training step of this package has about 2,000 small kernels. If these are short, the CPU that launches them limits the
speed at every batch size (docs/performance.md). torch's `make_graphed_callables` records the graphs. This module
prepares its arguments: positional tensors, and one recording for each set of shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iptv2_diffusion.training.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from iptv2_diffusion.training.options import TrainingConfig

__all__ = ["GraphedModel", "PositionalCall", "wants_graphs"]


def wants_graphs(config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Return whether this run records graphs. Raises a `ConfigError` if its options do not work with graphs."""
    if not config.cuda_graphs:
        return False
    if accelerator.device.type != "cuda":
        accelerator.print(f"cuda_graphs is on, but this run is on {accelerator.device}: nothing is recorded")
        return False
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"cuda_graphs is for one process, not {accelerator.num_processes}; leave it out, or try torch_compile"
        )
    if config.gradient_accumulation_steps > 1:
        # a replayed backward overwrites the gradients of the previous one
        raise ConfigError(
            f"cuda_graphs needs whole batches: gradient_accumulation_steps must be 1, not "
            f"{config.gradient_accumulation_steps}"
        )
    for other in config.not_with_cuda_graphs:
        if getattr(config, other):
            raise ConfigError(f"cuda_graphs does not work with {other}; leave one out")
    return True


class GraphedModel:
    """Call `model`, a module on a GPU, through graphs. Its parameters keep their memory, and its mode does not change.

    An output is valid only until the next call. A new set of shapes replaces the previous recording, because a
    recording keeps the memory of its activations.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._recorded: dict[tuple, nn.Module] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `model(*args, **kwargs)`. The arguments are constants and GPU tensors without gradient."""
        given = {**dict(enumerate(args)), **kwargs}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        constants = {key: value for key, value in given.items() if key not in tensors}
        key = (*((k, t.shape, t.dtype) for k, t in tensors.items()), *constants.items())
        if key not in self._recorded:
            samples = tuple(value.detach().clone() for value in tensors.values())
            call = PositionalCall(self.model, tuple(tensors), constants)
            # FCSA's shifted branch has unused parameters on maps of one window.
            self._recorded.clear()
            self._recorded[key] = torch.cuda.make_graphed_callables(call, samples, allow_unused_input=True)
        return self._recorded[key](*tensors.values())


class PositionalCall(nn.Module):
    """A call of a model as a function of only its tensors."""

    def __init__(self, model: nn.Module, names: tuple[int | str, ...], constants: dict[int | str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.constants = model, names, constants

    def forward(self, *tensors: Tensor) -> Any:
        given = {**dict(zip(self.names, tensors, strict=True)), **self.constants}
        args = [given[key] for key in sorted(key for key in given if isinstance(key, int))]
        return self.model(*args, **{key: value for key, value in given.items() if isinstance(key, str)})
