"""Conversion of U-DiT's weights to our denoiser: the same function, the published sizes, errors for wrong weights."""

import pytest
import torch
from udit_references import TINY, forward, merge_in_place, shapes, weights

from iptv2_diffusion import IPTV2Transformer2DModel
from iptv2_diffusion.models.presets import count_parameters
from iptv2_diffusion.models.udit_weights import convert_udit, merged_share, rename, udit_config

PUBLISHED = {"S": (96, 4, 52_045_240), "B": (192, 8, 204_425_064), "L": (384, 16, 810_188_488)}


def inputs(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, size, size, generator=generator)
    return x, torch.tensor([0, 250, 999]), torch.tensor([0, 3, TINY["classes"]])


@torch.no_grad()
@pytest.mark.parametrize("single", [False, True], ids=["branches", "single"])
def test_the_converted_model_computes_the_same_function(single):
    state = weights(single=single)
    model = convert_udit(state, "x.pt", sample_size=16)
    x, timestep, labels = inputs()
    expected = forward(state, x, timestep, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x, timestep, labels).sample, expected, atol=1e-4, rtol=1e-4)
    assert model.config.fused == single


@torch.no_grad()
def test_merged_kernels_are_recognised_and_separated():
    state = weights()
    merged = merge_in_place(state)
    assert abs(merged_share(state)) < 0.1
    assert abs(merged_share(merged) - 1) < 0.1
    x, timestep, labels = inputs()
    model = convert_udit(merged, "x.pt", sample_size=16)
    torch.testing.assert_close(
        model(x, timestep, labels).sample, forward(state, x, timestep, labels), atol=1e-4, rtol=1e-4
    )
    as_told = convert_udit(merged, "x.pt", sample_size=16, kernels="branches")
    assert not torch.allclose(model(x, timestep, labels).sample, as_told(x, timestep, labels).sample, atol=1e-2)


def test_kernels_between_both_forms_need_the_users_choice():
    state = weights()
    for name in state:
        if name.endswith("dwconv.0.weight"):
            state[name][:, :, 2, 2] += 0.5
    with pytest.raises(ValueError, match=r"x\.pt: the 5×5 kernels may be branches or merged \(share 0\.[45]"):
        convert_udit(state, "x.pt")
    assert convert_udit(state, "x.pt", kernels="branches").config.channels == TINY["channels"]


@torch.no_grad()
def test_a_saturated_logit_scale_differs_by_its_cap_alone():
    """exp(4.6052) = 100.003 there, 100 here."""
    state = weights()
    for name in state:
        if name.endswith("logit_scale"):
            state[name][:] = 6.0
    x, timestep, labels = inputs()
    ours = convert_udit(state, "x.pt", sample_size=16)(x, timestep, labels).sample
    theirs = forward(state, x, timestep, labels)
    assert (ours - theirs).abs().max() < 1e-2 * theirs.std()


@pytest.mark.parametrize("single", [False, True], ids=["branches", "single"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_map_one_to_one(size, single):
    channels, heads, parameters = PUBLISHED[size]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes(channels, heads, single=single).items()}
        config = udit_config(state, "x.pt")
        model = IPTV2Transformer2DModel(**config)
        deployed = IPTV2Transformer2DModel(**{**config, "fused": True})
        ours, unexpected = rename(state)
    assert not unexpected
    assert {name: tuple(v.shape) for name, v in ours.items()} == {
        name: tuple(v.shape) for name, v in model.state_dict().items()
    }
    assert count_parameters(deployed) == parameters
    assert sum(v.numel() for v in state.values()) == count_parameters(model)
    if not single:
        assert len(ours) == 1131


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


WRONG = {
    "a DiT": (
        lambda state: {f"blocks.{n}.adaLN_modulation.1.weight": torch.zeros(6, 1) for n in range(2)},
        r"no x_embedder\.proj\.weight; the file seems to be the weights of a DiT under its authors' names",
    ),
    "a block too few": (lambda s: without(s, "encoder_level_2.0."), r"has no encoder_level_2\.0\.attn1\.logit_scale"),
    "a gap": (
        lambda s: {k.replace("encoder_level_2.1.", "encoder_level_2.7."): v for k, v in s.items()},
        r"weights \(backbone\.encoder\.1\.1\..* missing; .*backbone\.encoder\.1\.7\..* unexpected",
    ),
    "half of a block": (lambda s: without(s, "latent.0.mlp2"), r"14 weights \(backbone\.bottleneck\.0\.layers\.3\."),
    "another level": (
        lambda s: {**s, "encoder_level_3.0.attn1.logit_scale": torch.zeros(2, 1, 1)},
        r"1 weight \(encoder_level_3\.0\.attn1\.logit_scale\) is unexpected",
    ),
    "another width": (
        lambda s: {**s, "output.weight": torch.zeros(8, 8, 3, 3)},
        r"head\.weight \(8x8x3x3, not 32x32x3x3\)\) is misshapen",
    ),
    "another feed-forward": (
        lambda s: {k.replace("project_in.0", "fc1"): v for k, v in without(s, "latent.0.mlp1.dwconv").items()},
        r"fc1\.",
    ),
    "a scalar": (
        lambda s: {**s, "x_embedder.proj.weight": torch.tensor(1.0)},
        r"x_embedder\.proj\.weight has the shape \(\)",
    ),
    "an empty table": (
        lambda s: {**s, "y_embedder_1.embedding_table.weight": torch.zeros(0, 8)},
        r"embedding_table\.weight has the shape \(0, 8\)",
    ),
    "a flat kernel": (lambda s: {**s, "latent.0.mlp1.dwconv.1.weight": torch.zeros(3)}, r"\(3, not 128x1x3x3\)\) is"),
    "a norm of three parts": (
        lambda s: {**s, "latent.0.adaLN_modulation1.1.weight": torch.zeros(3)},
        r"norms\.0\.linear\.weight \(3, not",
    ),
    "whole numbers": (lambda s: {**s, "output.bias": s["output.bias"].long()}, r"output\.bias is torch\.int64"),
    "complex numbers": (
        lambda s: {**s, "output.bias": s["output.bias"].to(torch.complex64)},
        r"output\.bias is torch\.complex64",
    ),
    "not a number": (lambda s: {**s, "output.bias": s["output.bias"] / 0}, r"output\.bias is NaN or infinite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_weights_are_refused_in_one_line(name):
    change, told = WRONG[name]
    with pytest.raises(ValueError, match=told) as caught:
        convert_udit(change(weights()), "x.pt")
    assert "x.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
