"""IPT-V2 restorers as an architecture of spandrel, which loads the models of chaiNNer and of ComfyUI.

import iptv2_diffusion.integrations.spandrel, spandrel

iptv2_diffusion.integrations.spandrel.register()
model = spandrel.ModelLoader().load_from_file("denoise.safetensors")
restored = model(image)  # (1, C, H, W) in [0, 1]
"""

import torch
from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, StateDict
from torch import Tensor

from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
from iptv2_diffusion.pipelines.noise_estimation import estimate_sigma
from iptv2_diffusion.pipelines.single_file import DESCRIPTION, build_restorer

__all__ = ["IPTV2RestorerArchitecture", "register"]

SIGNS = ("stem.weight", "head.weight", "backbone.bottleneck.0.layers.0.out_proj.weight")


def register() -> None:
    """Add the architecture to spandrel's main registry. A second call changes nothing."""
    MAIN_REGISTRY.add(ArchSupport.from_architecture(IPTV2RestorerArchitecture()), ignore_duplicates=True)


class IPTV2RestorerArchitecture(Architecture[IPTV2RestorationModel]):
    """`IPTV2RestorationModel` from the weights alone: a file of `iptv2-export --format spandrel`, or bare weights.

    A model that takes a noise level uses the one in the file. If the file has none, the model estimates the noise level
    of each input, which is a tile if the program works in tiles.
    """

    def __init__(self) -> None:
        super().__init__(id="IPT-V2", name="IPT-V2", detect=is_restorer)

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[IPTV2RestorationModel]:
        """Build the model and load its weights.

        Raises:
            ValueError: the configuration cannot be inferred from the weights.
        """
        model, sigma, task = build_restorer(state_dict)
        if task is None and model.config.num_tasks is not None:
            raise ValueError(
                f"the model has {model.config.num_tasks} tasks, but the file names none; export it with iptv2-export "
                "--format spandrel --task"
            )

        def restore(model: IPTV2RestorationModel, image: Tensor) -> Tensor:
            level: Tensor | float | None = None
            if model.config.sigma_conditioning is not None:
                level = sigma
                if level is None:
                    level = torch.tensor([estimate_sigma(x) for x in image.float()], device=image.device)
            return model(image, level, task, return_dict=False)[0].clamp(0, 1)

        return ImageModelDescriptor(
            model,
            {name: value for name, value in state_dict.items() if name != DESCRIPTION},
            architecture=self,
            purpose="Restoration",
            tags=[f"{model.config.channels} channels", *(["sigma"] if model.config.sigma_conditioning else [])],
            supports_half=False,
            supports_bfloat16=True,
            scale=1,
            input_channels=model.config.in_channels,
            output_channels=model.config.in_channels,
            call_fn=restore,
        )


def is_restorer(state_dict: StateDict) -> bool:
    """Return whether these are the weights of an `IPTV2RestorationModel`; a denoiser also has `proj_out`."""
    return all(name in state_dict for name in SIGNS) and "proj_out.weight" not in state_dict
