"""Crops of scikit-image's photographs (DATA.md §2), for copies of data sets in their own layouts."""

from functools import cache

import numpy as np


@cache
def _photographs():
    from skimage import data

    return data.astronaut(), data.chelsea(), data.coffee()


def photograph(index, height=40, width=56):
    """A textured part of a photograph, another for each index: (height, width, 3) of uint8."""
    image = _photographs()[index % 3]
    top, left = 100 + 37 * (index // 3), 120 + 41 * (index // 3)
    return image[top : top + height, left : left + width]


def noisy(image, sigma=10.0, seed=0):
    """Return the image with noise of `sigma`, in the same dtype."""
    peak = np.iinfo(image.dtype).max
    noise = np.random.default_rng(seed).normal(0, sigma / 255 * peak, image.shape)
    return (image + noise).clip(0, peak).round().astype(image.dtype)
