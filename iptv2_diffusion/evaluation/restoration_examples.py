"""Images to measure restorers on: photographs degraded here, test sets by name, pairs of data sets.

The degradation of photograph i uses the seed 1000 · level + i:
  noise        level: σ on the 0–255 scale; `default_rng(seed).normal(0, σ)` in float64, neither clipped nor rounded
  motion_blur  level: length of the path in pixels; `MotionBlur(level, level)`, rounded to 8 bits
  rain         level: fraction of pixels where a streak starts; `RainStreaks(level, level)`, rounded to 8 bits
  jpeg         level: quality of Pillow's JPEG writer; no randomness
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from iptv2_diffusion.data.degradations import MotionBlur, RainStreaks, through_jpeg
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits
from iptv2_diffusion.data.pairs import find_images, find_pairs
from iptv2_diffusion.data.patches import read_image
from iptv2_diffusion.data.real_noise import sidd_validation_blocks
from iptv2_diffusion.evaluation.test_sets import TEST_SETS, find_test_set, pairs_of
from iptv2_diffusion.files import user_path
from iptv2_diffusion.training.errors import UserError
from iptv2_diffusion.training.options import Range

SIDD_VALIDATION = "sidd_validation"


@dataclass(frozen=True)
class Example:
    """A pair of images to measure on.

    Attributes:
        kind: degradation, or layout of the data set.
        level: level of the degradation; None for a data set.
        name: name of the image.
        degraded: (H, W, C) in 0–255.
        clean: (H, W, C) in 0–255.
    """

    kind: str
    level: float | None
    name: str
    degraded: np.ndarray
    clean: np.ndarray


# --------------------------------------------------------------------------------------------------------------------
# Photographs and data sets


def test_photographs() -> dict[str, np.ndarray]:
    """Load the six photographs of the protocol from the packages scikit-image and scikit-learn."""
    for package in ("skimage", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install -e '.[benchmark]', or set --images to a folder")
    from skimage import data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "china": load_sample_image("china.jpg"),
        "motorcycle": data.stereo_motorcycle()[0],
    }


def folder_photographs(folder: str, limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
    """Load all images of a folder and its sub-folders, by relative path without suffix, in 0–255."""
    root = user_path(folder)
    files = by_name(find_images(root), lambda path: path.relative_to(root).with_suffix("").as_posix())
    return {name: read_255(path, limits) for name, path in files.items()}


def read_255(path: Path, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Read an image (H, W, 3) in 0–255: uint8, or float64 if the file has 16 bits or floats."""
    image = read_image(path, limits=limits)
    return image if image.dtype == np.uint8 else image / 257 if image.dtype == np.uint16 else image * 255.0


def data_set(layout: str, data: str, first: int | None, limits: Limits = DEFAULT_LIMITS) -> Iterator[Example]:
    """Iterate over the test pairs of a data set, or over its first `first` pairs."""
    root = user_path(data)
    if layout == SIDD_VALIDATION:
        for name, degraded, clean in itertools.islice(sidd_validation_blocks(root), first):
            yield Example(layout, None, name, degraded, clean)
        return
    pairs = {pair.degraded: pair.clean for pair in find_pairs(layout, root, "test")[:first]}
    yield from pair_examples(pairs, root, layout, limits)


def pair_examples(pairs: dict[Path, Path], root: Path, kind: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[Example]:
    """Iterate over pairs of files below `root`, degraded -> clean."""
    named = by_name(pairs, lambda path: path.relative_to(root).with_suffix("").as_posix())
    for name, path in named.items():
        degraded, clean = read_255(path, limits), read_255(pairs[path], limits)
        if degraded.shape != clean.shape:
            sizes = [f"{image.shape[0]}x{image.shape[1]}" for image in (degraded, clean)]
            raise UserError(f"{path} is {sizes[0]} pixels but {pairs[path]} is {sizes[1]}; a pair must have one size")
        yield Example(kind, None, name, degraded, clean)


def named_set(name: str, root: Path, first: int | None, limits: Limits = DEFAULT_LIMITS) -> Iterator[Example]:
    """Iterate over a test set of `TEST_SETS`, degraded as in its papers, or over its first `first` images."""
    known, folder = TEST_SETS[name], find_test_set(name, root)
    if known.degradation == "pairs":
        pairs = dict(itertools.islice(pairs_of(folder).items(), first))
        yield from pair_examples(pairs, folder, name, limits)
    else:
        photographs = dict(list(folder_photographs(str(folder), limits).items())[:first])
        yield from degraded_photographs(photographs, known.degradation, known.levels, known.gray)


def by_name(paths: Iterable[Path], name: Callable[[Path], str]) -> dict[str, Path]:
    """Map names to paths. Raises a `UserError` for two paths of the same name."""
    named: dict[str, Path] = {}
    for path in paths:
        if name(path) in named:
            raise UserError(f"{named[name(path)]} and {path} would both be {name(path)!r} in the results; rename one")
        named[name(path)] = path
    return named


# --------------------------------------------------------------------------------------------------------------------
# Degradations

LEVELS = {
    "noise": (15, 25, 50),
    "motion_blur": (5, 10, 15),
    "rain": (0.003, 0.006, 0.012),
    "jpeg": (10, 20, 30, 40),
}
RANGES = {
    "noise": Range(above=0, at_most=255),
    "motion_blur": Range(above=1, at_most=100),
    "rain": Range(above=0, at_most=1),
    "jpeg": Range(at_least=1, at_most=100),
}
SYNTHETIC = {"motion_blur": MotionBlur, "rain": RainStreaks}


def degraded_photographs(
    photographs: dict[str, np.ndarray], kind: str, levels: Sequence[float], gray: bool
) -> Iterator[Example]:
    """Iterate over all photographs at every level."""
    for level in levels:
        for index, (name, photograph) in enumerate(photographs.items()):
            if gray:
                photograph = np.asarray(Image.fromarray(photograph.round().astype(np.uint8)).convert("L"))[..., None]
            yield Example(kind, level, name, *degrade(photograph, kind, level, index))


def degrade(clean: np.ndarray, kind: str, level: float, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Degrade a photograph; returns the degraded and the clean image, (H, W, C) float64 in 0–255.

    The module's docstring defines the degradations. The clean image excludes the border that the kernel reaches.
    """
    clean, seed = clean.astype(np.float64), round(1000 * level) + index
    if kind == "jpeg":
        return through_jpeg(clean.round().astype(np.uint8), round(level)).astype(np.float64), clean.round()
    if kind == "noise":
        return clean + np.random.default_rng(seed).normal(0, level, clean.shape), clean
    degradation = SYNTHETIC[kind](level, level)
    if min(clean.shape[:2]) <= 4 * degradation.margin:
        raise ValueError(f"{kind} of {level:g} needs images of more than {4 * degradation.margin} pixels per side")
    image = torch.from_numpy(clean / 255).float().permute(2, 0, 1)[None]
    degraded, _ = degradation(image, torch.Generator().manual_seed(seed))
    inner = slice(degradation.margin, -degradation.margin)
    return (degraded[0].permute(1, 2, 0).double() * 255).round().numpy(), clean[inner, inner]
