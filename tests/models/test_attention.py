"""FCSA and GGSA against the loop-written references at any size, and the properties of the equations."""

from __future__ import annotations

import math

import pytest
import references
import torch
import torch.nn.functional as F

from iptv2_diffusion.models import attention
from iptv2_diffusion.models.attention import FocalContextAttention, GlobalGridAttention

# (height, width): whole windows, odd, prime, smaller than a window in one or both directions, one position
SIZES = [(8, 8), (12, 8), (9, 14), (13, 7), (5, 11), (3, 4), (4, 9), (17, 2), (1, 1), (1, 13)]


def focal(channels=8, heads=2, scale=0.3, **kwargs) -> FocalContextAttention:
    torch.manual_seed(0)
    return references.randomize_(FocalContextAttention(channels, heads, **kwargs), scale).eval()


def grid(channels=16, heads=2, scale=0.3, **kwargs) -> GlobalGridAttention:
    torch.manual_seed(0)
    return references.randomize_(GlobalGridAttention(channels, heads, **kwargs), scale).eval()


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-5)


class TestFocalAgainstReference:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_any_size(self, size):
        module, x = focal(window_size=4), references.random_map(2, 8, *size)
        with torch.no_grad():
            assert_matches(module(x), references.focal_context_attention(module, x))

    @pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
    def test_any_window_even_and_odd(self, window):
        module, x = focal(window_size=window), references.random_map(1, 8, 11, 9)
        with torch.no_grad():
            assert_matches(module(x), references.focal_context_attention(module, x))

    @pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=str)
    def test_without_the_shifted_branch(self, size):
        module, x = focal(window_size=4, shifted=False), references.random_map(1, 8, *size)
        with torch.no_grad():
            assert_matches(module(x), references.focal_context_attention(module, x))

    @pytest.mark.parametrize(("channels", "heads"), [(8, 1), (8, 8), (12, 3)])
    def test_any_number_of_heads_without_bias(self, channels, heads):
        module = focal(channels, heads, window_size=4, bias=False)
        x = references.random_map(1, channels, 9, 8)
        assert all(not name.endswith("bias") for name, _ in module.named_parameters())
        with torch.no_grad():
            assert_matches(module(x), references.focal_context_attention(module, x))


class TestFocalProperties:
    def test_initial_values_are_those_of_the_specification(self):
        module = FocalContextAttention(16, 4, window_size=8)
        assert module.temperature.shape == (2, 4)
        assert module.spatial_affine.shape == module.merge_logits.shape == (2, 4, 64)
        assert (module.temperature == 1).all()
        assert (module.spatial_affine == 1).all()
        assert (module.merge_logits == 0).all()  # s = exp(0) = 1
        assert FocalContextAttention(16, 4, window_size=8, temperature_init=4.0).temperature.eq(4).all()

    def test_receptive_field_is_a_window_and_the_shifted_windows_over_it(self):
        """The mixing is local: one FCSA on 4×4 windows never looks further than a window, a half and the 3×3."""
        module = focal(window_size=4)
        x = references.random_map(1, 8, 16, 16).requires_grad_()
        module(x)[0, :, 5, 5].sum().backward()  # base window rows 4-7, shifted window rows 2-5 (and columns)
        seen = x.grad.abs().sum(1)[0] > 0
        expected = torch.zeros_like(seen)
        expected[3:9, 3:9] = True  # the base window and one position around it
        expected[1:7, 1:7] = True  # the shifted window and one around it
        assert torch.equal(seen, expected)

    def test_border_of_the_map_does_not_use_the_shifted_branch(self):
        """s2 = 0 in the border: changing the shifted branch's own parameters changes the interior only."""
        module, x = focal(window_size=4), references.random_map(1, 8, 12, 12)
        with torch.no_grad():
            before = module(x)
            module.temperature[1] += 1.0
            module.merge_logits[1] += 1.0
            changed = (module(x) - before).abs().sum(1)[0] > 1e-7
        expected = torch.zeros_like(changed)
        expected[2:-2, 2:-2] = True
        assert torch.equal(changed, expected)

    @pytest.mark.parametrize("logit", [-80.0, 80.0])
    def test_extreme_merge_weights_stay_finite(self, logit):
        module, x = focal(window_size=4), references.random_map(1, 8, 12, 12)
        with torch.no_grad():
            module.merge_logits[0], module.merge_logits[1] = logit, -logit
            assert module(x).isfinite().all()

    def test_a_constant_zero_map_is_finite_with_finite_gradients(self):
        module = FocalContextAttention(8, 2, window_size=4, bias=False)
        x = torch.zeros(1, 8, 8, 8, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())

    def test_every_parameter_gets_a_gradient(self):
        module = focal(window_size=4)
        module(references.random_map(1, 8, 12, 12)).square().sum().backward()
        without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []


class TestGridAgainstReference:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_any_size_by_stride(self, size, stride):
        module, x = grid(stride=stride), references.random_map(1, 16, *size)
        with torch.no_grad():
            assert_matches(module(x), references.global_grid_attention(module, x, stride))

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("grid_size", [1, 4])
    def test_any_size_by_grid_size(self, size, grid_size):
        module = grid(stride=None, grid_size=grid_size)
        x = references.random_map(2, 16, *size)
        with torch.no_grad():
            assert_matches(module(x), references.global_grid_attention(module, x, None, grid_size))

    @pytest.mark.parametrize(("channels", "heads"), [(8, 1), (8, 2), (24, 3)])
    def test_any_number_of_heads_without_bias(self, channels, heads):
        module = grid(channels, heads, stride=2, bias=False)
        x = references.random_map(1, channels, 7, 6)
        assert all(not name.endswith("bias") for name, _ in module.named_parameters())
        with torch.no_grad():
            assert_matches(module(x), references.global_grid_attention(module, x, 2))

    def test_scale_is_capped_at_100(self):
        module, x = grid(stride=2), references.random_map(1, 16, 8, 8)
        with torch.no_grad():
            module.logit_scale.fill_(math.log(100.0))
            at_cap = module(x)
            module.logit_scale.fill_(50.0)  # exp(50) would overflow half precision
            torch.testing.assert_close(module(x), at_cap)


class TestGridProperties:
    def test_logit_scale_starts_at_log_10(self):
        module = GlobalGridAttention(16, 4)
        assert module.logit_scale.numel() == 4
        torch.testing.assert_close(module.logit_scale.exp(), torch.full_like(module.logit_scale, 10.0))

    def test_receptive_field_is_the_grid(self):
        """A position sees the positions at its own offset in every cell, and no other (5×5 convolution at zero)."""
        module = grid(stride=4)
        with torch.no_grad():
            module.depthwise.weight.zero_()
        x = references.random_map(1, 16, 12, 16).requires_grad_()
        module(x)[0, :, 6, 3].sum().backward()
        seen = x.grad.abs().sum(1)[0] > 0
        expected = torch.zeros_like(seen)
        expected[2::4, 3::4] = True
        assert torch.equal(seen, expected)

    def test_stride_one_and_grid_as_large_as_the_map_are_full_attention(self):
        by_stride, by_grid = grid(stride=1), grid(stride=None, grid_size=8)
        by_grid.load_state_dict(by_stride.state_dict())
        x = references.random_map(1, 16, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(by_stride(x), by_grid(x))

    def test_padded_keys_are_masked_not_zero(self):
        """Values far from zero average to themselves: a padded zero key in the softmax would pull the mean down."""
        module = grid(stride=2)
        with torch.no_grad():
            module.depthwise.weight.zero_()
            module.depthwise.bias.zero_()
            module.qkv.weight[32:].zero_()
            module.qkv.bias[32:].fill_(1.0)  # v = 1 everywhere
            module.out_proj.weight.copy_(torch.eye(16).view_as(module.out_proj.weight))
            module.out_proj.bias.zero_()
            out = module(references.random_map(1, 16, 7, 5))
        torch.testing.assert_close(out, torch.ones_like(out))

    @pytest.mark.parametrize("kwargs", [{"stride": 2, "grid_size": 4}, {"stride": None}, {"stride": 0}], ids=str)
    def test_stride_and_grid_size_are_exclusive_and_positive(self, kwargs):
        with pytest.raises(ValueError, match=r"stride|grid"):
            GlobalGridAttention(16, 2, **kwargs)

    def test_every_parameter_gets_a_gradient(self):
        module = grid(stride=2)
        module(references.random_map(1, 16, 9, 8)).square().sum().backward()
        without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []


BOTH = {
    "focal": lambda: focal(16, 2, window_size=4),
    "grid stride": lambda: grid(16, 2, stride=2),
    "grid size": lambda: grid(16, 2, stride=None, grid_size=4),
}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH.keys())
class TestBothAttentions:
    def test_samples_of_a_batch_are_independent(self, make):
        module, x = make(), references.random_map(3, 16, 9, 10)
        with torch.no_grad():
            together, alone = module(x), torch.cat([module(sample[None]) for sample in x])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_memory_layout_does_not_change_the_result(self, make):
        module, x = make(), references.random_map(2, 16, 9, 10)
        assert x.is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(module(x), module(x.contiguous()), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite_and_near_float32(self, make, dtype):
        """Large inputs too: normalisation and softmax run in float32, so nothing overflows before the projections."""
        module, x = make(), 30 * references.random_map(1, 16, 9, 10)
        with torch.no_grad():
            full = module(x)
            half = module.to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        assert half.isfinite().all()
        assert F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.99

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gradients_are_near_float32(self, make, dtype):
        """On a CPU, half precision with gradients has its own path; an odd size tests its mask."""
        module, x, gradients = make(), references.random_map(2, 16, 9, 11), []
        for run in (module, make().to(dtype)):
            run(x.to(run.qkv.weight.dtype)).float().square().sum().backward()
            gradients.append(torch.cat([parameter.grad.float().flatten() for parameter in run.parameters()]))
        assert gradients[1].isfinite().all()
        assert F.cosine_similarity(*gradients, dim=0) > 0.99

    def test_autocast_is_finite(self, make):
        module, x = make(), references.random_map(1, 16, 9, 10)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        assert out.isfinite().all()
        out.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


class TestArguments:
    @pytest.mark.parametrize("make", [FocalContextAttention, GlobalGridAttention])
    def test_heads_that_do_not_divide_the_channels(self, make):
        with pytest.raises(ValueError, match=r"10.*4|4.*10"):
            make(10, 4)

    @pytest.mark.parametrize("make", [FocalContextAttention, GlobalGridAttention])
    def test_at_least_one_head(self, make):
        with pytest.raises(ValueError, match="num_heads is 0"):
            make(8, 0)

    def test_rope_needs_a_multiple_of_four_channels_per_head(self):
        with pytest.raises(ValueError, match="4"):
            GlobalGridAttention(12, 2)

    def test_window_must_be_positive(self):
        with pytest.raises(ValueError, match="window"):
            FocalContextAttention(8, 2, window_size=0)


class TestPartitions:
    """Windows and grids partition a map and merge it again without loss, at any size."""

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("window", [1, 3, 4, 8])
    def test_window_round_trip(self, size, window):
        height, width = size
        x = torch.randn(2, height, width, 3 * 8)
        padded = attention.pad_to_multiple(x, window, window)
        sides = padded.shape[1:3]
        assert sides == tuple(math.ceil(side / window) * window for side in size)
        parts = attention.window_partition(padded, num_heads=2, window=window)
        assert all(part.shape[1:] == (2, window**2, 4) for part in parts)
        merged = [attention.window_merge(part, window, *sides)[:, :height, :width] for part in parts]
        assert torch.equal(torch.cat(merged, dim=-1), x)

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 5), (4, 1)], ids=str)
    def test_grid_round_trip(self, size, stride):
        height, width = size
        x = torch.randn(2, height, width, 8)
        padded = attention.pad_to_multiple(x, *stride)
        sides = padded.shape[1:3]
        groups = attention.grid_partition(padded, stride)
        assert groups.shape == (2 * math.prod(stride), (sides[0] // stride[0]) * (sides[1] // stride[1]), 8)
        merged = attention.grid_merge(groups, stride, *sides)[:, :height, :width]
        assert torch.equal(merged, x)

    def test_a_window_is_local_and_a_grid_group_is_global(self):
        index = torch.arange(36.0).view(1, 6, 6, 1).expand(1, 6, 6, 3).contiguous()
        window = attention.window_partition(index, num_heads=1, window=2)[0]
        group = attention.grid_partition(index, (3, 3))[..., 0]
        assert window[1].flatten().tolist() == [2, 3, 8, 9]
        assert group[1].flatten().tolist() == [1, 4, 19, 22]
