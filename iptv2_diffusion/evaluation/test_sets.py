"""The field's test sets by name: their folders, their papers' protocols, and published results.

The sets are expected below one folder, in the layout of their authors. Published results come from the named papers, or
from papers that compare them; they were not measured here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from iptv2_diffusion.data.pairs import find_images

__all__ = ["TEST_SETS", "TestSet", "find_test_set", "pairs_of"]

Figures = Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class TestSet:
    """A test set and the protocol of its papers.

    Attributes:
        folders: possible names of its folder, regardless of case.
        degradation: how its clean images are degraded, or "pairs" if it includes degraded images.
        levels: levels of the degradation.
        gray: whether papers degrade and compare gray images.
        channels: "rgb" or "y".
        round: whether papers compare 8-bit images.
        published: method -> PSNR in dB, one per level (one for pairs); None: not published.
    """

    __test__ = False  # not a pytest test

    folders: tuple[str, ...]
    degradation: str
    levels: tuple[float, ...] = ()
    gray: bool = False
    channels: str = "rgb"
    round: bool = False
    published: Figures = field(default_factory=dict)


NOISE = (15, 25, 50)
JPEG = (10, 20, 30, 40)
_DNCNN_GRAY = {"DnCNN": (32.86, 30.43, 27.18)}
TEST_SETS: dict[str, TestSet] = {
    "CBSD68": TestSet(
        ("cbsd68",),
        "noise",
        NOISE,
        published={
            "DnCNN": (33.90, 31.24, 27.95),
            "FFDNet": (33.87, 31.21, 27.96),
            "DRUNet": (34.30, 31.69, 28.51),
            "SwinIR": (34.42, 31.78, 28.56),
            "Restormer": (34.40, 31.79, 28.60),
        },
    ),
    "Kodak24": TestSet(("kodak24",), "noise", NOISE, published={"FFDNet": (34.63, 32.13, 28.98)}),
    "McMaster": TestSet(("mcmaster",), "noise", NOISE, published={"FFDNet": (34.66, 32.35, 29.18)}),
    "Urban100": TestSet(("urban100",), "noise", NOISE),
    "Set12": TestSet(("set12",), "noise", NOISE, gray=True, published=_DNCNN_GRAY),
    "BSD68": TestSet(("bsd68",), "noise", NOISE, gray=True, published={"DnCNN": (31.73, 29.23, 26.23)}),
    "LIVE1": TestSet(("live1",), "jpeg", JPEG, gray=True, published={"DnCNN-3": (29.19, 31.59, 32.98, 33.96)}),
    "classic5": TestSet(("classic5",), "jpeg", JPEG, gray=True),
    "Rain12": TestSet(("rain12",), "pairs", channels="y", round=True, published={"PReNet": (36.66,)}),
    "Rain100L": TestSet(
        ("rain100l", "rain100l-first10"),
        "pairs",
        channels="y",
        round=True,
        published={"PReNet": (37.48,), "Restormer": (38.99,)},
    ),
    "Rain100H": TestSet(
        ("rain100h",), "pairs", channels="y", round=True, published={"PReNet": (29.46,), "Restormer": (31.46,)}
    ),
    "CC": TestSet(("cc", "real_ccnoise_denoised_part", "cc15", "cc60"), "pairs", round=True),
    "PolyU": TestSet(("polyu", "croppedimages"), "pairs", round=True),
}

# Degraded image -> clean image, as the sets name them: (pattern of the path, replacement). The first that exists.
PARTNERS = (
    (r"input/([^/]*)$", r"target/\1"),
    (r"input/([^/]*)$", r"groundtruth/\1"),
    (r"rainy/([^/]*)$", r"ground truth/\1"),
    (r"(^|/)rain-([^/]*)$", r"\1norain-\2"),
    (r"_in(\.[^./]*)$", r"_GT\1"),
    (r"_real(\.[^./]*)$", r"_mean\1"),
)


def find_test_set(name: str, root: Path) -> Path:
    """Find the folder of a test set at most three levels below `root`, or `root` itself.

    Raises:
        FileNotFoundError: there is none. The message names the folder names that were looked for.
    """
    names = TEST_SETS[name].folders
    level = [root]
    for _ in range(4):
        for folder in level:
            if folder.name.lower() in names and folder.is_dir():
                return folder
        level = [child for folder in level if folder.is_dir() for child in sorted(folder.iterdir()) if child.is_dir()]
    raise FileNotFoundError(
        f"no folder called {' or '.join(names)} in {root}; unpack {name} there, or set --root to its parent"
    )


def pairs_of(folder: Path) -> dict[Path, Path]:
    """Map each degraded image of a folder to its clean partner by the naming schemes in `PARTNERS`.

    Raises:
        ValueError: no image has a partner. The message lists the schemes.
    """
    images = find_images(folder)
    known = {path.relative_to(folder).as_posix(): path for path in images}
    pairs = {}
    for relative, path in known.items():
        partners = (re.sub(pattern, partner, relative) for pattern, partner in PARTNERS if re.search(pattern, relative))
        clean = next((known[partner] for partner in partners if partner in known), None)
        if clean is not None and clean != path:
            pairs[path] = clean
    if not pairs:
        raise ValueError(
            f"{folder} has {len(images)} images, none with a partner; expected input/ and target/, rainy/ and "
            "'ground truth/', rain-*.png and norain-*.png, *_in.png and *_GT.png, or *_real and *_mean"
        )
    return pairs
