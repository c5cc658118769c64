"""Restorers from single files: the configuration found in the weights, and spandrel's own loader."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from iptv2_diffusion import IPTV2RestorationModel
from iptv2_diffusion.pipelines.single_file import DESCRIPTION, build_restorer, infer_config, save_single_file

FOCAL = {"channels": 16, "attention_pattern": ("focal",), "grid_size": 4}
CONFIGS = {
    "blind": {**FOCAL, "layers_per_stage": (1, 2, 1), "num_attention_heads": (2, 4, 2), "unshuffle": 2},
    "map": {**FOCAL, "layers_per_stage": (1, 1, 1), "sigma_conditioning": "map", "norm_bias": False, "ffn_ratio": 1.5},
    "gray": {**FOCAL, "layers_per_stage": (2,), "in_channels": 1, "unshuffle": 4, "sample_size": 16},
    "vector": {
        **FOCAL,
        "layers_per_stage": (1,) * 5,
        "sigma_conditioning": "vector",
        "num_tasks": 2,
        "sample_size": 24,
    },
}
GRID = {**FOCAL, "layers_per_stage": (1, 1, 1), "attention_pattern": ("focal", "grid")}


def restorer(**config):
    torch.manual_seed(0)
    model = IPTV2RestorationModel(**{"num_attention_heads": 2, "window_size": 4, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_found_in_the_weights(name, fused):
    model = restorer(**CONFIGS[name])
    model = model.fuse() if fused else model
    twin = IPTV2RestorationModel(**infer_config(model.state_dict())).eval()
    twin.load_state_dict(model.state_dict())
    image = torch.rand(2, model.config.in_channels, 21, 34)
    sigma = None if model.config.sigma_conditioning is None else 20.0
    task = None if model.config.num_tasks is None else 1
    with torch.no_grad():
        assert torch.equal(twin(image, sigma, task).sample, model(image, sigma, task).sample)


def test_grid_attention_needs_the_description(tmp_path):
    model = restorer(**GRID)
    with pytest.raises(ValueError, match="whose stride cannot be inferred"):
        infer_config(model.state_dict())
    save_single_file(model, tmp_path / "model.safetensors")
    twin, sigma, task = build_restorer(load_file(tmp_path / "model.safetensors"))
    assert (sigma, task) == (None, None)
    assert twin.config.grid_size == 4
    assert twin.config.fused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blind", {"sigma": 5.0}, "does not take sigma"),
        ("vector", {}, "needs task"),
        ("vector", {"task": 2}, "tasks 0 to 1"),
        ("map", {"sigma": 300.0}, r"must be in \[0, 255\]"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_single_file(restorer(**CONFIGS[name]), tmp_path / "model.safetensors", **options)


def test_a_broken_description_and_missing_weights_are_refused():
    weights = dict(restorer(**CONFIGS["map"]).state_dict())
    with pytest.raises(ValueError, match="no description of a restorer"):
        build_restorer({**weights, DESCRIPTION: torch.tensor([1, 2, 3], dtype=torch.uint8)})
    del weights["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight"):
        infer_config(weights)


class TestLoader:
    """spandrel's ModelLoader."""

    @pytest.fixture
    def load(self):
        spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed: iptv2-diffusion[export]")
        from iptv2_diffusion.integrations.spandrel import register

        register()
        register()
        return spandrel.ModelLoader().load_from_file

    @pytest.mark.parametrize(("config", "options"), [(CONFIGS["map"], {"sigma": 25.0}), (GRID, {})])
    def test_an_exported_file_restores_as_the_model_does(self, load, config, options, tmp_path):
        model = restorer(**config)
        save_single_file(model, tmp_path / "model.safetensors", **options)
        loaded = load(tmp_path / "model.safetensors")
        image = torch.rand(1, 3, 21, 34)
        expected = model(image, options.get("sigma")).sample.clamp(0, 1)
        assert (loaded.purpose, loaded.scale, loaded.input_channels) == ("Restoration", 1, 3)
        torch.testing.assert_close(loaded(image), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_bare_weights_with_an_estimated_noise_level(self, load, suffix, tmp_path):
        from iptv2_diffusion.pipelines.noise_estimation import estimate_sigma

        model, path = restorer(**CONFIGS["map"]), tmp_path / f"model.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
        image = (0.5 + 0.1 * torch.randn(1, 3, 64, 64)).clamp(0, 1)
        sigma = estimate_sigma(image[0])
        assert 15 < sigma < 35
        torch.testing.assert_close(load(path)(image), model(image, sigma).sample.clamp(0, 1), atol=1e-5, rtol=1e-5)
