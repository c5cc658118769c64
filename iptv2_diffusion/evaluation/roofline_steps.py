"""Recording of a denoiser's step on the meta device for the roofline, with attention as a single operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iptv2_diffusion.evaluation.roofline import Recorder
from iptv2_diffusion.evaluation.timed_steps import parse_spec
from iptv2_diffusion.kernels import force_form, triton_fcsa, triton_ggsa
from iptv2_diffusion.models.attention import grid_attention as grid_attention_operator
from iptv2_diffusion.models.presets import PRESETS, create_model

__all__ = ["make_on_meta", "record"]


# ---------------------------------------------------------------------------------------------------------------------
# Operators that count as one kernel. Each cost function returns MACs, bytes and launches from the operator's arguments.


@torch.library.custom_op("roofline::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Placeholder of a fused attention kernel, which never stores its logits."""
    raise NotImplementedError("for counting only")


@attention.register_fake
def _(q, k, v):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("roofline::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Placeholder of the backward of a fused attention kernel."""
    raise NotImplementedError("for counting only")


@attention_backward.register_fake
def _(grad, q, k, v, out):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


attention.register_autograd(lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors), setup_context=_save)


def attention_cost(q, k, v) -> tuple[int, int, int]:
    """Two products."""
    macs = q.numel() * k.shape[-2] + v.numel() * q.shape[-2]
    return macs, sum(t.nbytes for t in (q, k, v)) + q.nbytes, 1


def attention_backward_cost(grad, q, k, v, out) -> tuple[int, int, int]:
    """Five products, one of which recomputes the logits, after a kernel that sums grad∘out."""
    macs = 5 * q.numel() * k.shape[-2]
    return macs, sum(t.nbytes for t in (grad, q, k, v, out)) + grad.nbytes + sum(t.nbytes for t in (q, k, v)), 2


def focal_cost(qkv, affine, temperature, merge_logits, heads, window) -> tuple[int, int, int]:
    return triton_fcsa.traffic(qkv.shape, qkv.element_size(), heads, window, merge_logits is not None)[0]


def focal_backward_cost(grad, qkv, affine, temperature, merge_logits, heads, window) -> tuple[int, int, int]:
    return triton_fcsa.traffic(qkv.shape, qkv.element_size(), heads, window, merge_logits is not None)[1]


def grid_cost(qkv, scale, heads, step_y, step_x) -> tuple[int, int, int]:
    return triton_ggsa.traffic(qkv.shape, qkv.element_size(), heads, (step_y, step_x))[0]


def grid_backward_cost(grad, qkv, scale, out, normaliser, heads, step_y, step_x) -> tuple[int, int, int]:
    return triton_ggsa.traffic(qkv.shape, qkv.element_size(), heads, (step_y, step_x))[1]


def grid_attention(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> Tensor:
    """Take the kernel for the groups that it supports on a GPU, and the plain formula for larger ones."""
    if triton_ggsa.fits(qkv, num_heads, stride):
        return triton_ggsa.grid_attention(qkv, scale, num_heads, stride)
    return grid_attention_operator.plain(qkv, scale, num_heads, stride)


OWN: dict[str, Callable[..., tuple[int, int, int]]] = {
    "attention": attention_cost,
    "attention_backward": attention_backward_cost,
    "focal_attention": focal_cost,
    "focal_attention_backward": focal_backward_cost,
    "grid_attention": grid_cost,
    "grid_attention_backward": grid_backward_cost,
}


class OneAttentionKernel(TorchFunctionMode):
    """Function mode that keeps `F.scaled_dot_product_attention` as one operator. The meta device would decompose it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attention(*args[:3]) if len(args) > 2 else attention(*(kwargs[n] for n in ("query", "key", "value")))
        return func(*args, **(kwargs or {}))


def record(model: nn.Module, batch_size: int, training: bool, form: str) -> Recorder:
    """Record a forward, or a forward and backward, of a denoiser on the meta device in the model's precision."""
    size, channels = model.config.sample_size, model.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(model.parameters()).dtype
    latents = torch.empty(batch_size, channels, height, width, device="meta", dtype=dtype)
    timestep, labels = (torch.zeros(batch_size, dtype=torch.long, device="meta") for _ in range(2))
    model.train(training).requires_grad_(training)
    recorder = Recorder(model, OWN)
    with ExitStack() as stack:
        if form == "kernels":
            stack.enter_context(force_form("focal_attention", triton_fcsa.focal_attention))
            stack.enter_context(force_form("grid_attention", grid_attention))
        stack.enter_context(OneAttentionKernel())
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(recorder)
        sample = model(latents, timestep, class_labels=labels, return_dict=False)[0]
        if training:
            sample.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return recorder


def make_on_meta(spec: str, size: int | None, precision: str, fused: bool) -> nn.Module:
    """Build a channels-last denoiser on the meta device from a preset's name or `name:key=value:…`."""
    name, overrides = parse_spec(spec)
    overrides = {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    if size is not None:
        overrides["sample_size"] = size
    if fused and name in PRESETS and hasattr(PRESETS[name].model_class, "fuse"):
        overrides["fused"] = True
    with torch.device("meta"):
        model = create_model(name, **overrides)
    return model.to(dtype=getattr(torch, precision), memory_format=torch.channels_last)
