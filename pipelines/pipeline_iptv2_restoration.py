"""Image restoration with IPT-V2, for images of any size, in overlapping tiles that blend without a seam."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from iptv2_diffusion.data.image_files import Limits
from iptv2_diffusion.models.activations import activation_bytes_per_pixel
from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
from iptv2_diffusion.non_finite import NonFiniteImageError

from .image_io import Picture, read_pictures, to_output
from .lora_loading import IPTV2LoraLoaderMixin
from .noise_estimation import estimate_sigma
from .tiling import blending, overlap_of, starts

__all__ = ["IPTV2RestorationPipeline", "RestorationPipelineOutput", "estimate_sigma"]


@dataclass
class RestorationPipelineOutput(BaseOutput):
    """Restored images.

    Attributes:
        images: list of PIL images, or array (B, H, W, C) or tensor (B, C, H, W) of float32 in [0, 1]. If the sizes
            differ, a list of arrays or tensors without B.
        sigmas: noise level of each image, given or estimated; None for a blind model, which takes none.
    """

    images: Any
    sigmas: list[float] | None


class IPTV2RestorationPipeline(DiffusionPipeline, IPTV2LoraLoaderMixin):
    """Restore images with an `IPTV2RestorationModel`.

        pipe = IPTV2RestorationPipeline.from_pretrained("assets/iptv2-denoise-color")
        clean = pipe("noisy.png", sigma=25).images[0]

    Args:
        model: the restorer. A fused one is faster.
        sigma_range: range of the noise levels in training, on the 0–255 scale. The pipeline warns about a level outside
            it. None if it is unknown or the model takes no noise level.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move
    model_cpu_offload_seq = "model"
    lora_component = "model"
    _lora_loadable_modules = ["model"]

    def __init__(self, model: IPTV2RestorationModel, sigma_range: Optional[list] = None):  # noqa: UP045 - see IPTV2Pipeline
        super().__init__()
        self.register_modules(model=model)
        self.register_to_config(sigma_range=sigma_range)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        sigma: float | Sequence[float] | None = None,
        task: int | None = None,
        strength: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        overlap: int | None = None,
        memory: float = 1.0,
        self_ensemble: bool = False,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        clip: bool = True,
        max_pixels: int | None = None,
    ) -> RestorationPipelineOutput | tuple[Any, list[float] | None]:
        """Restore one image or a list.

        Args:
            image: a path, PIL image, array (H, W), (H, W, C) or (B, H, W, C), tensor (C, H, W) or (B, C, H, W), or a
                list of these. Files and PIL images are turned upright (EXIF orientation). Integers use the range of
                their type (8 or 16 bits). Floats are in [0, 1] and are not clipped, because noise exceeds this range.
                A colour model restores gray as three equal channels and returns gray. Alpha is kept unchanged.
            sigma: standard deviation of the noise on the 0–255 scale, one number or one per image. If it is None and
                the model takes a noise level, it is estimated.
            task: index of the task, for a model with several tasks.
            strength: weight of the restored image in the result: 0 returns the input, 1 the restored image.
            tile: side of the tiles in pixels; "auto" for the largest that fits into `memory`, or the whole image; None
                for the whole image. If memory runs out, the tiles are halved.
            overlap: pixels that neighbouring tiles share; None for an eighth of the tile, at least one window.
            memory: memory in gigabytes (10⁹ bytes) for the activations of a tile with tile="auto"; see
                `activation_bytes_per_pixel`. Weights and images (12 bytes per pixel and copy) need additional memory.
            self_ensemble: whether to average over the eight flips and rotations, which takes eight times as long.
            output_type: "pil" (8 bits), "np" or "pt".
            return_dict: whether to return a `RestorationPipelineOutput` instead of a tuple.
            clip: whether to clip the result to [0, 1]. False keeps other values for float inputs ("np" and "pt").
            max_pixels: largest height times width of a file; None for Pillow's own limit, about 179 million.

        Raises:
            ValueError: an image cannot be read, is empty or has wrong channels, or a number is out of range.
            NonFiniteImageError: a ValueError; the model returns NaN or infinity for an image.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np' or 'pt'")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must be in [0, 1]")
        pictures = list(read_pictures(image, Limits() if max_pixels is None else Limits(max_pixels)))
        if not pictures:
            raise ValueError("the list of images is empty; give at least one")
        sigmas = self.noise_levels(sigma, pictures)
        plans = [self.plan_tiles(p.pixels.shape, tile, overlap, memory) for p in pictures]
        turns = range(8) if self_ensemble else (0,)
        restored = []
        with self.progress_bar(total=len(turns) * sum(len(tops) * len(lefts) for _, tops, lefts in plans)) as bar:
            for index, (picture, level, plan) in enumerate(zip(pictures, sigmas, plans, strict=True)):
                result = self.restore(picture.pixels, level, task, plan, overlap, turns, bar)
                if not result.isfinite().all():
                    self.refuse_non_finite(result, index, len(pictures), plan)
                result = torch.lerp(picture.pixels, result, strength)
                restored.append(Picture(cut(result) if clip else result, picture.alpha))
        images = to_output(restored, output_type)
        blind = sigma is None and self.model.config.sigma_conditioning is None
        levels = None if blind else [level for level in sigmas if level is not None]
        return RestorationPipelineOutput(images=images, sigmas=levels) if return_dict else (images, levels)

    def refuse_non_finite(self, result: Tensor, index: int, count: int, plan: tuple[int, list[int], list[int]]) -> None:
        """Raise an error that names the image, the tile and the precision, instead of giving a black image."""
        _, tops, lefts = plan
        row, column = (~result.isfinite().all(dim=0)).nonzero()[0].tolist()
        tile = sum(top <= row for top in tops) * len(lefts) - len(lefts) + sum(left <= column for left in lefts)
        which = f"image {index + 1} of {count}, tile {tile} of {len(tops) * len(lefts)}"
        raise NonFiniteImageError(which, next(self.model.parameters()).dtype, [index])

    # ----------------------------------------------------------------------------------------------------------------
    # Noise level

    def noise_levels(self, sigma: float | Sequence[float] | None, pictures: list[Picture]) -> list[float | None]:
        """Return one σ per image, given or estimated; None for a model that takes none."""
        takes = self.model.config.sigma_conditioning is not None
        if sigma is None and not takes:
            return [None] * len(pictures)
        if not takes:
            raise ValueError("this model is blind: it was not trained with a noise level; leave sigma out")
        estimated = sigma is None
        sigma = [estimate_sigma(p.pixels) for p in pictures] if estimated else sigma
        given = np.ravel(np.asarray(sigma, dtype=float)).tolist()
        levels = given * len(pictures) if len(given) == 1 else given
        if len(levels) != len(pictures):
            raise ValueError(f"{len(levels)} noise levels for {len(pictures)} images; give one, or one per image")
        for level in levels:
            if not 0 <= level <= 255:
                raise ValueError(f"sigma is {level:g}; it must be in [0, 255], the standard deviation on that scale")
            low, high = self.config.sigma_range or (0, 255)
            if not low <= level <= high:
                what = "estimated sigma" if estimated else "sigma"
                warnings.warn(f"{what} is {level:.3g}; this model was trained with {low:g} to {high:g}", stacklevel=4)
        return levels

    # ----------------------------------------------------------------------------------------------------------------
    # Tiles

    def plan_tiles(
        self,
        shape: Sequence[int],
        tile: int | Literal["auto"] | None,
        overlap: int | None = None,
        memory: float = 1.0,
    ) -> tuple[int, list[int], list[int]]:
        """Return the side of the tiles and their tops and lefts, multiples of `granularity` that keep windows in place.

        Args:
            shape: shape of the image, (C, H, W).
            tile, overlap, memory: see `__call__`.
        """
        channels, height, width = shape
        step = self.model.granularity
        if math.isnan(memory):
            raise ValueError("memory is nan; give gigabytes, such as 1")
        if tile == "auto":
            tile = self.largest_tile(channels, height, width, memory)
        if tile is None:
            return max(height, width), [0], [0]
        if tile < 2 * step:
            raise ValueError(f"tile is {tile}; this model needs tiles of at least {2 * step} pixels")
        side = tile // step * step
        shared = overlap_of(side, step, overlap)
        if shared >= side:
            raise ValueError(f"overlap is {shared}, but the tile is {side}; the overlap must be smaller")
        return side, starts(height, side, shared, step), starts(width, side, shared, step)

    def largest_tile(self, channels: int, height: int, width: int, memory: float) -> int | None:
        """Return the side of the largest square tile that fits into `memory` GB; None if the whole image fits."""
        step = self.model.granularity
        # A gray model restores the channels of a colour image as a batch.
        copies = channels if self.model.config.in_channels == 1 else 1
        needed = copies * activation_bytes_per_pixel(self.model) / 1e9  # GB a pixel
        padded = -(-height // step) * step * -(-width // step) * step
        if padded * needed <= memory:
            return None
        side = math.isqrt(int(memory / needed)) // step * step if memory > 0 else 0
        if side < 2 * step:
            raise ValueError(
                f"memory is {memory:g} GB; the smallest tile of this model, {2 * step} pixels, needs "
                f"{needed * (2 * step) ** 2:.3g} GB"
            )
        return side

    def restore(
        self,
        pixels: Tensor,
        sigma: float | None,
        task: int | None,
        plan: tuple[int, list[int], list[int]],
        overlap: int | None,
        turns: Sequence[int],
        bar: Any,
    ) -> Tensor:
        """Restore (C, H, W) tile by tile and blend the tiles. If memory runs out, use smaller tiles."""
        while True:
            try:
                return self.restore_tiles(pixels, sigma, task, plan, turns, bar)
            except (MemoryError, RuntimeError) as error:
                smaller = plan[0] // 2 // self.model.granularity * self.model.granularity
                if not is_out_of_memory(error) or smaller < 2 * self.model.granularity:
                    raise
                warnings.warn(f"out of memory with tiles of {plan[0]} pixels; continuing with {smaller}", stacklevel=4)
                fits = overlap is None or overlap_of(smaller, self.model.granularity, overlap) < smaller
                plan = self.plan_tiles(pixels.shape, smaller, overlap if fits else None)

    def restore_tiles(
        self,
        pixels: Tensor,
        sigma: float | None,
        task: int | None,
        plan: tuple[int, list[int], list[int]],
        turns: Sequence[int],
        bar: Any,
    ) -> Tensor:
        """Restore all tiles of a plan."""
        side, tops, lefts = plan
        _, height, width = pixels.shape
        if len(tops) == len(lefts) == 1:
            return self.run_model(pixels, sigma, task, turns, bar)
        rows, columns = blending(tops, side, height), blending(lefts, side, width)
        total = torch.zeros_like(pixels)
        for top, row in zip(tops, rows, strict=True):
            for left, column in zip(lefts, columns, strict=True):
                part = pixels[:, top : top + side, left : left + side]
                result = self.run_model(part, sigma, task, turns, bar)
                total[:, top : top + side, left : left + side] += result * row[:, None] * column
        return total

    def run_model(
        self, pixels: Tensor, sigma: float | None, task: int | None, turns: Sequence[int], bar: Any
    ) -> Tensor:
        """Restore (C, H, W) to float32 on the CPU, as the mean over the given flips and rotations."""
        channels, total = self.model.config.in_channels, torch.zeros_like(pixels)
        model_dtype = next(self.model.parameters()).dtype
        for turn in turns:
            turned = torch.rot90(pixels, turn % 4, (-2, -1))
            turned = turned.flip(-1) if turn >= 4 else turned
            # A colour model gets a gray image as three equal channels. A gray model gets a colour image as three gray
            # images.
            batch = turned.reshape(-1, 1, *turned.shape[-2:]) if channels == 1 else turned[None].expand(-1, 3, -1, -1)
            batch = batch.to(self._execution_device, model_dtype)
            result = self.model(batch, sigma, task, return_dict=False)[0].float().cpu()
            result = result.flatten(0, 1) if channels == 1 else result[0]
            result = result.mean(0, keepdim=True) if len(pixels) == 1 and len(result) == 3 else result
            result = result.flip(-1) if turn >= 4 else result
            total += torch.rot90(result, -(turn % 4), (-2, -1))
            bar.update()
        return total / len(turns)


def cut(pixels: Tensor) -> Tensor:
    """Clip pixels to [0, 1], with a warning if this removes more than residual noise."""
    low, high = float(pixels.min()), float(pixels.max())
    if high > 1.25 or low < -0.25:
        warnings.warn(f"values from {low:.3g} to {high:.3g} are clipped to [0, 1]; clip=False keeps them", stacklevel=4)
    return pixels.clamp_(0, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on a CPU (where torch raises a plain RuntimeError)."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)
