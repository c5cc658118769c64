"""IPT-V2 (arXiv 2404.00633): a U-shaped image transformer with hierarchical attentions, for diffusers.

    import torch
    from iptv2_diffusion import IPTV2Pipeline

    pipe = IPTV2Pipeline.from_pretrained("assets/iptv2-emoji64")
    image = pipe("food_drink", generator=torch.Generator().manual_seed(0)).images[0]

Importing this package takes milliseconds and imports neither torch nor diffusers. Each public name is imported at its
first use.

Integration with diffusers: a saved pipeline records each component as (module, class). Our public classes set
``__module__ = "iptv2_diffusion"`` in every file, so files can move without breaking saved pipelines. diffusers looks up
the class in this module. It also looks up ``ModelMixin`` and ``SchedulerMixin`` here, because the base class decides
how a component is loaded, so both are public names. :func:`_register_with_diffusers` adds the attributes that plain
``DiffusionPipeline.from_pretrained(folder)`` needs.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from iptv2_diffusion.latents import LatentCodec
    from iptv2_diffusion.models.presets import PRESETS, create_model
    from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
    from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel
    from iptv2_diffusion.objectives import DiffusionObjective
    from iptv2_diffusion.pipelines.pipeline_iptv2 import IPTV2Pipeline
    from iptv2_diffusion.pipelines.pipeline_iptv2_img2img import IPTV2Img2ImgPipeline
    from iptv2_diffusion.pipelines.pipeline_iptv2_inpaint import IPTV2InpaintPipeline
    from iptv2_diffusion.pipelines.pipeline_iptv2_restoration import IPTV2RestorationPipeline

# Public name -> module that defines it
_LAZY_NAMES = {
    "PRESETS": "iptv2_diffusion.models.presets",
    "DiffusionObjective": "iptv2_diffusion.objectives",
    "IPTV2Img2ImgPipeline": "iptv2_diffusion.pipelines.pipeline_iptv2_img2img",
    "IPTV2InpaintPipeline": "iptv2_diffusion.pipelines.pipeline_iptv2_inpaint",
    "IPTV2Pipeline": "iptv2_diffusion.pipelines.pipeline_iptv2",
    "IPTV2RestorationModel": "iptv2_diffusion.models.restoration_iptv2",
    "IPTV2RestorationPipeline": "iptv2_diffusion.pipelines.pipeline_iptv2_restoration",
    "IPTV2Transformer2DModel": "iptv2_diffusion.models.transformer_iptv2",
    "LatentCodec": "iptv2_diffusion.latents",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "create_model": "iptv2_diffusion.models.presets",
}

__all__ = [
    "PRESETS",
    "DiffusionObjective",
    "IPTV2Img2ImgPipeline",
    "IPTV2InpaintPipeline",
    "IPTV2Pipeline",
    "IPTV2RestorationModel",
    "IPTV2RestorationPipeline",
    "IPTV2Transformer2DModel",
    "LatentCodec",
    "ModelMixin",
    "SchedulerMixin",
    "create_model",
]

# What diffusers' loaders look up as attributes of diffusers: pipelines, and models that lie alone in a folder
_SAVED_CLASSES = [name for name in _LAZY_NAMES if name.startswith("IPTV2")]

try:
    __version__ = version("iptv2-diffusion")
except PackageNotFoundError:  # a clone of the repository that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ---------------------------------------------------------------------------------------------------------------------
# Plain DiffusionPipeline.from_pretrained and AutoModel.from_pretrained


def _register_with_diffusers() -> None:
    """Register our classes with diffusers, so that its ``DiffusionPipeline`` and ``AutoModel`` can load them.

    diffusers must be imported already. It has no registration hook: it looks up a class as an attribute of
    ``diffusers``, and it loads a repository of the Hub only if the module of each component is an attribute of
    ``diffusers.pipelines``. This function sets both attributes unless diffusers has them.
    ``IPTV2Pipeline.from_pretrained(folder)`` needs neither.
    """
    diffusers, pipelines = sys.modules["diffusers"], importlib.import_module("diffusers.pipelines")
    if not hasattr(pipelines, __name__):
        setattr(pipelines, __name__, sys.modules[__name__])
    if not set(_SAVED_CLASSES) & set(dir(diffusers)):
        vars(diffusers).setdefault("__getattr__", _saved_class)


def _saved_class(name: str) -> Any:
    """Return one of our classes as ``diffusers.<name>`` (PEP 562), imported at its first use (it takes seconds)."""
    if name not in _SAVED_CLASSES:
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")
    return getattr(sys.modules[__name__], name)


class _RegisterLater:
    """Import finder that finds no module; it calls `_register_with_diffusers` when diffusers is imported later."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "diffusers.pipelines.pipeline_utils":  # the module of DiffusionPipeline
            _register_with_diffusers()


if "diffusers" in sys.modules:
    _register_with_diffusers()
else:
    sys.meta_path.insert(0, _RegisterLater)
