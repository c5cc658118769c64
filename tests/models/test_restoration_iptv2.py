"""The restorer: identity at initialisation, any size, conditions, fusion, save and load, backbone exchange."""

from pathlib import Path

import pytest
import torch

from iptv2_diffusion import IPTV2RestorationModel, create_model
from iptv2_diffusion.models.exchange import load_backbone
from iptv2_diffusion.models.presets import count_macs, count_parameters

ASSETS = Path(__file__).parents[2] / "assets"


def tiny(**overrides):
    """A small restorer whose head is not zero, so that it does something."""
    torch.manual_seed(0)
    model = create_model("restoration-tiny", **overrides)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.eval()


@pytest.mark.parametrize("overrides", [{}, {"unshuffle": 4}, {"unshuffle": 1}, {"in_channels": 1}])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (33, 18)])
def test_a_fresh_model_returns_its_input_at_any_size(overrides, size):
    model = create_model("restoration-tiny", **overrides)
    image = torch.rand(2, model.config.in_channels, *size)
    assert torch.equal(model(image).sample, image)


@pytest.mark.parametrize("conditioning", ["map", "vector"])
def test_sigma_changes_the_result_and_is_required(conditioning):
    model = tiny(sigma_conditioning=conditioning)
    for module in model.modules():
        if type(module).__name__ == "AdaLayerNormZero2d":
            torch.nn.init.normal_(module.linear.weight, std=0.1)
    image = torch.rand(2, 3, 16, 16)
    low, high = model(image, 5).sample, model(image, 50.0).sample
    assert (low - high).abs().max() > 1e-4
    each = model(image, torch.tensor([5.0, 50.0])).sample
    torch.testing.assert_close(each, torch.stack([low[0], high[1]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs sigma"):
        model(image)


def test_a_blind_model_refuses_sigma_and_a_task():
    with pytest.raises(ValueError, match="does not take sigma"):
        tiny()(torch.rand(1, 3, 16, 16), 25)
    with pytest.raises(ValueError, match="does not take task"):
        tiny()(torch.rand(1, 3, 16, 16), task=0)


def test_several_tasks():
    model = tiny(num_tasks=3)
    for module in model.modules():
        if type(module).__name__ == "AdaLayerNormZero2d":
            torch.nn.init.normal_(module.linear.weight, std=1.0)
    image = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(model(image, task=0).sample, model(image, task=2).sample, atol=1e-6)


def test_norms_without_bias():
    names = [name for name, _ in tiny(norm_bias=False).backbone.named_parameters() if ".norms." in name]
    assert names
    assert all(name.endswith("weight") for name in names)


def test_fused_and_reloaded_models_compute_the_same(tmp_path):
    model = tiny(sigma_conditioning="map")
    image = torch.rand(1, 3, 20, 24)
    expected = model(image, 25).sample
    fused = model.fuse()
    torch.testing.assert_close(fused(image, 25).sample, expected, atol=1e-5, rtol=1e-4)
    fused.save_pretrained(tmp_path)
    assert torch.equal(IPTV2RestorationModel.from_pretrained(tmp_path)(image, 25).sample, fused(image, 25).sample)
    with pytest.raises(RuntimeError, match="fused for inference"):
        fused.train()


def test_gradient_checkpointing_gives_the_same_gradients():
    image, gradients = torch.rand(1, 3, 16, 16), []
    for enabled in (False, True):
        model = tiny().train()
        if enabled:
            model.enable_gradient_checkpointing()
        model(image).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("overrides", [{}, {"sigma_conditioning": "vector", "unshuffle": 1}])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_to_one_graph(overrides, fused):
    torch._dynamo.reset()
    model = tiny(layers_per_stage=(1,), grid_size=4, **overrides)
    model = model.fuse() if fused else model
    image, sigma = torch.rand(2, 3, 18, 25), 25.0 if overrides else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image, sigma).sample, model(image, sigma).sample, atol=1e-5, rtol=1e-4)


def test_a_compiled_training_step_gives_the_same_gradients():
    torch._dynamo.reset()
    image, gradients = torch.rand(1, 3, 16, 16), []
    for compiled in (False, True):
        model = tiny().train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(image).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_bad_arguments():
    with pytest.raises(ValueError, match="unshuffle is 3"):
        IPTV2RestorationModel(unshuffle=3)
    with pytest.raises(ValueError, match="sigma_conditioning is 'plane'"):
        IPTV2RestorationModel(sigma_conditioning="plane")


# ---------------------------------------------------------------------------------------------------------------------
# Backbone exchange


def pair():
    """A denoiser and a restorer whose backbones have the same norms and levels."""
    torch.manual_seed(0)
    generator = create_model("tiny")
    torch.manual_seed(1)
    return generator, create_model("restoration-tiny-exchange")


@pytest.mark.parametrize("direction", ["to the restorer", "to the generator"])
def test_a_pair_of_presets_exchanges_backbones_completely(direction):
    generator, restorer = pair()
    target, source = (restorer, generator) if direction == "to the restorer" else (generator, restorer)
    report = load_backbone(target, source, strict=True)
    assert report.complete
    assert report.parameters[0] == report.parameters[1] == count_parameters(target.backbone)
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], value)
    assert "100.0%" in str(report)


def test_the_shipped_generator_fits_a_restorer_completely():
    """Strict loading of assets/iptv2-emoji64 into its preset, also where images are unshuffled to its latents' size."""
    generator = create_model(str(ASSETS / "iptv2-emoji64/transformer"))
    restorer = create_model("restoration-emoji64", unshuffle=4, sample_size=64)
    report = load_backbone(restorer, generator, strict=True)
    assert report.complete
    assert report.parameters[0] == count_parameters(restorer.backbone) == count_parameters(generator.backbone)
    x, vector = torch.randn(1, 64, 16, 16), torch.randn(1, 128)
    with torch.no_grad():
        assert torch.equal(restorer.backbone(x, vector), generator.backbone(x, vector))
    fresh = create_model("emoji64", num_class_embeds=generator.config.num_class_embeds)
    assert load_backbone(fresh, restorer, strict=True).complete  # and back
    assert all(torch.equal(v, generator.backbone.state_dict()[k]) for k, v in fresh.backbone.state_dict().items())
    with torch.device("meta"):
        backbone = create_model("restoration-emoji64").backbone
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in generator.backbone.state_dict().items()
    }


def test_a_partial_match_is_reported_and_refused_when_strict():
    generator, _ = pair()
    restorer = create_model("restoration-tiny")
    before = {name: value.clone() for name, value in restorer.backbone.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone(restorer, generator, strict=True)
    assert all(torch.equal(before[name], value) for name, value in restorer.backbone.state_dict().items())
    report = load_backbone(restorer, generator)
    assert report.missing
    assert report.unexpected
    assert 0 < report.parameters[0] < report.parameters[1]
    assert "only in the target" in str(report)


@pytest.mark.parametrize("fused", ["source", "target"])
def test_fused_and_unfused_backbones_are_converted(fused):
    """The features of the backbone are those of the source, for every form of the two models."""
    generator, restorer = pair()
    for parameter in generator.parameters():  # adaLN-Zero would hide the feed-forwards
        torch.nn.init.normal_(parameter, std=0.1)
    target, source = (restorer, generator.fuse()) if fused == "source" else (restorer.fuse(), generator)
    assert load_backbone(target, source, strict=True).complete
    x, vector = torch.randn(1, 16, 8, 8), torch.randn(1, 32)
    torch.testing.assert_close(target.backbone(x, vector), generator.backbone(x, vector), atol=1e-4, rtol=1e-4)


def test_an_unfused_model_equals_the_fused_one_and_continues_training():
    fused = tiny().fuse()
    model = fused.unfuse().train()
    image = torch.rand(1, 3, 20, 24)
    torch.testing.assert_close(model(image).sample, fused(image).sample, atol=1e-5, rtol=1e-4)
    model(image).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "depthwise" in name or "expand" in name}
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_restoration_b_meets_the_specification():
    with torch.device("meta"):
        model = create_model("restoration-b").fuse()
    assert abs(count_parameters(model) / 26.03e6 - 1) <= 0.03
    assert count_macs(model, 128, 128) <= 41.2e9


def test_restoration_nano_is_smaller_than_ffdnet():
    with torch.device("meta"):
        assert count_parameters(create_model("restoration-nano").fuse()) <= 852_000
