"""Named model configurations with their parameters and GMACs, and `create_model`, which builds a model from a name."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iptv2_diffusion.files import shipped
from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_yaml

from .loading import load_whole
from .restoration_iptv2 import IPTV2RestorationModel
from .saved import SavedModel, find_saved
from .transformer_iptv2 import IPTV2Transformer2DModel

__all__ = ["PRESETS", "Preset", "count_macs", "count_parameters", "create_model", "find_weights"]


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
    """Preset of diffusers' DiT (Peebles & Xie 2023), whose embedders per block add parameters to the paper's."""
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


# restoration-b has the parameters and MACs of Restormer's neighbours (model.md §7); heads of 24 to 48 channels [ours].
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


def create_model(name: str, **overrides: Any) -> ModelMixin:
    """Build a new model from a preset or a configuration file (JSON or YAML), or load a saved model.

    Args:
        name: key of `PRESETS`; path of a `config.json` or YAML file; or folder of a model or of its pipeline, written
            by `save_pretrained`, or its name on the Hub. The weights of a saved model are loaded, and overrides must
            agree with its configuration.
        **overrides: arguments of the model that replace those of the configuration. For DiT, `num_class_embeds` becomes
            `num_embeds_ada_norm`, and None becomes a single class.

    Returns:
        The model, on the CPU unless a `torch.device` context is active.

    Raises:
        ValueError: `name` is no preset, file or saved model, or an override is unknown, out of range or in conflict
            with a saved model.
    """
    saved = find_weights(name)
    if name in PRESETS:
        model_class, config = PRESETS[name].model_class, dict(PRESETS[name].config)
    elif saved is not None:
        model_class, config = read_config(saved.folder)
    elif name and shipped(name).exists():
        model_class, config = read_config(shipped(name))
    else:
        near = get_close_matches(name, PRESETS, n=3, cutoff=0) or list(PRESETS)
        raise ValueError(f"no preset, config.json or model folder called {name!r}; did you mean {' or '.join(near)}?")

    overrides = translate_overrides(model_class, overrides)
    if saved is not None:
        model = load_whole(model_class, saved.folder)
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items()}  # JSON has no tuples
        overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        differing = [f"{k}={saved[k]!r}, not {v!r}" for k, v in overrides.items() if saved[k] != v]
        if differing:
            raise ValueError(f"{name} was saved with {'; '.join(differing)}")
    else:
        model = _make(model_class, config, overrides)
    if isinstance(model, DiTTransformer2DModel):
        disable_label_dropout(model)
    return model


def find_weights(name: str) -> SavedModel | None:
    """Find the saved model that `create_model(name)` loads; None if it makes a new one. Raises as `find_saved` does."""
    return None if name in PRESETS or not name else find_saved(name)


LARGEST_SIZE = 1 << 20  # largest number that a configuration may have
MOST_LAYERS = 10_000
# Arguments that scripts set from the data. All other overrides come from the user.
_OF_THE_DATA = {"sample_size", "in_channels", "out_channels", "num_class_embeds", "num_embeds_ada_norm", "num_tasks"}


def _make(model_class: type[ModelMixin], config: dict[str, Any], overrides: dict[str, Any]) -> ModelMixin:
    """Build a new model. Raises a ValueError for impossible values and for models larger than this machine's memory."""
    values = {**config, **overrides}
    for name, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, (int, float)) and abs(number) > LARGEST_SIZE for number in numbers):
            raise ValueError(f"{name} is {value!r}; no size of a model is above {LARGEST_SIZE}")
    layers = values.get("layers_per_stage", values.get("num_layers", 0))
    if isinstance(layers, (list, tuple)):
        layers = sum(count for count in layers if isinstance(count, int))
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"{layers} layers are more than {MOST_LAYERS}; lower layers_per_stage")
    given = {name: value for name, value in overrides.items() if name not in _OF_THE_DATA}
    try:
        if given:
            _check_memory(model_class, config, overrides)
        return model_class.from_config(config, **overrides)
    except ValueError:
        raise
    except Exception as error:  # torch and diffusers raise many types for bad values
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        shown = ", ".join(f"{name}={value!r}" for name, value in (given or values).items() if name[0] != "_")[:200]
        raise ValueError(f"a {model_class.__name__} cannot be made with {shown}: {reason}") from error


def _check_memory(model_class: type[ModelMixin], config: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Raise a ValueError if the weights exceed this machine's memory; allocating them would kill the process."""
    with torch.device("meta"):
        needed = 4 * count_parameters(model_class.from_config(config, **overrides))
    available = psutil.virtual_memory().total
    if needed > available:
        raise ValueError(
            f"a model of {needed / 4e9:.3g} billion parameters takes {needed / 1e9:.3g} GB, this machine has "
            f"{available / 1e9:.3g} GB; lower channels or layers_per_stage"
        )


MODEL_CLASSES = {c.__name__: c for c in (IPTV2Transformer2DModel, IPTV2RestorationModel, DiTTransformer2DModel)}


def read_config(path: Path) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Read the class and the configuration of a model from a JSON or YAML file, or from a saved folder.

    Raises:
        ValueError: the file cannot be read, names an unknown class, or has an argument that the class does not have.
    """
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = [child.parent.name for child in sorted(path.glob("*/config.json"))]
            hint = f"; one of its folders may be meant: {', '.join(inside)}" if inside else ""
            raise ValueError(f"{path} has no config.json: it is not a folder that a model was saved in{hint}")
        path = path / "config.json"
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))  # JSON is YAML
    except StrictSyntaxError as error:
        reason = str(error)
        joined = f"{path}, {reason}" if reason.startswith("line ") else f"{path} is neither JSON nor YAML: {reason}"
        raise ValueError(joined) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not the names and values of a model's arguments")
    class_name = config.get("_class_name", IPTV2Transformer2DModel.__name__)
    if class_name not in MODEL_CLASSES:
        raise ValueError(f"{path}: _class_name is {class_name!r}, not one of {', '.join(MODEL_CLASSES)}")
    model_class = MODEL_CLASSES[class_name]
    check_arguments(model_class, [key for key in config if not key.startswith("_")])
    return model_class, config


def check_arguments(model_class: type[ModelMixin], names: Iterable[str]) -> None:
    """Raise a ValueError for the first name that is not an argument of the class. diffusers would only warn."""
    known = model_class._get_init_keys(model_class) - {"self"}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0)
            raise ValueError(f"{model_class.__name__} has no argument {name!r}; did you mean {' or '.join(near)}?")


def translate_overrides(model_class: type[ModelMixin], overrides: dict[str, Any]) -> dict[str, Any]:
    """Translate our argument names to DiT's if needed, and raise a ValueError for an argument that the class lacks."""
    overrides = dict(overrides)
    if model_class is DiTTransformer2DModel:
        if "num_class_embeds" in overrides:
            overrides["num_embeds_ada_norm"] = overrides.pop("num_class_embeds") or 1
        if overrides.get("out_channels", 0) is None:
            overrides["out_channels"] = overrides.get("in_channels", 4)
        if isinstance(overrides.get("sample_size"), (tuple, list)):
            height, width = overrides["sample_size"]
            if height != width:
                raise ValueError(f"DiT takes square latents, not {height}×{width}")
            overrides["sample_size"] = height
    check_arguments(model_class, overrides)
    return overrides


def disable_label_dropout(model: nn.Module) -> None:
    """Disable the label dropout inside diffusers' DiT, so that only the training loop drops labels.

    Each block of diffusers' DiT has a label embedder that drops 10 % of the labels independently of the others. Hardly
    any sample then has no label in all blocks, which classifier-free guidance needs. The embedding of the null label
    remains.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def count_parameters(model: nn.Module) -> int:
    """Count all parameters of a model, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: ModelMixin, height: int | None = None, width: int | None = None, batch_size: int = 1) -> int:
    """Count the multiply–accumulates per sample of a forward pass: matrix products, convolutions and attention.

    The function counts a model of the same configuration on the meta device, because PyTorch's counter ignores
    attention on the CPU.

    Args:
        model: denoiser or restorer of this package, or diffusers' DiT. Pass `model.fuse()` to count the deployed form.
        height: height of the latent or image; by default that of the model's `sample_size`.
        width: width of the latent or image; by default that of the model's `sample_size`.
        batch_size: batch size of the forward pass. It affects only an unfused model, which merges its weights once per
            batch.

    Raises:
        ValueError: the model has no `sample_size`, and `height` or `width` is missing.
    """
    size = model.config.sample_size
    if size is None and (height is None or width is None):
        raise ValueError("this model has no sample_size: give height and width")
    size = size or (height, width)
    default_height, default_width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
        sample = torch.empty(batch_size, model.config.in_channels, height or default_height, width or default_width)
        floats, integers = torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.long)
    if isinstance(twin, IPTV2RestorationModel):
        sigma = None if twin.config.sigma_conditioning is None else floats
        conditions = (sigma, None if twin.config.num_tasks is None else integers)
    else:
        conditions = (floats, integers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(sample, *conditions)
    return counter.get_total_flops() // (2 * batch_size)
