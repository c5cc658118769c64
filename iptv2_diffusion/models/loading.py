"""Loaded weights that compute what the saved ones did, to the last bit."""

from typing import Any

from torch import Tensor, nn

__all__ = ["AlignedLoadingMixin", "align_weights"]

ALIGNMENT = 64  # bytes; where torch itself puts a tensor


def align_weights(model: nn.Module) -> None:
    """Copy, in place, the CPU weights that do not start where torch would have put them.

    safetensors leaves loaded weights where they lie in the file, and there some vector kernels sum in another order:
    the last bits of a result would differ from those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


class AlignedLoadingMixin:
    """For diffusers models, before `ModelMixin` in the bases: loading and saving do not change what is computed."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`, of which it takes all arguments; the weights are aligned."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)  # a pair with output_loading_info=True
        return loaded
