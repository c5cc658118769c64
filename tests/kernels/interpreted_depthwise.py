"""The depthwise kernels under Triton's interpreter against PyTorch's convolution; see interpreted_fcsa.py for how."""

import pytest
import torch
import torch.nn.functional as F

from iptv2_diffusion.kernels import triton_depthwise

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain(x, weight, bias, identity, gelu):
    x = F.gelu(x) if gelu else x
    out = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return out + x if identity else out


# (B, C, H, W), kernel, bias, identity, gelu, dtype, channels-last
CASES = [
    ((2, 5, 4, 7), 3, True, False, False, torch.float32, True),
    ((1, 20, 6, 5), 5, True, True, True, torch.float32, True),
    ((2, 3, 1, 9), 5, False, True, False, torch.float32, False),
    ((1, 70, 3, 3), 3, True, False, True, torch.float32, True),
    ((1, 2, 30, 20), 3, True, False, False, torch.float32, True),  # several blocks of positions and of their sums
    ((1, 16, 5, 5), 5, True, True, True, torch.bfloat16, True),
    ((1, 16, 5, 5), 3, True, False, False, torch.float16, False),
]


@pytest.mark.parametrize(("shape", "size", "bias", "identity", "gelu", "dtype", "channels_last"), CASES)
def test_value_and_every_gradient(shape, size, bias, identity, gelu, dtype, channels_last):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    weight = torch.randn(shape[1], 1, size, size, requires_grad=True)
    given = [x, weight, *([torch.randn(shape[1], requires_grad=True)] if bias else [])]
    grad = torch.randn(shape).to(dtype)
    assert triton_depthwise.supports(x, weight)
    out = triton_depthwise.depthwise(*given[:2], given[2] if bias else None, identity, gelu)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    doubles = [t.detach().double().requires_grad_() for t in given]
    exact = plain(*doubles[:2], doubles[2] if bias else None, identity, gelu)
    ours = (out, *torch.autograd.grad(out, given, grad))
    theirs = (exact, *torch.autograd.grad(exact, doubles, grad.double()))
    for name, a, b in zip(("out", "x", "weight", "bias"), ours, theirs, strict=False):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max(), name


def test_operator_contract():
    x = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(3, 1, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.iptv2.depthwise, (x, weight, bias, True, True))


def test_an_empty_batch_and_what_it_does_not_take():
    x, weight = torch.randn(0, 3, 4, 5, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    out = triton_depthwise.depthwise(x, weight, None)
    assert (torch.autograd.grad(out.sum(), weight)[0] == 0).all()
    assert not triton_depthwise.supports(x.double(), weight)
    assert not triton_depthwise.supports(x, torch.randn(3, 1, 7, 7))
    assert not triton_depthwise.supports(x, torch.randn(3, 3, 3, 3))
