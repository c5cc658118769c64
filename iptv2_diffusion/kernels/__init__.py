"""Faster implementations ("fast forms") of a few operators that the models use.

`models/` holds the plain formula of every operator, as the paper writes it, and marks it with `@operator`. Each file
here holds a fast form of one operator for one type of device. `registry.py` chooses between the two at each call.
These files import only torch and depend on no model.

| file | operator | cost of PyTorch's own version |
|---|---|---|
| `cpu_attention.py` | `focal_attention`, `grid_attention` | autograd makes three times as many passes over memory |
| `cpu_depthwise.py` | `depthwise_conv2d` | oneDNN has no fast weight gradient for kernels of five columns |
| `cpu_linear.py` | `linear` | `F.linear` copies the bias before the product; GELU is a separate pass |
| `cpu_scale_add.py` | `scale_add` | the backward of `torch.addcmul` makes two extra passes |
| `triton_fcsa.py` | `focal_attention` | on a GPU: window copies, and four passes over maps of 3C channels |
| `triton_ggsa.py` | `grid_attention` | on a GPU: grid copies, and separate passes for norms and rotations |

`strides.py` keeps the gradients of depthwise kernels in the strides that DDP expects.

docs/performance.md gives the speed-up of each form. Set `IPTV2_KERNELS=off`, or call `use_fast_forms(False)`, to run
the plain formulas everywhere.
"""

# Each adds its forms to the registry.
from . import cpu_attention, cpu_depthwise, cpu_linear, cpu_scale_add, triton_fcsa, triton_ggsa  # noqa: F401
from .registry import (
    fast_forms_in_use,
    force_form,
    has_symbolic_sizes,
    is_quantized,
    is_recording,
    operator,
    symbolic_form,
    upcast,
    use_fast_forms,
    without_autocast,
)

__all__ = [
    "fast_forms_in_use",
    "force_form",
    "has_symbolic_sizes",
    "is_quantized",
    "is_recording",
    "operator",
    "symbolic_form",
    "upcast",
    "use_fast_forms",
    "without_autocast",
]
