"""The FG block with and without conditioning, the norms, and down- and up-sampling."""

from __future__ import annotations

import pytest
import references
import torch

from iptv2_diffusion.models.blocks import AdaLayerNormZero2d, Downsample, FGBlock, FGBlockConfig, Upsample
from iptv2_diffusion.models.layers import LayerNorm2d

PATTERNS = [("focal", "grid"), ("grid", "grid"), ("grid", "focal"), ("focal",), ("focal", "grid", "focal")]


def fg_block(conditioning_dim=6, randomize=True, **kwargs) -> FGBlock:
    torch.manual_seed(0)
    kwargs = {"window_size": 4, **kwargs}
    block = FGBlock(8, 2, FGBlockConfig(conditioning_dim=conditioning_dim, **kwargs)).eval()
    return references.randomize_(block) if randomize else block


class TestAgainstReference:
    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_conditional(self, pattern):
        block = fg_block(attention_pattern=pattern)
        x, conditioning = references.random_map(2, 8, 9, 6), references.random_map(2, 6)
        with torch.no_grad():
            expected = references.fg_block(block, x, conditioning)
            torch.testing.assert_close(block(x, conditioning).double(), expected, rtol=1e-4, atol=5e-5)

    @pytest.mark.parametrize("norm_bias", [True, False])
    def test_unconditional(self, norm_bias):
        block = fg_block(conditioning_dim=None, norm_bias=norm_bias)
        x = references.random_map(1, 8, 5, 9)
        with torch.no_grad():
            torch.testing.assert_close(block(x).double(), references.fg_block(block, x), rtol=1e-4, atol=5e-5)

    def test_plain_feed_forward(self):
        block = fg_block(feed_forward="plain")
        x, conditioning = references.random_map(1, 8, 7, 10), references.random_map(1, 6)
        with torch.no_grad():
            expected = references.fg_block(block, x, conditioning)
            torch.testing.assert_close(block(x, conditioning).double(), expected, rtol=1e-4, atol=5e-5)

    def test_grid_size_form(self):
        block = fg_block(grid_stride=None, grid_size=3)
        x, conditioning = references.random_map(1, 8, 7, 10), references.random_map(1, 6)
        with torch.no_grad():
            expected = references.fg_block(block, x, conditioning)
            torch.testing.assert_close(block(x, conditioning).double(), expected, rtol=1e-4, atol=5e-5)


class TestConditioning:
    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_a_fresh_conditional_block_is_the_identity(self, pattern):
        block = fg_block(attention_pattern=pattern, randomize=False)
        x = references.random_map(2, 8, 9, 7)
        with torch.no_grad():
            assert torch.equal(block(x, references.random_map(2, 6)), x)

    def test_a_fresh_block_can_leave_the_identity(self):
        """At zero gates the gates themselves still get a gradient; without it nothing would ever be learned."""
        block = fg_block(randomize=False)
        block(references.random_map(1, 8, 8, 8), references.random_map(1, 6)).square().sum().backward()
        for norm in block.norms:
            shift, scale, gate = norm.linear.weight.grad.chunk(3)
            assert gate.abs().sum() > 0
            assert shift.abs().sum() == scale.abs().sum() == 0

    def test_conditioning_is_per_sample(self):
        block, x = fg_block(), references.random_map(1, 8, 8, 8).expand(2, -1, -1, -1)
        conditioning = references.random_map(2, 6)
        with torch.no_grad():
            both = block(x, conditioning)
            alone = torch.cat([block(x[:1], vector[None]) for vector in conditioning])
        assert (both[0] - both[1]).abs().max() > 1e-3
        torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)

    def test_every_parameter_gets_a_gradient(self):
        block = fg_block()
        block(references.random_map(2, 8, 12, 9), references.random_map(2, 6)).square().sum().backward()
        assert [n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_unknown_layer_in_the_pattern(self):
        with pytest.raises(ValueError, match=r"local.*focal.*grid"):
            fg_block(attention_pattern=("local", "grid"))

    def test_unknown_feed_forward(self):
        with pytest.raises(ValueError, match=r"swiglu.*rep-leffn.*plain"):
            fg_block(feed_forward="swiglu")

    def test_conditional_block_without_a_vector_says_so(self):
        with pytest.raises((ValueError, TypeError)):
            fg_block()(references.random_map(1, 8, 4, 4))


class TestNorms:
    @pytest.mark.parametrize("bias", [True, False])
    def test_layer_norm_is_over_channels(self, bias):
        norm, x = references.randomize_(LayerNorm2d(8, bias=bias)), references.random_map(2, 8, 5, 3)
        expected = references.layer_norm(x, norm.eps) * norm.weight.double()[:, None, None]
        if bias:
            expected = expected + norm.bias.double()[:, None, None]
        torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert (norm.bias is not None) is bias

    def test_adaptive_norm_is_the_plain_norm_at_initialisation(self):
        norm, x = AdaLayerNormZero2d(8, 6), references.random_map(2, 8, 5, 3)
        normed, gate = norm(x, references.random_map(2, 6))
        torch.testing.assert_close(normed.double(), references.layer_norm(x, 1e-6), rtol=1e-5, atol=1e-5)
        assert gate.shape == (2, 8, 1, 1)
        assert not gate.any()

    def test_adaptive_norm_without_a_gate_has_two_thirds_of_the_parameters(self):
        with_gate, without = AdaLayerNormZero2d(8, 6), AdaLayerNormZero2d(8, 6, gate=False)
        assert with_gate.linear.out_features == 24
        assert without.linear.out_features == 16
        assert without(references.random_map(1, 8, 2, 2), references.random_map(1, 6))[1] is None

    def test_half_precision_normalises_in_float32(self):
        """Channel sums of squares far above float16's 65504."""
        x = 200 * references.random_map(1, 64, 3, 3)
        half = LayerNorm2d(64).half()(x.half())
        assert half.isfinite().all()
        torch.testing.assert_close(half.float(), LayerNorm2d(64)(x), rtol=1e-2, atol=1e-2)


class TestResampling:
    def test_down_and_up_against_the_loops(self):
        down, up = Downsample(8), Upsample(8)
        x = references.random_map(2, 8, 6, 4)
        with torch.no_grad():
            smaller, larger = down(x), up(x)
            expected = references.unshuffle(references.convolution(x.double(), down.conv))
            torch.testing.assert_close(smaller.double(), expected, rtol=1e-5, atol=1e-5)
            expected = references.shuffle(references.convolution(x.double(), up.conv))
            torch.testing.assert_close(larger.double(), expected, rtol=1e-5, atol=1e-5)
        assert smaller.shape == (2, 16, 3, 2)
        assert larger.shape == (2, 4, 12, 8)

    def test_the_convolutions_have_no_bias(self):
        assert Downsample(8).conv.bias is None
        assert Upsample(8).conv.bias is None
        assert Downsample(8).conv.weight.shape == (4, 8, 3, 3)
        assert Upsample(8).conv.weight.shape == (16, 8, 3, 3)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite(self, dtype):
        block = fg_block().to(dtype)
        with torch.no_grad():
            out = block(references.random_map(1, 8, 9, 8).to(dtype), references.random_map(1, 6).to(dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()
