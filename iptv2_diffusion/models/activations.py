"""How much memory the activations of a forward pass take, found without running it.

The model's operations run on fake tensors, which have sizes but no contents; followed is which storages are alive.
"""

import json
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .restoration_iptv2 import IPTV2RestorationModel

__all__ = ["LiveStorages", "activation_bytes_per_pixel"]


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations made inside this mode and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Leave these tensors' storages out."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def activation_bytes_per_pixel(model: IPTV2RestorationModel) -> float:
    """The most bytes alive at once in a forward without gradients, input and output too, per pixel of an image.

    Of a square of four windows' reach (4 · `granularity`) at batch 1 and the model's dtype; larger images take up to
    3 % more. Found once per configuration, in half a second.
    """
    return _bytes_per_pixel(type(model), model.to_json_string(), next(model.parameters()).dtype, 4 * model.granularity)


@lru_cache(maxsize=16)
@torch.no_grad()
def _bytes_per_pixel(model_class: type[IPTV2RestorationModel], config: str, dtype: torch.dtype, side: int) -> float:
    with FakeTensorMode():
        model = model_class.from_config(json.loads(config)).eval()
        model.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()}, assign=True)
        sigma = None if model.config.sigma_conditioning is None else 25.0
        task = None if model.config.num_tasks is None else 0
        with LiveStorages() as live:
            live.ignore([*model.parameters(), *model.buffers()])
            model(torch.empty(1, model.config.in_channels, side, side, dtype=dtype), sigma, task)
    return live.peak / side**2
