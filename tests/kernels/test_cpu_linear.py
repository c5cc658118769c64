"""Linear layers against `F.linear` and `F.gelu`: values, gradients, and where oneDNN's product must not be used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from iptv2_diffusion.kernels.cpu_linear import takes_linear
from iptv2_diffusion.models.layers import Linear, linear

POSITIONS, INNER, OUTER = (2, 5, 3), 24, 40


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def layer_inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[torch.Tensor | None]:
    x, weight = random(*POSITIONS, INNER, seed=0, dtype=dtype), random(OUTER, INNER, seed=1, dtype=dtype)
    return [x, weight, random(OUTER, seed=2, dtype=dtype) if bias else None]


def reference(x, weight, bias, gelu):
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
class TestAgainstPlain:
    def test_values_without_gradients(self, bias, gelu):
        exact = reference(*layer_inputs(torch.float64, bias), gelu)
        with torch.no_grad():
            given = layer_inputs(bias=bias)
            assert takes_linear(*given) == torch.backends.mkldnn.is_available()
            torch.testing.assert_close(linear(*given, gelu).double(), exact, rtol=1e-5, atol=1e-5)

    def test_gradients(self, bias, gelu):
        ours, exact = layer_inputs(bias=bias), layer_inputs(torch.float64, bias)
        grad = random(*POSITIONS, OUTER, seed=3).detach()
        outputs = linear(*ours, gelu), reference(*exact, gelu)
        torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
        wanted = [tensor for tensor in ours if tensor is not None], [tensor for tensor in exact if tensor is not None]
        found = torch.autograd.grad(outputs[0], wanted[0], grad)
        for a, b in zip(found, torch.autograd.grad(outputs[1], wanted[1], grad.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)

    def test_a_map_that_is_not_contiguous(self, bias, gelu):
        """The layout of a crop of a padded map."""
        x, weight, bias = layer_inputs(bias=bias)
        crop = x[:, :3]
        with torch.no_grad():
            plain = reference(crop.contiguous(), weight, bias, gelu)
            torch.testing.assert_close(linear(crop, weight, bias, gelu), plain, rtol=1e-5, atol=1e-5)
        linear(crop, weight, bias, gelu).sum().backward()
        assert x.grad[:, 3:].abs().max() == 0
        assert x.grad[:, :3].abs().min() > 0


class TestWhereItIsUsed:
    @pytest.mark.parametrize("frozen", [0, 1, 2])
    def test_what_is_frozen_gets_no_gradient(self, frozen):
        given = layer_inputs()
        given[frozen].requires_grad_(False)
        linear(*given).sum().backward()
        assert [tensor.grad is None for tensor in given] == [i == frozen for i in range(3)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_types_take_the_plain_path(self, dtype):
        given = layer_inputs(dtype)
        assert torch.equal(linear(*given, gelu=True), reference(*given, gelu=True))

    def test_autocast_is_obeyed(self):
        given = layer_inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear(*given)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert given[1].grad.dtype == torch.float32

    def test_an_empty_batch(self):
        _, weight, bias = layer_inputs()
        assert linear(torch.zeros(0, INNER), weight, bias).shape == (0, OUTER)

    def test_compiles_into_one_graph(self):
        layer = Linear(INNER, OUTER)
        x = layer_inputs()[0]
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
