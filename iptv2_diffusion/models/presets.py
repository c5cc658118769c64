"""`create_model` builds a model from the name of a preset, a configuration file or a saved model."""

from collections.abc import Iterable
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
from iptv2_diffusion.messages import one_line
from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_yaml

from .loading import load_whole
from .preset_table import PRESETS, RESTORATION_PRESETS, Preset
from .restoration_iptv2 import IPTV2RestorationModel
from .saved import SavedModel, find_saved
from .transformer_iptv2 import IPTV2Transformer2DModel

__all__ = ["PRESETS", "RESTORATION_PRESETS", "Preset", "count_macs", "count_parameters", "create_model", "find_weights"]


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
        ValueError: `name` is not a preset, file or saved model, or an override is unknown, out of range or in conflict
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
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items()}  # JSON has no tuples
        overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        differing = [f"{k}={stored[k]!r}, not {v!r}" for k, v in overrides.items() if stored[k] != v]
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
            raise ValueError(f"{name} is {value!r}; the largest size allowed is {LARGEST_SIZE}")
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
        reason = one_line(error, 200)
        shown = ", ".join(f"{name}={value!r}" for name, value in (given or values).items() if name[0] != "_")[:200]
        raise ValueError(f"cannot build a {model_class.__name__} with {shown}: {reason}") from error


def _check_memory(model_class: type[ModelMixin], config: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Raise a ValueError if the weights exceed this machine's memory; allocating them would kill the process."""
    with torch.device("meta"):
        needed = 4 * count_parameters(model_class.from_config(config, **overrides))
    available = psutil.virtual_memory().total
    if needed > available:
        raise ValueError(
            f"a model of {needed / 4e9:.3g} billion parameters needs {needed / 1e9:.3g} GB, but this machine "
            f"has {available / 1e9:.3g} GB; lower channels or layers_per_stage"
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
            hint = f"; did you mean one of its folders: {', '.join(inside)}?" if inside else ""
            raise ValueError(f"{path} has no config.json: no model was saved in this folder{hint}")
        path = path / "config.json"
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))  # JSON is YAML
    except StrictSyntaxError as error:
        reason = str(error)
        joined = f"{path}, {reason}" if reason.startswith("line ") else f"{path} is neither JSON nor YAML: {reason}"
        raise ValueError(joined) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not the names and values of a model's arguments")
    odd = next((key for key in config if not isinstance(key, str)), None)
    if odd is not None:
        raise ValueError(f"{path}: the name {odd!r} is not text; give the names and values of a model's arguments")
    class_name = config.get("_class_name", IPTV2Transformer2DModel.__name__)
    if not isinstance(class_name, str) or class_name not in MODEL_CLASSES:
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

    Each block of diffusers' DiT has a label embedder that drops 10 % of the labels independently of the others.
    Classifier-free guidance needs samples without a label in every block, which are then very rare. The embedding of
    the null label remains.
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
    size: Any = model.config.sample_size
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
