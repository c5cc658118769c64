"""Tiles that cover one axis of an image, and weights that blend them without a seam."""

import torch
from torch import Tensor

__all__ = ["blending", "overlap_of", "starts"]


def overlap_of(side: int, step: int, overlap: int | None) -> int:
    """Return the overlap in pixels, a multiple of `step`: the given one rounded up, or an eighth of the tile."""
    if overlap is not None and overlap < 1:
        raise ValueError(f"overlap is {overlap}; tiles must share at least 1 pixel")
    wanted = side // 8 if overlap is None else overlap
    return max(step, -(-wanted // step) * step)


def starts(length: int, side: int, overlap: int, step: int) -> list[int]:
    """Return the first pixels of tiles that cover `length`, multiples of `step`. The last tile can be shorter."""
    result = [0]
    while result[-1] + side < length:
        last = -(-max(0, length - side) // step) * step  # at most the start of the last tile
        result.append(min(result[-1] + side - overlap, last))
    return result


def blending(begins: list[int], side: int, length: int) -> list[Tensor]:
    """Return the weights of each tile along one axis, which sum to 1 at each pixel.

    In an overlap, the outer quarter of each tile is not used, because it lacks context. A smooth ramp is in between.
    """
    ends = [min(begin + side, length) for begin in begins]
    weights = [torch.ones(end - begin) for begin, end in zip(begins, ends, strict=True)]
    for index in range(1, len(begins)):
        shared = ends[index - 1] - begins[index]
        ramp = (2 * (torch.arange(shared) + 0.5) / shared - 0.5).clamp(0, 1)
        ramp = ramp * ramp * (3 - 2 * ramp)  # smooth at both ends
        weights[index - 1][-shared:] *= 1 - ramp
        weights[index][:shared] *= ramp
    total = torch.zeros(length)  # not 1 where the last tile overlaps two others
    for begin, end, weight in zip(begins, ends, weights, strict=True):
        total[begin:end] += weight
    return [weight / total[begin:end] for begin, end, weight in zip(begins, ends, weights, strict=True)]
