"""Explicit re-parameterisation of a whole model: what a trainable model and its deployed form are to each other."""

from typing import TypeVar

import torch
from torch import nn

from .feed_forward import RepLeFFN
from .layers import is_hooked

Model = TypeVar("Model", bound="FusibleModelMixin")
Module = TypeVar("Module", bound=nn.Module)


class FusibleModelMixin:
    """For diffusers models whose `__init__` takes `fused` and whose feed-forwards are `RepLeFFN` (model.md §5).

    `fuse()` never changes the model it is called on and does not depend on train() or eval().
    """

    @torch.no_grad()
    def fuse(self: Model) -> Model:
        """A new model of the same function with merged feed-forwards, for inference only; a fused model gives a copy.

        Saved and loaded like any other; `config.fused` tells it from a trainable one.

        Raises:
            RuntimeError: a layer carries an adapter or an offloading or casting hook, whose part would be lost.
        """
        return self._converted(True).requires_grad_(False)

    @torch.no_grad()
    def unfuse(self: Model) -> Model:
        """A new, trainable model of the same function, to train a deployed one on; an unfused model gives a copy.

        Raises:
            RuntimeError: as `fuse()`.
            ValueError: `ffn_ratio` is below 2, see `RepLeFFN.unfuse`.
        """
        return self._converted(False)

    def _converted(self: Model, fused: bool) -> Model:
        self.check_weights_are_plain()
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, RepLeFFN) and module.fused != fused:
                for key in module.state_dict():
                    del state[f"{name}.{key}"]
                converted = module.fuse() if fused else module.unfuse()
                state.update({f"{name}.{key}": value for key, value in converted.state_dict().items()})
        with torch.device("meta"):
            model = type(self).from_config(self.config, fused=fused)
        model.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
        return model

    def check_weights_are_plain(self) -> None:
        for name, module in self.named_modules():
            if hasattr(module, "base_layer"):  # PEFT's wrapper
                raise RuntimeError(
                    f"{name} carries an adapter, which fuse() would lose; merge it with fuse_lora() and unload_lora(), "
                    "or remove it with unload_lora(), before fuse()"
                )
            has_weights = next(module.parameters(recurse=False), None) is not None
            if has_weights and is_hooked(module):
                raise RuntimeError(
                    f"{name} is offloaded or cast by a hook and has its weights only while it runs; call fuse() before "
                    "enabling offloading or layerwise casting"
                )

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


def trainable(model: Module) -> Module:
    """The model itself, or where it is fused, its trainable form (`unfuse()`)."""
    return model.unfuse() if getattr(model.config, "fused", False) else model
