"""int8 weights of torchao through diffusers' TorchAoConfig, on a CPU."""

import pytest
import torch
from diffusers import TorchAoConfig

from iptv2_diffusion import IPTV2RestorationModel, IPTV2Transformer2DModel
from iptv2_diffusion.kernels import is_quantized

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

SMALL = {"channels": 32, "layers_per_stage": (1,), "num_attention_heads": 2, "window_size": 4}


def make(name, fused):
    torch.manual_seed(0)
    if name == "denoiser":
        model = IPTV2Transformer2DModel(8, num_class_embeds=3, conditioning_dim=32, grid_stride=2, **SMALL)
    else:
        model = IPTV2RestorationModel(sigma_conditioning="map", grid_size=4, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return (model.fuse() if fused else model).eval()


@torch.no_grad()
def predict(model):
    x = torch.randn(2, model.config.in_channels, 9, 8, generator=torch.Generator().manual_seed(0))
    if isinstance(model, IPTV2RestorationModel):
        return model(x, 25.0).sample - x
    return model(x, torch.tensor([300.0, 700.0]), torch.tensor([0, 1])).sample


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["denoiser", "restorer"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_quantised_model_predicts_nearly_the_same(name, fused, kind, tmp_path):
    import torchao.quantization

    model = make(name, fused)
    model.save_pretrained(tmp_path)
    quantization = TorchAoConfig(getattr(torchao.quantization, kind)())
    quantised = (
        type(model).from_pretrained(tmp_path, quantization_config=quantization, torch_dtype=torch.float32).eval()
    )
    assert sum(is_quantized(weight) for weight in quantised.parameters()) >= 8
    expected, found = predict(model), predict(quantised)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(RuntimeError, match=r"quantised by torchao; call fuse\(\)"):
        quantised.fuse()
