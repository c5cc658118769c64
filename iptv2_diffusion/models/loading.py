"""Strict loading of weights: complete weights or an error, and bit-identical results after loading."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from safetensors import safe_open
from torch import Tensor, nn

from iptv2_diffusion.messages import one_line

__all__ = [
    "AlignedLoadingMixin",
    "align_weights",
    "check_complete",
    "check_loaded",
    "load_vae",
    "load_whole",
    "probable_content",
]

ALIGNMENT = 64  # bytes; alignment of the tensors that torch allocates
SHOWN = 3  # number of weights that an error names
# Probable content of a file, by a pattern that matches one of its keys
SIGNS = (
    (
        r"\.lora_[AB]\.|\.lora\.(up|down)\.|lora_(up|down)",
        "an adapter (LoRA), which is loaded onto a model by load_lora_adapter",
    ),
    (r"^_orig_mod\.", "saved from a compiled model (torch.compile): remove the prefix _orig_mod. from its names"),
    (r"^module\.", "saved from a wrapped model (DataParallel): remove the prefix module. from its names"),
    (
        r"^(encoder|decoder)\.(conv_in|down_blocks|up_blocks|mid_block)|^quant_conv",
        "the weights of a VAE (AutoencoderKL)",
    ),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.", "the weights of a DiT (DiTTransformer2DModel)"),
    (
        r"^blocks\.\d+\.adaLN_modulation",
        "the weights of a DiT under its authors' names; diffusers loads facebook/DiT-XL-2-256 from the Hub",
    ),
    (r"^(down|up)_blocks\.\d+\.(attentions|resnets)", "the weights of a U-Net (such as UNet2DModel)"),
    (r"^text_model\.|^vision_model\.", "the weights of a CLIP model"),
    (r"^(stem|head)\.", "the weights of an IPTV2RestorationModel"),
    (r"^(conv_in|time_embed|class_embedder|conditioning)\b.*", "the weights of another denoiser"),
)


def align_weights(model: nn.Module) -> None:
    """Copy, in place, the CPU weights that are not aligned as torch aligns new tensors.

    safetensors maps weights at their offset in the file. Some vector kernels sum in another order at an unaligned
    address, so the last bits of a result would differ from those of the saved model.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def check_complete(model: diffusers.ModelMixin) -> None:
    """Raise a ValueError that names the weights without values, which are still on the meta device."""
    empty = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if empty:
        raise ValueError(
            f"the weights of this {type(model).__name__} are incomplete: {_listed(empty)} missing in its file; "
            "download or save it again"
        )
    check_dtypes(model, str(model.config.get("_name_or_path") or ""))


def load_whole(model_class: type[diffusers.ModelMixin], *args: Any, **kwargs: Any) -> diffusers.ModelMixin:
    """Call `model_class.from_pretrained(...)`, and raise if weights are missing, unexpected or misshapen.

    Raises:
        ValueError: there are such weights. The message names them and the probable content of the file.
        OSError: the folder, the file or the name on the Hub does not exist.
    """
    name = _name_of(args, kwargs)
    with _short_shape_errors(name, model_class.__name__):
        model, info = model_class.from_pretrained(*args, **{**kwargs, "output_loading_info": True})
    check_loaded(model, name, info)
    return model


def load_vae(name: str, subfolder: str | None = None) -> diffusers.ModelMixin:
    """Load a VAE of diffusers, of the class that its configuration names, in evaluation mode and without gradients.

    Raises:
        ValueError: the model is not a VAE with latent channels, or weights are missing, unexpected or misshapen.
        OSError: the folder or the name on the Hub does not exist, or it has no safetensors.
    """
    options = {} if subfolder is None else {"subfolder": subfolder}
    class_name = diffusers.AutoencoderKL.load_config(name, **options).get("_class_name", "AutoencoderKL")
    vae_class = getattr(diffusers, class_name, None)
    vae = None
    if isinstance(vae_class, type) and issubclass(vae_class, diffusers.ModelMixin):
        vae = load_whole(vae_class, name, use_safetensors=True, **options)  # AutoModel does not report the weights
    if vae is None or "latent_channels" not in vae.config:
        raise ValueError(f"{name} is a {class_name}; give a VAE of diffusers, such as an AutoencoderKL")
    return vae.requires_grad_(False).eval()


def _name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    name, folder = args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs.get("subfolder")
    return f"{name}/{folder}" if folder else str(name)


@contextlib.contextmanager
def _short_shape_errors(name: str, kind: str) -> Iterator[None]:
    """Replace diffusers' errors about misshapen weights, which fill pages, with one line that names the file.

    Args:
        name: name of the file or folder.
        kind: class of the model.
    """
    log = logging.getLogger("diffusers.models.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        found = re.search(
            r"because (\S+) expected shape (\S+), but got ([^.]+\))", str(error).replace("torch.Size", "")
        )
        if found is None and "size mismatch" not in str(error):
            raise
        detail = one_line(error, 160)
        if found:
            detail = f"{found[1]} is {found[3].strip('()')}, not {found[2].strip('()')}"
        raise ValueError(
            f"{name} does not hold the weights of this {kind}: misshapen, {detail}; its config.json may belong to "
            "another file"
        ) from error
    finally:
        log.setLevel(level)


def check_loaded(model: diffusers.ModelMixin, name: str, info: dict[str, Any]) -> None:
    """Raise a ValueError if diffusers' loading information names weights that are missing, unexpected or misshapen."""
    missing, unexpected = sorted(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ())
    misshapen = [
        f"{key} ({'x'.join(map(str, there))}, not {'x'.join(map(str, here))})"
        for key, there, here in (info.get("mismatched_keys") or ())
    ]
    problems = [f"{_listed(keys)} {word}" for keys, word in ((missing, "missing"), (unexpected, "unexpected")) if keys]
    problems += [f"{_listed(misshapen)} misshapen"] if misshapen else []
    if not problems:
        check_dtypes(model, name)
    else:
        raise ValueError(
            f"{name} does not hold the weights of this {type(model).__name__}: {'; '.join(problems)}"
            f"{_resemblance(model, missing, unexpected)}"
        )


def check_dtypes(model: diffusers.ModelMixin, folder: str) -> None:
    """Raise a ValueError if a folder stores weights as whole or complex numbers, which loading would cast to floats."""
    if not Path(folder).is_dir() or "quantization_config" in model.config:
        return
    floats = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in floats.intersection(file.keys())}
        odd = sorted(key for key, dtype in dtypes.items() if dtype.startswith(("I", "U", "BOOL", "C")))
        if odd:
            raise ValueError(f"{path}: {_listed(odd)} stored as {dtypes[odd[0]]}, not as floats; save the model again")


def probable_content(keys: Iterable[str]) -> str | None:
    """Return the probable content of a file with these unexpected keys; None if it resembles nothing known."""
    keys = list(keys)
    return next((what for pattern, what in SIGNS if any(re.search(pattern, key) for key in keys)), None)


def _resemblance(model: diffusers.ModelMixin, missing: Iterable[str], unexpected: list[str]) -> str:
    """Return the end of an error message: the probable content of the file, or the probable cause."""
    content = probable_content(unexpected)
    if content is not None:
        return f"; the file seems to be {content}"
    if unexpected and missing and hasattr(model, "fuse"):
        fused = bool(model.config.get("fused"))
        form, other = ("fused", "unfused (training)") if fused else ("unfused (training)", "fused")
        return f"; config.json says {form}: the file may hold the {other} form, or a model of other sizes"
    if not unexpected:
        return "; the file is incomplete: download or save it again"
    return "; its config.json may belong to another file"


def _listed(names: list[str]) -> str:
    """Return '3 weights (a, b, c) are', with at most `SHOWN` names."""
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({shown}) {'are' if len(names) > 1 else 'is'}"


if TYPE_CHECKING:  # a mixin of models; at run time it must not precede nn.Module
    from diffusers import ModelMixin as _Base
else:
    _Base = object


class AlignedLoadingMixin(_Base):
    """Mixin that makes `from_pretrained` load complete, aligned weights or raise. It must precede `ModelMixin`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `ModelMixin.from_pretrained` does, with all of its arguments.

        Raises:
            ValueError: weights are missing, unexpected or misshapen. `ignore_mismatched_sizes=True` allows the last.
        """
        name = _name_of(args, kwargs)
        with _short_shape_errors(name, cls.__name__):
            model, info = super().from_pretrained(*args, **{**kwargs, "output_loading_info": True})
        lenient = {**info, "mismatched_keys": []} if kwargs.get("ignore_mismatched_sizes") else info
        check_loaded(model, name, lenient)
        align_weights(model)
        return (model, info) if kwargs.get("output_loading_info") else model
