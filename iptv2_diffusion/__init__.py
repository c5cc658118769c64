"""IPT-V2 (arXiv 2404.00633): a U-shaped image transformer with hierarchical attentions, made to live in diffusers.

    import torch
    from iptv2_diffusion import IPTV2Pipeline

    pipe = IPTV2Pipeline.from_pretrained("assets/iptv2-emoji64")
    image = pipe("food_drink", generator=torch.Generator().manual_seed(0)).images[0]

Importing this package costs milliseconds, and imports neither torch nor diffusers: each public name is loaded when
first used, and diffusers hears of us when it is imported, before or after.

Living in diffusers. A saved pipeline records each component as (module, class). Our classes say that their module is
``iptv2_diffusion``, whatever file they are in, so that files may move without breaking saved pipelines; diffusers then
looks here for the class and for the base classes ``ModelMixin`` and ``SchedulerMixin`` by which it knows how to load
it: hence they are public names too. :func:`_register_with_diffusers` does what is left for
``DiffusionPipeline.from_pretrained``.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from iptv2_diffusion.latents import LatentCodec
    from iptv2_diffusion.models.presets import PRESETS, create_model
    from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
    from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel
    from iptv2_diffusion.objectives import DiffusionObjective
    from pipelines.pipeline_iptv2 import IPTV2Pipeline
    from pipelines.pipeline_iptv2_restoration import IPTV2RestorationPipeline

# Public name -> the module it is loaded from when first used.
_LAZY_NAMES = {
    "PRESETS": "iptv2_diffusion.models.presets",
    "DiffusionObjective": "iptv2_diffusion.objectives",
    "IPTV2Pipeline": "pipelines.pipeline_iptv2",
    "IPTV2RestorationModel": "iptv2_diffusion.models.restoration_iptv2",
    "IPTV2RestorationPipeline": "pipelines.pipeline_iptv2_restoration",
    "IPTV2Transformer2DModel": "iptv2_diffusion.models.transformer_iptv2",
    "LatentCodec": "iptv2_diffusion.latents",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "create_model": "iptv2_diffusion.models.presets",
}

__all__ = [
    "PRESETS",
    "DiffusionObjective",
    "IPTV2Pipeline",
    "IPTV2RestorationModel",
    "IPTV2RestorationPipeline",
    "IPTV2Transformer2DModel",
    "LatentCodec",
    "ModelMixin",
    "SchedulerMixin",
    "create_model",
]

# Pipelines that plain ``DiffusionPipeline.from_pretrained`` is to find.
_PIPELINES = ("IPTV2Pipeline", "IPTV2RestorationPipeline")

try:
    __version__ = version("iptv2-diffusion")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    if isinstance(value, type) and value.__module__.startswith(("iptv2_diffusion.", "pipelines.")):
        value.__module__ = __name__  # what a saved pipeline records
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_diffusers() -> None:
    """Let plain ``DiffusionPipeline.from_pretrained(folder)`` load our pipelines; diffusers has been imported.

    diffusers looks for the pipeline class as an attribute of ``diffusers``, and takes a component's module to be its
    own if it is an attribute of ``diffusers.pipelines`` (for a repository on the Hub it accepts no other). Neither has
    a public hook. The pipeline class is found lazily, since importing any pipeline takes seconds. Names that diffusers
    should define itself one day are left alone, and so is a diffusers built in another way:
    ``IPTV2Pipeline.from_pretrained`` of a folder needs none of this.
    """
    diffusers = sys.modules["diffusers"]

    class DiffusersWithOurPipelines(type(diffusers)):
        finds_iptv2_pipelines = True

        def __getattr__(self, name: str) -> Any:
            return getattr(sys.modules[__name__], name) if name in _PIPELINES else super().__getattr__(name)

    try:
        if not hasattr(diffusers.pipelines, __name__):
            setattr(diffusers.pipelines, __name__, sys.modules[__name__])
        known = hasattr(type(diffusers), "finds_iptv2_pipelines") or any(name in dir(diffusers) for name in _PIPELINES)
        if not known:
            diffusers.__class__ = DiffusersWithOurPipelines
    except (AttributeError, TypeError):
        return


class _RegisterOnImport(MetaPathFinder):
    """Registers us as soon as diffusers has been imported, by whomever."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_with_diffusers()

            spec.loader.exec_module = execute_and_register
        return spec


if "diffusers" in sys.modules:
    _register_with_diffusers()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
