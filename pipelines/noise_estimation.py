"""Estimate the noise level of an image."""

import torch
from torch import Tensor

__all__ = ["estimate_sigma"]


def estimate_sigma(pixels: Tensor) -> float:
    """Estimate the standard deviation, on the 0–255 scale, of white noise in an image (C, H, W) in [0, 1].

    The median absolute deviation of diagonal Haar coefficients (Donoho & Johnstone 1994) mistakes fine texture for
    noise. The function therefore computes it in squares of 32 pixels and takes the lower quartile, divided by its value
    for pure noise [ours]. Squares with more than a tenth of black or white pixels are ignored, because noise is clipped
    there. The result is the mean over the channels.
    """
    height, width = pixels.shape[-2] // 2 * 2, pixels.shape[-1] // 2 * 2
    if not height or not width:
        return 0.0
    top, bottom = pixels[:, 0:height:2, :width], pixels[:, 1:height:2, :width]
    diagonal = ((top - bottom)[..., 0::2] - (top - bottom)[..., 1::2]) / 2  # (C, H/2, W/2)
    deviations = []
    for plane, coefficients in zip(pixels, diagonal, strict=True):
        deviations.append(coefficients.abs().median() / 0.6745)
        if min(coefficients.shape) < 16:
            continue
        squares = in_squares(coefficients.abs(), 16)
        extreme = in_squares(((plane == plane.min()) | (plane == plane.max())).float(), 32).mean(dim=1)
        squares = squares[extreme <= 0.1]
        if len(squares) >= 16:  # enough squares
            # 0.0729 is the relative standard deviation of the median of 256 magnitudes; the quartile is 0.6745 of it
            # below.
            lower = squares.median(dim=1).values.quantile(0.25)
            deviations[-1] = lower / 0.6745 / (1 - 0.6745 * 0.0729)
    return float(torch.stack(deviations).mean() * 255)


def in_squares(plane: Tensor, side: int) -> Tensor:
    """Cut (H, W) into whole squares (squares, side²), without the remainder at the right and the bottom."""
    return plane.unfold(0, side, side).unfold(1, side, side).flatten(2).flatten(0, 1)
