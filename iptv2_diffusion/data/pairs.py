"""Images of a folder, and the pairs of degraded and clean images of public restoration data sets.

The layouts are those in which the data sets are distributed (for deraining, MPRNet's collection). docs/restoration.md
has the sources. Only the standard library is imported, so that the options can list the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from iptv2_diffusion.data.image_folders import image_files
from iptv2_diffusion.files import user_path

__all__ = ["LAYOUTS", "Pair", "find_images", "find_pairs"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Pair:
    """A degraded image and its clean counterpart."""

    degraded: Path
    clean: Path


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder and its sub-folders, sorted by path. Raises a ValueError if there are none."""
    folder = user_path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = list(image_files(folder, IMAGE_SUFFIXES))
    if not files:
        raise ValueError(f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def find_pairs(layout: str, root: str | Path, split: str = "train") -> list[Pair]:
    """Return the pairs of a data set, sorted by path.

    Args:
        layout: a key of `LAYOUTS`.
        root: folder of the data set, as unpacked.
        split: "train" or "test".

    Raises:
        ValueError: the folder has another layout, or an image has no counterpart. The message names it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    pairs = sorted(LAYOUTS[layout](root, split), key=lambda pair: pair.degraded)
    if not pairs:
        raise ValueError(f"{root} holds no {split} pairs in the layout {layout!r}")
    for pair in pairs:
        if not pair.clean.is_file():
            raise ValueError(f"{pair.degraded} has no partner: {pair.clean} does not exist")
    return pairs


def mirrored(degraded: Path, clean: Path, rename: Callable[[str], str] = lambda name: name) -> list[Pair]:
    """Return the pairs of files with the same name (after `rename`) in two folders. Suffixes may differ."""
    partners: dict[Path, Path] = {}
    for path in find_images(clean):
        other = partners.setdefault(path.relative_to(clean).with_suffix(""), path)
        if other != path:
            raise ValueError(f"{other} and {path} have the same name, so the pair is ambiguous; rename one")
    pairs = []
    for path in find_images(degraded):
        name = path.relative_to(degraded).with_suffix("")
        name = name.with_name(rename(name.name))
        pairs.append(Pair(path, partners.get(name, clean / name.with_suffix(path.suffix))))
    return pairs


def first_folder(root: Path, *names: str) -> Path:
    """Return the first folder that exists, or the first one, whose absence is reported later."""
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def folders(root: Path, split: str) -> list[Pair]:
    """Pairs of input/* and target/*, in root or in root/split."""
    root = first_folder(root, split, ".")
    return mirrored(root / "input", root / "target")


def sidd(root: Path, split: str) -> list[Pair]:
    """SIDD sRGB (Medium): Data/<scene>/NOISY_SRGB_010.PNG and GT_SRGB_010.PNG, the same for train and test."""
    found = [p for p in find_images(first_folder(root, "Data", ".")) if "NOISY_SRGB" in p.name.upper()]
    return [Pair(path, path.with_name(path.name.replace("NOISY", "GT"))) for path in found]


def gopro(root: Path, split: str) -> list[Pair]:
    """GoPro: <split>/<scene>/blur/*.png and <split>/<scene>/sharp/*.png."""
    return [
        Pair(path, path.parents[1] / "sharp" / path.name)
        for path in find_images(root / split)
        if path.parent.name == "blur"
    ]


def hide(root: Path, split: str) -> list[Pair]:
    """HIDE: <split>/**/*.png (close-ups, long-shot) and GT/*.png with the same names."""
    return [Pair(path, root / "GT" / path.name) for path in find_images(root / split)]


def realblur(kind: str) -> Callable[[Path, str], list[Pair]]:
    """RealBlur-J or -R: lines "sharp blurred …" of RealBlur_<kind>_<split>_list.txt, relative to root."""

    def find(root: Path, split: str) -> list[Pair]:
        listing = root / f"RealBlur_{kind}_{split}_list.txt"
        if not listing.is_file():
            raise ValueError(f"{listing} does not exist; it comes with RealBlur and names its pairs")
        try:
            lines = [line.split() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{listing} is not text; download it again") from error
        short = next((" ".join(line) for line in lines if len(line) < 2), None)
        if short is not None:
            raise ValueError(f"{listing}: a line is {short[:80]!r}; it must name a sharp and a blurred image")
        return [Pair(root / line[1], root / line[0]) for line in lines]

    return find


def dpdd(root: Path, split: str) -> list[Pair]:
    """DPDD, single image: <split>_c/source/*.png (blurred) and <split>_c/target/*.png, paired in sorted order.

    The names differ, because they are two exposures of a scene.
    """
    folder = root / f"{split}_c"
    source, target = find_images(folder / "source"), find_images(folder / "target")
    if len(source) != len(target):
        raise ValueError(f"{folder} holds {len(source)} blurred and {len(target)} sharp images; they must be pairs")
    return [Pair(blurred, sharp) for blurred, sharp in zip(source, target, strict=True)]


RAIN_TEST_SETS = ("Test100", "Rain100H", "Rain100L", "Test2800", "Test1200")


def rain(test_set: str | None) -> Callable[[Path, str], list[Pair]]:
    """MPRNet's collection: train/Rain13K/{input,target}/* and test/<set>/{input,target}/*."""

    def find(root: Path, split: str) -> list[Pair]:
        if split == "train":
            folder = first_folder(root, "train/Rain13K", "train")
            return mirrored(folder / "input", folder / "target")
        sets = RAIN_TEST_SETS if test_set is None else (test_set,)
        present = [root / "test" / name for name in sets if (root / "test" / name).is_dir()]
        if not present:
            raise ValueError(f"{root / 'test'} holds none of {', '.join(sets)}")
        return [pair for folder in present for pair in mirrored(folder / "input", folder / "target")]

    return find


LAYOUTS: dict[str, Callable[[Path, str], list[Pair]]] = {
    "folders": folders,
    "sidd": sidd,
    "gopro": gopro,
    "hide": hide,
    "realblur_j": realblur("J"),
    "realblur_r": realblur("R"),
    "dpdd": dpdd,
    "rain13k": rain(None),
    **{name.lower(): rain(name) for name in RAIN_TEST_SETS},
}
