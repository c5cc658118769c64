"""GGSA's Triton kernels without a GPU: values and gradients by the interpreter, compilation for GPUs, fake tensors."""

import pytest
import torch

pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

import triton_checks
from torch._subclasses.fake_tensor import FakeTensorMode

from iptv2_diffusion.kernels import triton_ggsa

MAPS = ("qkv", "out", "grad", "grad_qkv")
NUMBERS = (
    *("stride_b", "stride_y", "stride_x", "height", "width"),
    *("step_y", "step_x", "columns", "tokens", "blocks", "heads"),
)


def test_values_gradients_and_tracing_under_the_interpreter():
    triton_checks.run_interpreted("interpreted_ggsa.py")


def compile_kernel(target, kernel, dtype, head_dim, side):
    qkv = torch.empty(1, side, side, 3 * head_dim, dtype=getattr(torch, dtype), device="meta")
    _, _, constants = triton_ggsa.geometry(qkv, 1, 1, 1)
    constants["num_warps"] = triton_ggsa.warps(constants["BLOCK_D"], target == "hip")
    triton_checks.check_resources(target, kernel, dtype, MAPS, NUMBERS, constants)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "hip"])
def test_the_backward_compiles_without_spills(target):
    compile_kernel(target, triton_ggsa.backward_kernel, "bfloat16", 32, 16)


def test_the_forward_compiles_without_spills():
    compile_kernel("sm_90", triton_ggsa.forward_kernel, "bfloat16", 32, 16)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "hip"])
@pytest.mark.parametrize("head_dim", [8, 32, 36, 64])
@pytest.mark.parametrize("kernel", [triton_ggsa.forward_kernel, triton_ggsa.backward_kernel], ids=["fwd", "bwd"])
def test_every_shape_compiles_without_spills(target, head_dim, kernel):
    for side in (4, 16):
        for dtype in ("bfloat16", "float16", "float32"):
            compile_kernel(target, kernel, dtype, head_dim, side)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_any_device(device):
    """Shapes and dtypes of the forward and of every gradient, without a kernel."""
    with FakeTensorMode():
        qkv = torch.empty(2, 9, 13, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
        scale = torch.ones(2, device=device, requires_grad=True)
        out = triton_ggsa.grid_attention(qkv, scale, 2, (2, 3))
        assert (out.shape, out.dtype, out.device.type) == ((2, 9, 13, 32), torch.bfloat16, device)
        if device == "cuda":
            return  # autograd asks the driver for the device
        for x, grad in zip((qkv, scale), torch.autograd.grad(out.float().sum(), (qkv, scale)), strict=True):
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


def test_a_cpu_keeps_the_plain_formula():
    assert not triton_ggsa.supports(torch.empty(1, 4, 4, 24), 1, (2, 2))
