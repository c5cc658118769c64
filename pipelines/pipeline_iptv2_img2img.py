"""IPTV2Img2ImgPipeline: change images by adding noise to them and denoising them again (SDEdit).

    x_0      = encode(image)                      the mean of the VAE's posterior
    x_s      = add_noise(x_0, noise, t_s)         t_s: where the last `strength` of the steps begins
    x_{t-1}  = one step of IPTV2Pipeline          from t_s on

(Meng et al. 2021, arXiv 2108.01073.) With strength 0 there is no step, and the result is the VAE's round trip.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor

from .class_labels import Label
from .image_inputs import read_images
from .pipeline_iptv2 import IPTV2Pipeline
from .starts import ImageStart


class IPTV2Img2ImgPipeline(IPTV2Pipeline):
    """Pipeline that changes images towards a class.

    It has the components of `IPTV2Pipeline`. ``IPTV2Img2ImgPipeline.from_pipe(pipe)`` creates it from such a pipeline
    and shares the weights.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the arguments of diffusers' pipelines for this task
        self,
        class_labels: Label | Sequence[Label] | Tensor | np.ndarray | None = None,
        image: Any = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guider: BaseGuidance | None = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Change images. The arguments that are not listed here are those of `IPTV2Pipeline`.

        Args:
            class_labels: class of each image, or one class for all; None for an unconditional model, or for the null
                label.
            image: PIL image, array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], a list of these, or latents
                (N, C, h, w) in model units. One for all labels, or one per label.
            strength: fraction of the steps that run, in [0, 1]. 0 returns the image after the VAE's round trip; 1 keeps
                almost nothing of it.
            height, width: size in pixels to which the images are resized; None for their own size.
            num_inference_steps: number of steps at strength 1.

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or a tuple with the images.

        Raises:
            ValueError: an argument is out of range, or the scheduler does not fit the transformer.
            NonFiniteImageError: a ValueError; an image has NaN or infinity.

        Examples:
            ```py
            >>> from diffusers.utils import load_image
            >>> from iptv2_diffusion import IPTV2Img2ImgPipeline

            >>> pipe = IPTV2Img2ImgPipeline.from_pretrained("assets/iptv2-emoji64")
            >>> changed = pipe("flags", load_image("cat.png"), strength=0.6, height=64, width=64).images[0]
            ```
        """
        options = dict(locals())
        for name in ("self", "image", "strength", "height", "width"):
            del options[name]
        images = read_images(image, self.codec, height, width).to(self._execution_device)
        start = ImageStart(images, strength, self.codec)
        return self._generate(start, **options, height=start.size[0], width=start.size[1])
