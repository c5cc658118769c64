"""Explicit re-parameterisation of a whole model: what a trainable model and its deployed form are to each other."""

from typing import TypeVar

import torch
from torch import nn

from .feed_forward import RepLeFFN

Model = TypeVar("Model", bound="FusibleModelMixin")


class FusibleModelMixin:
    """For diffusers models whose `__init__` takes `fused` and whose feed-forwards are `RepLeFFN` (SPEC §5).

    `fuse()` never changes the model it is called on and does not depend on train() or eval().
    """

    @torch.no_grad()
    def fuse(self: Model) -> Model:
        """A new model of the same function with merged feed-forwards, for inference only; a fused model gives a copy.

        Saved and loaded like any other; `config.fused` tells it from a trainable one.
        """
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, RepLeFFN) and not module.fused:
                for key in module.state_dict():
                    del state[f"{name}.{key}"]
                state.update({f"{name}.{key}": value for key, value in module.fuse().state_dict().items()})
        with torch.device("meta"):
            deployed = type(self).from_config(self.config, fused=True)
        deployed.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
        return deployed.requires_grad_(False)

    def finish_fused_init(self) -> None:
        """Last line of a model's `__init__`: a fused model starts, and stays, in inference mode."""
        if self.config.fused:
            self.requires_grad_(False).eval()

    def train(self: Model, mode: bool = True) -> Model:
        if mode and self.config.fused:
            raise RuntimeError(
                f"this {type(self).__name__} is fused for inference and cannot train; train the unfused model and "
                "call fuse() on it again"
            )
        return nn.Module.train(self, mode)
