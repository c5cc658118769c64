"""The depthwise convolution, whose 5×5 weight gradient on a CPU consists of two gradients of 5×3."""

from __future__ import annotations

import pytest
import references
import torch
import torch.nn.functional as F

from iptv2_diffusion.models.layers import DepthwiseConv2d, depthwise_conv2d, merge_depthwise

SIZES = [(16, 16), (7, 5), (6, 8), (2, 3), (1, 6), (1, 1)]


def convolution(kernel_size=5, bias=True) -> DepthwiseConv2d:
    torch.manual_seed(0)
    return references.randomize_(DepthwiseConv2d(6, kernel_size, bias=bias), 0.3)


def gradients(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, convolve) -> list[torch.Tensor]:
    """Output, then the gradients of the input, weight and bias, for a fixed random gradient of the output."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    out = convolve(*leaves) if bias is not None else convolve(*leaves, None)
    out.backward(references.random_map(*out.shape, seed=7).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def plain(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class TestAgainstPlainConvolution:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_bfloat16_output_and_gradients(self, size, bias):
        """Within bfloat16's rounding of the float64 result from the same numbers."""
        layer = convolution(bias=bias).bfloat16()
        x = references.random_map(3, 6, *size).bfloat16()
        actual = gradients(x, layer.weight, layer.bias, depthwise_conv2d)
        doubles = [None if leaf is None else leaf.double() for leaf in (x, layer.weight, layer.bias)]
        for ours, exact in zip(actual, gradients(*doubles, plain), strict=True):
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.double(), exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item())

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    def test_float64_is_the_plain_convolution(self, kernel_size, size):
        layer, x = convolution(kernel_size).double(), references.random_map(2, 6, *size).double()
        actual = gradients(x, layer.weight, layer.bias, depthwise_conv2d)
        expected = gradients(x, layer.weight, layer.bias, plain)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class TestOwnGradient:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_it_is_used_for_5x5_alone(self, dtype):
        x = references.random_map(1, 6, 8, 8).to(dtype)
        names = {size: convolution(size).to(dtype)(x).grad_fn.name() for size in (1, 3, 5)}
        assert [size for size, name in names.items() if "Depthwise5x5" in name] == [5]

    def test_autocast_gives_float32_parameters_float32_gradients(self):
        layer, x = convolution(), references.random_map(2, 6, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert "Depthwise5x5" in out.grad_fn.name()
        gradient = references.random_map(*out.shape, seed=7)
        out.backward(gradient.bfloat16())
        expected = gradients(x, layer.weight, layer.bias, plain)[2:]
        for parameter, exact in zip((layer.weight, layer.bias), expected, strict=True):
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())

    @pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
    def test_what_is_frozen_gets_no_gradient(self, frozen):
        layer = convolution().bfloat16()
        leaves = {"x": references.random_map(1, 6, 8, 8).bfloat16(), "weight": layer.weight, "bias": layer.bias}
        leaves = {name: leaf.detach().clone().requires_grad_(name != frozen) for name, leaf in leaves.items()}
        depthwise_conv2d(*leaves.values()).float().square().sum().backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]

    def test_compiles_into_one_graph(self):
        layer, x = convolution().bfloat16(), references.random_map(1, 6, 8, 8).bfloat16()
        layer(x).float().square().sum().backward()
        expected = layer.weight.grad.clone()
        layer.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x).float().square().sum().backward()
        torch._dynamo.reset()
        torch.testing.assert_close(layer.weight.grad, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


class TestMergedKernels:
    @pytest.mark.parametrize("sizes", [(5, 3, 1), (5,), (3,)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_sum_of_the_branches_and_the_identity(self, sizes, bias):
        x = references.random_map(2, 6, 9, 7).double()
        branches = [convolution(size, bias).double() for size in sizes]
        expected = sum((plain(x, branch.weight, branch.bias) for branch in branches), x)
        torch.testing.assert_close(plain(x, *merge_depthwise(*branches)), expected)

    def test_gradient(self):
        branches = [convolution(size).double() for size in (5, 3, 1)]
        x = references.random_map(2, 6, 9, 7).double()
        parameters = [parameter for branch in branches for parameter in branch.parameters()]
        ours = torch.autograd.grad(plain(x, *merge_depthwise(*branches)).square().sum(), parameters)
        theirs = torch.autograd.grad(sum((branch(x) for branch in branches), x).square().sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)

    def test_gradients_have_the_strides_of_their_weights(self):
        """DDP warns about other strides; a contiguous tensor's differ from those of a channels-last (C, 1, k, k)."""
        branches = [convolution(size).to(memory_format=torch.channels_last) for size in (5, 3, 1)]
        kernel, _ = merge_depthwise(*branches)
        kernel.square().sum().backward()
        for branch in branches:
            assert branch.weight.grad.stride() == branch.weight.stride()
            assert branch.weight.grad.abs().sum() > 0
