"""Forms for recorded graphs: the same values as the formulas, and one traced model for every size."""

import pytest
import torch

from iptv2_diffusion.kernels.registry import _SYMBOLIC_FORMS
from iptv2_diffusion.models import attention, backbone, layers
from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

SIZES = [(1, 1), (3, 2), (8, 8), (9, 16), (17, 31)]


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("shifted", [True, False])
def test_focal_attention(size, window, shifted):
    branches = 2 if shifted else 1
    arguments = (
        normal(2, *size, 48),
        normal(branches, 2, window**2),
        normal(branches, 2),
        normal(2, 2, window**2) if shifted else None,
        2,
        window,
    )
    expected = attention.focal_attention.plain(*arguments)
    torch.testing.assert_close(_SYMBOLIC_FORMS["focal_attention"](*arguments), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [{"stride": 1}, {"stride": 3}, {"stride": None, "grid_size": 4}])
def test_grid_attention(size, grid):
    layer = attention.GlobalGridAttention(16, 2, **grid)
    qkv, scale = normal(2, *size, 48), torch.tensor([3.0, 5.0])
    expected = attention.grid_attention.plain(qkv, scale, 2, layer.strides(*size))
    found = _SYMBOLIC_FORMS["grid_attention"](qkv, scale, 2, layer.strides(*size, clip=False))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("operator", "size", "argument"),
    [(backbone.pad_replicate, (5, 7), 4), (layers.pixel_shuffle, (5, 7), 2), (layers.pixel_unshuffle, (4, 6), 2)],
)
def test_operators_that_move_pixels(operator, size, argument):
    x = normal(2, 8, *size)
    assert torch.equal(_SYMBOLIC_FORMS[operator.__name__](x, argument), operator.plain(x, argument))


SMALL = {"channels": 16, "layers_per_stage": (1, 1, 1), "num_attention_heads": 2, "window_size": 4}
MODELS = {
    "denoiser": lambda: IPTV2Transformer2DModel(
        sample_size=16, num_class_embeds=3, conditioning_dim=32, grid_stride=(2, 1), **SMALL
    ),
    "restorer": lambda: IPTV2RestorationModel(unshuffle=2, sigma_conditioning="map", grid_size=4, **SMALL),
}


class Plain(torch.nn.Module):
    """The model as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_works_at_other_sizes(name, fused):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def inputs(batch, height, width):
        if name == "restorer":
            return torch.rand(batch, 3, height, width), 50 * torch.rand(batch)
        return torch.randn(batch, 4, height, width), 1000 * torch.rand(batch), torch.randint(0, 3, (batch,))

    model = Plain(model.fuse() if fused else model).eval().requires_grad_(False)
    traced = torch.jit.trace(model, inputs(2, 13, 22), check_trace=False)
    for size in ((1, 1, 1), (1, 7, 30), (3, 16, 16)):
        example = inputs(*size)
        torch.testing.assert_close(traced(*example), model(*example), atol=2e-5, rtol=1e-4)
