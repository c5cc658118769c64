"""Fast forms of a few inner products, beneath the models that use them.

`models/` holds the plain formula of every operator, as the paper writes it, and marks it with `@operator`. A file here
holds a faster form of one of them for one kind of device. `registry.py` chooses between the two at each call. Nothing
here knows a model: these files import torch alone.

| file | operator | why PyTorch's own is not used there |
|---|---|---|
| `cpu_attention.py` | `focal_attention`, `grid_attention` | autograd makes three times as many passes |
| `cpu_depthwise.py` | `depthwise_conv2d` | oneDNN has no fast weight gradient for five columns |
| `cpu_linear.py` | `linear` | `F.linear` copies the bias first; GELU is one more pass |
| `cpu_scale_add.py` | `scale_add` | the backward of `torch.addcmul` makes two passes more |
| `triton_fcsa.py` | `focal_attention` | on a GPU: window copies, and four passes over maps of 3C channels |

docs/performance.md says what each form buys. `IPTV2_KERNELS=off`, or `use_fast_forms(False)`, runs the plain formulas
everywhere.
"""

# Each adds its forms to the registry.
from . import cpu_attention, cpu_depthwise, cpu_linear, cpu_scale_add, triton_fcsa  # noqa: F401
from .registry import fast_forms_in_use, operator, upcast, use_fast_forms, without_autocast

__all__ = ["fast_forms_in_use", "operator", "upcast", "use_fast_forms", "without_autocast"]
