"""Conversion of a whole model between its trainable form and its deployed, re-parameterised form (model.md §5)."""

from typing import TYPE_CHECKING, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from iptv2_diffusion.kernels import is_quantized

from .feed_forward import RepLeFFN
from .layers import is_hooked

Model = TypeVar("Model", bound="FusibleModelMixin")
AnyModel = TypeVar("AnyModel", bound=ModelMixin)

if TYPE_CHECKING:  # a mixin of models; at run time it must not precede nn.Module
    from diffusers import ModelMixin as _Base
else:
    _Base = object


class FusibleModelMixin(_Base):
    """Mixin that adds `fuse()` and `unfuse()` to a diffusers model of `RepLeFFN` feed-forwards (model.md §5).

    The model's `__init__` must take the argument `fused`. Both methods return a new model, never change the one they
    are called on, and do not depend on `train()` or `eval()`.
    """

    @torch.no_grad()
    def fuse(self: Model) -> Model:
        """Return a new model that computes the same function with merged feed-forwards, for inference only.

        The new model can be saved and loaded, and its `config.fused` is True. A fused model returns a copy of itself.

        Raises:
            RuntimeError: a layer has an adapter, or a hook for offloading or casting, whose effect would be lost, or a
                quantised weight.
        """
        return self._converted(True).requires_grad_(False)

    @torch.no_grad()
    def unfuse(self: Model) -> Model:
        """Return a new, trainable model that computes the same function, to continue training from a deployed model.

        An unfused model returns a copy of itself.

        Raises:
            RuntimeError: as in `fuse()`.
            ValueError: `ffn_ratio` is below 2; see `RepLeFFN.unfuse`.
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
        """Raise a RuntimeError if a layer has an adapter, a quantised weight, or a hook for offloading or casting."""
        for name, module in self.named_modules():
            if hasattr(module, "base_layer"):  # PEFT's wrapper
                raise RuntimeError(
                    f"{name} carries an adapter, which fuse() would lose; merge it with fuse_lora() and unload_lora(), "
                    "or remove it with unload_lora(), before fuse()"
                )
            if any(is_quantized(weight) for weight in module.parameters(recurse=False)):
                raise RuntimeError(
                    f"{name} is quantised by torchao; call fuse() and save the model before quantising it"
                )
            has_weights = next(module.parameters(recurse=False), None) is not None
            if has_weights and is_hooked(module):
                raise RuntimeError(
                    f"{name} is offloaded or cast by a hook and has its weights only while it runs; call fuse() before "
                    "enabling offloading or layerwise casting"
                )

    def finish_fused_init(self) -> None:
        """Put a fused model in inference mode. The last line of the model's `__init__` calls this method."""
        if self.config.fused:
            self.requires_grad_(False).eval()

    def train(self: Model, mode: bool = True) -> Model:
        """As `nn.Module.train`. Raises a RuntimeError if a fused model would enter training mode."""
        if mode and self.config.fused:
            raise RuntimeError(
                f"this {type(self).__name__} is fused for inference and cannot train; train the unfused model and "
                "call fuse() on it again"
            )
        return nn.Module.train(self, mode)


def trainable(model: AnyModel) -> AnyModel:
    """Return the model itself, or `model.unfuse()` if it is fused."""
    return model.unfuse() if getattr(model.config, "fused", False) else model
