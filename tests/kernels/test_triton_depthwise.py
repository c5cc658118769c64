"""The depthwise Triton kernels without a GPU: values and gradients by the interpreter, and compilation for GPUs."""

import pytest
import torch

pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

import triton_checks

from iptv2_diffusion.kernels import triton_depthwise

NUMBERS = ("positions", "height", "width", "channels")


def test_values_gradients_and_tracing_under_the_interpreter():
    triton_checks.run_interpreted("interpreted_depthwise.py")


def compile_kernel(target, kernel, dtype, size, gelu):
    _, shape = triton_depthwise.blocks(torch.empty(1, 8, 8, 384, device="meta"))
    constants = {"SIZE": size, "GELU": gelu, **shape}
    if kernel is triton_depthwise.forward_kernel:
        constants |= {"BIAS": True, "IDENTITY": True, "TURNED": False, "SLOPE": gelu}
    else:
        constants["TILES"] = triton_depthwise.TILES
    maps = ("x", "slope_of", "out", "grad")
    triton_checks.check_resources(target, kernel, dtype, maps, NUMBERS, constants)


def test_the_forward_compiles_without_spills():
    compile_kernel("sm_90", triton_depthwise.forward_kernel, "bfloat16", 5, gelu=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "hip"])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("kernel", [triton_depthwise.forward_kernel, triton_depthwise.weight_kernel], ids=["fwd", "dw"])
def test_every_shape_compiles_without_spills(target, size, kernel):
    for dtype in ("bfloat16", "float32"):
        for gelu in (False, True):
            compile_kernel(target, kernel, dtype, size, gelu)


def test_a_cpu_keeps_the_plain_formula():
    assert not triton_depthwise.supports(torch.empty(1, 4, 4, 4), torch.empty(4, 1, 3, 3))
