"""The named model configurations, each with its parameters and GMACs."""

from dataclasses import dataclass
from typing import Any

from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin

from .restoration_iptv2 import IPTV2RestorationModel
from .transformer_iptv2 import IPTV2Transformer2DModel

__all__ = ["PRESETS", "RESTORATION_PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A named model configuration and its cost. A test checks every preset against these figures.

    Attributes:
        config: arguments of the model's `__init__` that differ from its defaults.
        parameters: millions of parameters of the (fused) model.
        gmacs: 10⁹ multiply–accumulates of one (fused) forward pass at batch size 1 and `config["sample_size"]`. Papers
            call this figure GFLOPs.
        model_class: diffusers model class.
    """

    config: dict[str, Any]
    parameters: float
    gmacs: float
    model_class: type[ModelMixin] = IPTV2Transformer2DModel


def dit(heads: int, head_dim: int, layers: int, patch_size: int, parameters: float, gmacs: float) -> Preset:
    """Preset of diffusers' DiT (Peebles & Xie 2023). Its embedders in each block add to the paper's parameters."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "patch_size": patch_size,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 8,
    }
    return Preset(config, parameters, gmacs, DiTTransformer2DModel)


def wide(channels: int, layers: tuple[int, int, int], head_dim: int, parameters: float, gmacs: float) -> Preset:
    """Preset of a denoiser with patch size 2 and two levels of C and 2C channels; GGSA groups have 64 tokens."""
    config = {
        "patch_size": 2,
        "channels": channels,
        "layers_per_stage": layers,
        "num_attention_heads": tuple(level * channels // head_dim for level in (1, 2, 2)),
        "grid_stride": (2, 1),
    }
    return Preset(config, parameters, gmacs)


def restorer(parameters: float, gmacs: float, **config: Any) -> Preset:
    """Preset of a restorer for colour images, with MACs at 128×128×3 unless `config` gives another `sample_size`."""
    return Preset({"sample_size": 128, **config}, parameters, gmacs, IPTV2RestorationModel)


# restoration-b has about the parameters and MACs of Restormer and Xformer (model.md §7). Heads have 24 to 48 channels
# [ours].
RESTORATION_PRESETS: dict[str, Preset] = {
    "restoration-tiny": restorer(  # for tests
        0.0776,
        0.00313,
        sample_size=16,
        unshuffle=2,
        channels=16,
        layers_per_stage=(1, 1, 1),
        num_attention_heads=2,
        window_size=4,
        grid_size=4,
    ),
    "restoration-tiny-exchange": restorer(  # has the same backbone keys and shapes as "tiny"
        0.106,
        0.0029,
        sample_size=8,
        channels=16,
        layers_per_stage=(1, 1, 1),
        num_attention_heads=2,
        window_size=4,
        grid_stride=(2, 1),
        grid_size=None,
        sigma_conditioning="vector",
        conditioning_dim=32,
    ),
    "restoration-emoji64": restorer(  # has the backbone of "emoji64", so it can load that of assets/iptv2-emoji64
        9.22,
        0.269,
        sample_size=16,
        channels=64,
        layers_per_stage=(1, 1, 4, 1, 1),
        num_attention_heads=(2, 4, 8, 4, 4),
        grid_stride=(2, 1, 1),
        grid_size=None,
        sigma_conditioning="vector",
        conditioning_dim=128,
    ),
    "restoration-nano": restorer(  # for CPUs; MACs at 64×64; fewer parameters than FFDNet's 852 k
        0.832,
        0.159,
        sample_size=64,
        unshuffle=2,
        channels=32,
        layers_per_stage=(1, 1, 2, 1, 1),
        num_attention_heads=(2, 4, 4, 4, 4),
        attention_pattern=("focal",),
        sigma_conditioning="map",
    ),
    "restoration-xs": restorer(  # two wider levels and 2.7 times the MACs of nano; MACs at 64×64
        0.834,
        0.425,
        sample_size=64,
        unshuffle=2,
        channels=48,
        layers_per_stage=(2, 5, 2),
        num_attention_heads=(2, 4, 4),
        attention_pattern=("focal",),
        sigma_conditioning="map",
    ),
    "restoration-s": restorer(
        6.54,
        6.92,
        channels=32,
        layers_per_stage=(1, 2, 2, 3, 2, 2, 1),
        num_attention_heads=(1, 2, 4, 8, 4, 2, 2),
    ),
    "restoration-b": restorer(
        26.3,
        40.2,
        channels=48,
        layers_per_stage=(4, 6, 6, 5, 6, 6, 4),
        num_attention_heads=(1, 2, 4, 8, 4, 2, 2),
    ),
}
# iptv2-s to iptv2-xl match the GMACs of DiT-*/2 (model.md §7). Heads have 32 channels at S and B, and 64 at L and XL.
# GGSA strides 4, 2, 1 make groups of 64 tokens at every level of a 32×32 latent [ours].
PRESETS: dict[str, Preset] = {
    "tiny": Preset(  # for tests
        {
            "sample_size": 8,
            "channels": 16,
            "layers_per_stage": (1, 1, 1),
            "num_attention_heads": 2,
            "window_size": 4,
            "grid_stride": (2, 1),
            "num_class_embeds": 9,
            "conditioning_dim": 32,
        },
        parameters=0.126,
        gmacs=0.00354,
    ),
    "emoji64-s": Preset(  # the demo on 16×16×4 latents; the shape of the arena
        {
            "sample_size": 16,
            "patch_size": 2,
            "channels": 64,
            "layers_per_stage": (1, 1, 2),
            "num_attention_heads": (2, 4, 4),
            "grid_stride": 1,
            "num_class_embeds": 9,
            "conditioning_dim": 128,
        },
        parameters=2.21,
        gmacs=0.0685,
    ),
    "dit-emoji64-s": Preset(  # DiT with the GMACs of emoji64-s
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 5,
            "patch_size": 2,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_embeds_ada_norm": 9,
        },
        parameters=1.77,
        gmacs=0.0692,
        model_class=DiTTransformer2DModel,
    ),
    "emoji64": Preset(  # assets/iptv2-emoji64
        {
            "sample_size": 16,
            "channels": 64,
            "layers_per_stage": (1, 1, 4, 1, 1),
            "num_attention_heads": (2, 4, 8, 4, 4),
            "grid_stride": (2, 1, 1),
            "num_class_embeds": 9,
            "conditioning_dim": 128,
        },
        parameters=9.44,
        gmacs=0.307,
    ),
    "dit-emoji64": Preset(  # DiT with about the GMACs of emoji64
        {
            "num_attention_heads": 5,
            "attention_head_dim": 64,
            "num_layers": 4,
            "patch_size": 2,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_embeds_ada_norm": 9,
        },
        parameters=8.36,
        gmacs=0.329,
        model_class=DiTTransformer2DModel,
    ),
    "iptv2-s": Preset(
        {"channels": 128, "layers_per_stage": (1, 3, 5, 3, 1), "num_attention_heads": (4, 8, 16, 8, 8)},
        parameters=50.8,
        gmacs=6.13,
    ),
    "iptv2-b": Preset(
        {"channels": 192, "layers_per_stage": (2, 6, 9, 6, 2), "num_attention_heads": (6, 12, 24, 12, 12)},
        parameters=177.0,
        gmacs=23.1,
    ),
    "iptv2-l": Preset(
        {"channels": 384, "layers_per_stage": (2, 5, 8, 5, 2), "num_attention_heads": (6, 12, 24, 12, 12)},
        parameters=556.9,
        gmacs=83.2,
    ),
    "iptv2-xl": Preset(
        {"channels": 448, "layers_per_stage": (2, 6, 8, 6, 2), "num_attention_heads": (7, 14, 28, 14, 14)},
        parameters=775.2,
        gmacs=119.6,
    ),
    # Patch size 2: with a quarter of the positions and wider maps, the same MACs move fewer bytes, which dominate the
    # time on GPUs (docs/roofline.md). A third level of 4×4 positions would add many parameters and few MACs. The
    # roofline determines the widths, with at least as many attentions as DiT [ours].
    "iptv2-s-2": wide(288, (2, 3, 2), head_dim=32, parameters=51.0, gmacs=5.98),
    "iptv2-b-2": wide(512, (2, 3, 3), head_dim=32, parameters=164.1, gmacs=23.0),
    "iptv2-l-2": wide(768, (3, 6, 5), head_dim=64, parameters=576.4, gmacs=81.0),
    "iptv2-xl-2": wide(896, (4, 8, 5), head_dim=64, parameters=902.2, gmacs=120.0),
    "dit-s-2": dit(6, 64, 12, patch_size=2, parameters=39.8, gmacs=6.06),
    "dit-b-2": dit(12, 64, 12, patch_size=2, parameters=147.4, gmacs=23.0),
    "dit-l-2": dit(16, 64, 24, patch_size=2, parameters=511.6, gmacs=80.7),
    "dit-xl-2": dit(16, 72, 28, patch_size=2, parameters=749.8, gmacs=118.7),
    "dit-s-1": dit(6, 64, 12, patch_size=1, parameters=39.8, gmacs=31.4),
    "dit-b-1": dit(12, 64, 12, patch_size=1, parameters=147.4, gmacs=106.4),
    "dit-l-1": dit(16, 64, 24, patch_size=1, parameters=511.6, gmacs=361.0),
    "dit-xl-1": dit(16, 72, 28, patch_size=1, parameters=749.8, gmacs=524.5),
    **RESTORATION_PRESETS,
}
