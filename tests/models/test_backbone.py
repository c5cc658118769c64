"""The U: widths, skips, any size, gradient checkpointing, and the exchange of weights."""

from __future__ import annotations

from functools import partial

import pytest
import references
import torch
from torch.utils.checkpoint import checkpoint

from iptv2_diffusion.models.backbone import IPTV2Backbone, stage_specs
from iptv2_diffusion.models.blocks import FGBlockConfig


def backbone(channels=8, conditioning_dim=6, randomize=True, **kwargs) -> IPTV2Backbone:
    torch.manual_seed(0)
    defaults = {"layers_per_stage": (1, 1, 1, 1, 1), "num_attention_heads": 2, "window_size": 4}
    kwargs = {**defaults, **kwargs}
    block = FGBlockConfig(
        **{k: kwargs.pop(k) for k in set(kwargs) & set(FGBlockConfig.__annotations__) - {"grid_stride"}}
    )
    module = IPTV2Backbone(channels, block=block, conditioning_dim=conditioning_dim, **kwargs).eval()
    return references.randomize_(module, 0.1) if randomize else module


def run(module: IPTV2Backbone, *size: int, batch: int = 1) -> torch.Tensor:
    """Output for a fixed random map and, if the backbone needs one, a fixed random vector of 6."""
    with torch.no_grad():
        return module(references.random_map(batch, 8, *size), references.random_map(batch, 6, seed=1))


def test_the_stages_of_a_u_of_three_levels():
    specs = stage_specs(8, (1, 2, 3, 4, 5), (1, 2, 4, 8, 16), FGBlockConfig(window_size=8), (4, 2, 1), 6, (16, 16))
    assert [spec.channels for spec in specs] == [8, 16, 32, 16, 16]
    assert [spec.num_layers for spec in specs] == [1, 2, 3, 4, 5]
    assert [spec.num_heads for spec in specs] == [1, 2, 4, 8, 16]
    assert [spec.block.grid_stride for spec in specs] == [4, 2, 1, 2, 4]
    assert [spec.block.window_size for spec in specs] == [8, 8, 4, 8, 8]  # no larger than the map
    assert [spec.block.shifted for spec in specs] == [True, False, False, False, True]  # a single window


def test_a_printed_model_shows_the_settings_of_its_layers():
    text = repr(backbone(layers_per_stage=(1,)))
    for shown in (
        "num_heads=2, window_size=4, shifted=True",
        "num_heads=2, stride=2, grid_size=None",
        "ratio=2.0, fused=",
    ):
        assert shown in text


class TestAgainstReference:
    @pytest.mark.parametrize("layers", [(1,), (1, 1, 1), (1, 1, 1, 1, 1)], ids=str)
    def test_conditional(self, layers):
        module = backbone(layers_per_stage=layers)
        x, conditioning = references.random_map(1, 8, 8, 12), references.random_map(1, 6, seed=1)
        with torch.no_grad():
            expected = references.backbone(module, x, conditioning)
            torch.testing.assert_close(module(x, conditioning).double(), expected, rtol=1e-3, atol=1e-4)

    def test_unconditional_with_everything_per_stage_and_level(self):
        module = backbone(
            conditioning_dim=None, layers_per_stage=(2, 1, 0), num_attention_heads=(1, 4, 2), grid_stride=(3, 1)
        )
        x = references.random_map(1, 8, 10, 6)
        with torch.no_grad():
            torch.testing.assert_close(module(x).double(), references.backbone(module, x), rtol=1e-3, atol=1e-4)
        assert [block.layers[2].num_heads for block in (*module.encoder[0], *module.bottleneck)] == [1, 1, 4]
        assert [block.layers[2].stride for block in (*module.encoder[0], *module.bottleneck)] == [3, 3, 1]


class TestShape:
    @pytest.mark.parametrize("size", [(8, 8), (1, 1), (2, 3), (7, 5), (13, 17), (4, 31), (1, 9)], ids=str)
    @pytest.mark.parametrize("conditional", [True, False])
    def test_any_size_in_and_twice_the_channels_out(self, size, conditional):
        module = backbone(conditioning_dim=6 if conditional else None)
        x = references.random_map(2, 8, *size)
        with torch.no_grad():
            out = module(x, references.random_map(2, 6)) if conditional else module(x)
        assert out.shape == (2, 16, *size)
        assert out.isfinite().all()
        assert module.out_channels == 16

    def test_one_level_keeps_the_channels(self):
        module = backbone(layers_per_stage=(2,))
        assert run(module, 5, 7).shape == (1, module.out_channels, 5, 7)

    def test_widths_double_and_the_last_stage_keeps_2c(self):
        module = backbone(layers_per_stage=(1,) * 7)
        stages = [*module.encoder, module.bottleneck, *module.decoder]
        widths = [stage[0].layers[0].out_proj.weight.shape[0] // 8 for stage in stages]
        assert widths == [1, 2, 4, 8, 4, 2, 2]

    def test_number_of_stages_is_odd(self):
        with pytest.raises(ValueError, match=r"2L-1"):
            backbone(layers_per_stage=(1, 1))

    @pytest.mark.parametrize(
        "kwargs", [{"num_attention_heads": (2, 2)}, {"grid_stride": (2, 2, 2, 2, 2)}], ids=["heads", "stride"]
    )
    def test_lists_of_the_wrong_length_name_the_argument(self, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            backbone(**kwargs)

    def test_channels_that_cannot_be_halved(self):
        with pytest.raises(ValueError, match="7"):
            backbone(channels=7, num_attention_heads=1, attention_pattern=("focal",))


class TestWindows:
    """Windows are clamped per level to the map at `sample_size`; a map of one window has no shifted windows."""

    @pytest.mark.parametrize(
        ("sample_size", "expected"),
        [
            ((32, 32), [(8, True), (8, True), (8, False)]),
            ((16, 16), [(8, True), (8, False), (4, False)]),
            ((64, 16), [(8, True), (8, False), (4, False)]),
            ((9, 40), [(8, True), (6, False), (3, False)]),  # padded to 12×40, 6×20, 3×10
            (None, [(8, True), (8, True), (8, True)]),
        ],
        ids=str,
    )
    def test_window_and_shift_per_level(self, sample_size, expected):
        module = backbone(sample_size=sample_size, window_size=8)
        focal = [stage[0].layers[0] for stage in (*module.encoder, module.bottleneck)]
        assert [(layer.window_size, layer.shifted) for layer in focal] == expected

    def test_no_parameter_is_unused_at_the_sample_size(self):
        """DistributedDataParallel stops at a parameter without a gradient."""
        for size in ((16, 16), (9, 12)):
            module = backbone(sample_size=size, window_size=8)
            module(references.random_map(1, 8, *size), references.random_map(1, 6)).square().sum().backward()
            without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert without == []

    def test_larger_and_smaller_maps_than_the_sample_size_work(self):
        module = backbone(sample_size=(16, 16), window_size=8)
        assert run(module, 40, 24).isfinite().all()
        assert run(module, 6, 5).isfinite().all()


class TestBatchAndLayout:
    def test_samples_of_a_batch_are_independent(self):
        module = backbone()
        x, conditioning = references.random_map(3, 8, 9, 10), references.random_map(3, 6)
        with torch.no_grad():
            together = module(x, conditioning)
            alone = torch.cat([module(x[i : i + 1], conditioning[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_input_layout_does_not_matter_and_input_is_not_changed(self):
        module, conditioning = backbone(), references.random_map(1, 6)
        x = references.random_map(1, 8, 8, 8)
        before = x.clone()
        with torch.no_grad():
            torch.testing.assert_close(
                module(x, conditioning), module(x.contiguous(), conditioning), rtol=1e-4, atol=1e-5
            )
        assert torch.equal(x, before)

    def test_no_parameter_of_rank_above_four_and_channels_last_works(self):
        module = backbone()
        assert max(parameter.dim() for parameter in module.parameters()) <= 4
        before = run(module, 9, 8)
        module = module.to(memory_format=torch.channels_last)
        torch.testing.assert_close(run(module, 9, 8), before, rtol=1e-4, atol=1e-5)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("conditional", [True, False])
    def test_same_output_and_gradients(self, conditional):
        module = backbone(conditioning_dim=6 if conditional else None).train()
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # as ModelMixin sets it
        results = []
        for checkpointing in (False, True):
            module.zero_grad()
            module.gradient_checkpointing = checkpointing
            x = references.random_map(1, 8, 9, 8).requires_grad_()
            vector = (references.random_map(1, 6).requires_grad_(),) if conditional else ()
            out = module(x, *vector)
            out.square().mean().backward()
            leaves = {"x": x, **dict(module.named_parameters()), **({"vector": vector[0]} if conditional else {})}
            gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
            results.append((out.detach(), gradients))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


class TestStateDict:
    def test_conditional_and_unconditional_share_all_but_the_norms(self):
        """Weights that a restorer can take from a denoiser: every attention, feed-forward and convolution."""
        conditional, unconditional = backbone().state_dict(), backbone(conditioning_dim=None).state_dict()
        shared = conditional.keys() & unconditional.keys()
        assert all(conditional[name].shape == unconditional[name].shape for name in shared)
        assert all(".norms." in name for name in conditional.keys() ^ unconditional.keys())

    def test_same_keys_for_every_window_and_stride(self):
        assert backbone().state_dict().keys() == backbone(window_size=2, grid_stride=1).state_dict().keys()
        assert backbone().state_dict().keys() == backbone(grid_stride=None, grid_size=2).state_dict().keys()
