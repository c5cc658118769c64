"""IPTV2InpaintPipeline: repaint a part of an image and keep the rest exactly.

    x_{t-1}  = mask * step(x_t) + (1 - mask) * add_noise(x_0, noise, t-1)     after every step, in latents
    image    = mask * decode(x_0) + (1 - mask) * original                     after decoding, in pixels

The denoiser is that of `IPTV2Pipeline`; it is not trained for inpainting (Lugmayr et al. 2022, arXiv 2201.09865, eq. 8,
without resampling).
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
from .starts import MaskedStart


class IPTV2InpaintPipeline(IPTV2Pipeline):
    """Pipeline that repaints a part of images with content of a class.

    It has the components of `IPTV2Pipeline`. ``IPTV2InpaintPipeline.from_pipe(pipe)`` creates it from such a pipeline
    and shares the weights.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the arguments of diffusers' pipelines for this task
        self,
        class_labels: Label | Sequence[Label] | Tensor | np.ndarray | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
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
        """Repaint a part of images. The arguments that are not listed here are those of `IPTV2Pipeline`.

        Args:
            class_labels: class of each image, or one class for all; None for an unconditional model, or for the null
                label.
            image: PIL image, array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], a list of these, or latents
                (N, C, h, w) in model units. One for all labels, or one per label.
            mask_image: PIL image, array (N, H, W) or tensor (N, 1, H, W) in [0, 1]: white (at least 0.5) is repainted,
                black is kept exactly. It is resized to the image. One for all images, or one per image.
            strength: fraction of the steps that run inside the mask, in [0, 1]; see `IPTV2Img2ImgPipeline`.
            height, width: size in pixels to which the images are resized; None for their own size.
            num_inference_steps: number of steps at strength 1.

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or a tuple with the images. Images of ``output_type="latent"``,
            and those of latents as ``image``, are kept in latents only.

        Raises:
            ValueError: an argument is out of range, or the scheduler does not fit the transformer.
            NonFiniteImageError: a ValueError; an image has NaN or infinity.

        Examples:
            ```py
            >>> from diffusers.utils import load_image
            >>> from iptv2_diffusion import IPTV2InpaintPipeline

            >>> pipe = IPTV2InpaintPipeline.from_pretrained("assets/iptv2-emoji64")
            >>> image, mask = load_image("face.png"), load_image("mask.png")
            >>> changed = pipe("smileys_emotion", image, mask, height=64, width=64).images[0]
            ```
        """
        options = dict(locals())
        for name in ("self", "image", "mask_image", "strength", "height", "width"):
            del options[name]
        images = read_images(image, self.codec, height, width).to(self._execution_device)
        start = MaskedStart(images, mask_image, strength, self.codec)
        return self._generate(start, **options, height=start.size[0], width=start.size[1])
