"""FCSA's Triton kernels without a GPU: values and gradients by the interpreter, compilation for GPUs, fake tensors."""

import pytest
import torch

pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

import triton_checks
from torch._subclasses.fake_tensor import FakeTensorMode

from iptv2_diffusion.kernels import triton_fcsa

MAPS = ("qkv", "out", "grad", "grad_qkv")
NUMBERS = ("stride_b", "stride_y", "stride_x", "height", "width", "rows", "columns", "heads")


def test_values_gradients_and_tracing_under_the_interpreter():
    triton_checks.run_interpreted("interpreted_fcsa.py")


def compile_kernel(target, kernel, dtype, head_dim, window, shifted):
    qkv = torch.empty(1, 2 * window, 2 * window, 3 * head_dim, dtype=getattr(torch, dtype), device="meta")
    _, _, constants = triton_fcsa.geometry(qkv, 1, window, shifted)
    if kernel is triton_fcsa.backward_kernel:
        constants["MERGED"] = True
    triton_checks.check_resources(target, kernel, dtype, MAPS, NUMBERS, constants)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "hip"])
def test_the_largest_kernel_compiles_without_spills(target):
    compile_kernel(target, triton_fcsa.backward_kernel, "bfloat16", 32, 8, shifted=True)


def test_the_forward_compiles_without_spills():
    compile_kernel("sm_90", triton_fcsa.forward_kernel, "bfloat16", 32, 8, shifted=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "hip"])
@pytest.mark.parametrize(("head_dim", "window"), [(32, 8), (64, 8), (25, 16), (8, 4)])
@pytest.mark.parametrize("kernel", [triton_fcsa.forward_kernel, triton_fcsa.backward_kernel], ids=["fwd", "bwd"])
def test_every_shape_compiles_without_spills(target, head_dim, window, kernel):
    for shifted in (False, True):
        for dtype in ("bfloat16", "float16"):
            compile_kernel(target, kernel, dtype, head_dim, window, shifted)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("merged", [True, False])
def test_fake_tensors_of_any_device(device, merged):
    """Shapes and dtypes of the forward and of every gradient, without a kernel."""
    with FakeTensorMode():
        qkv = torch.empty(2, 9, 13, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
        affine, logits = (torch.ones(2, 2, 16, device=device, requires_grad=True) for _ in range(2))
        temperature = torch.ones(2, 2, device=device, requires_grad=True)
        out = triton_fcsa.focal_attention(qkv, affine, temperature, logits if merged else None, 2, 4)
        assert (out.shape, out.dtype, out.device.type) == ((2, 9, 13, 32), torch.bfloat16, device)
        if device == "cuda":
            return  # autograd asks the driver for the device
        inputs = (qkv, affine, temperature, *((logits,) if merged else ()))
        for x, grad in zip(inputs, torch.autograd.grad(out.float().sum(), inputs), strict=True):
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


def test_a_cpu_keeps_the_plain_formula():
    assert not triton_fcsa.supports(torch.empty(1, 4, 4, 24), 1, 2)
