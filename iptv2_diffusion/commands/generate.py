"""Draw images of chosen classes with a pipeline.

    iptv2-generate food_drink flags -n 8 --grid sheet.png
    iptv2-generate --list-classes

Every image is written to OUT/CLASS-SEED.png and depends only on its class and its seed. OUT is a new folder, or a
folder of an earlier run of this command.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iptv2_diffusion.files import shipped, user_path
from iptv2_diffusion.training.errors import UserError, loading, run_main, user_errors

if TYPE_CHECKING:
    from PIL import Image

    from iptv2_diffusion import IPTV2Pipeline

DEFAULT_PIPELINE = "assets/iptv2-emoji64"
BATCH = 16  # number of images that are drawn together


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "iptv2-generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "classes",
        nargs="*",
        metavar="CLASS",
        help="names or numbers of classes; without classes, images are drawn without a label",
    )
    add("-n", "--number", type=int, default=4, metavar="N", help="number of images of each class [4]")
    add("-o", "--output", type=user_path, default="generated", metavar="OUT", help="folder for the images [generated]")
    add("--grid", type=user_path, metavar="FILE", help="also write all images as one sheet, one row per class")
    add("--pipeline", default=DEFAULT_PIPELINE, help=f"folder or Hub name of an IPTV2Pipeline [{DEFAULT_PIPELINE}]")
    add("--lora", metavar="ADAPTER", help="file, folder or Hub name of a LoRA adapter for the pipeline")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the first image of each class; the next ones use the next seeds [0]",
    )
    add("--steps", type=int, default=30, help="number of denoising steps [30]")
    add("--guidance-scale", type=float, default=3.0, help="classifier-free guidance scale; 1: no guidance [3]")
    add("--height", type=int, help="height in pixels [the training size]")
    add("--width", type=int, help="width in pixels [the training size]")
    add("--device", default="auto", help="device to run on: cpu, cuda, mps, or auto for the GPU if there is one [auto]")
    add("--list-classes", action="store_true", help="print the classes of the pipeline and stop")
    add("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.number < 1:
        parser.error(f"-n is {arguments.number}; it must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Draw the images; returns the exit code."""
    arguments = parse(argv)
    pipeline = load(arguments)
    if arguments.list_classes:
        return list_classes(pipeline, as_json=arguments.json)
    with user_errors(ValueError):
        words = [int(word) if word.isdigit() else word for word in arguments.classes]
        labels: list[int | None] = [*pipeline.get_label_ids(words)] if words else [None]
    rows = [draw_class(pipeline, label, arguments) for label in labels]
    names = [name_of(pipeline, label) for label in labels]
    written = save(arguments, rows, names)
    if arguments.json:
        print(json.dumps(written, indent=2))
    else:
        grid = f", all of them in {arguments.grid}" if arguments.grid else ""
        print(f"{len(written)} pictures in {arguments.output}/{grid}")
    return 0


def load(arguments: argparse.Namespace) -> IPTV2Pipeline:
    """Load the pipeline on its device, with the adapter."""
    from iptv2_diffusion import IPTV2Pipeline  # late: it takes seconds
    from iptv2_diffusion.pipelines.devices import find_device

    path = shipped(arguments.pipeline)
    if arguments.pipeline == DEFAULT_PIPELINE and not path.exists():
        raise UserError(
            f"the default pipeline {DEFAULT_PIPELINE} is a part of the repository and not of the installed package; "
            "start in a clone of the repository, or give --pipeline FOLDER_OR_HUB_NAME"
        )
    with loading(arguments.pipeline):
        pipeline = IPTV2Pipeline.from_pretrained(path if path.exists() else arguments.pipeline)
    if arguments.lora is not None:
        with loading(arguments.lora):
            pipeline.load_lora_weights(str(user_path(arguments.lora)))
            pipeline.fuse_lora()
    with user_errors(RuntimeError, AssertionError):  # torch's error about the device
        pipeline.to(find_device(arguments.device))
    return pipeline


def list_classes(pipeline: IPTV2Pipeline, *, as_json: bool) -> int:
    """Print the classes by number; returns the exit code."""
    names = {number: pipeline.id2label.get(number, "") for number in range(pipeline.num_classes or 0)}
    if as_json:
        print(json.dumps(names, indent=2))
    elif not names:
        print("the pipeline has no classes: it draws without a label")
    else:
        print("\n".join(f"{number:>5}  {name}".rstrip() for number, name in names.items()))
    return 0


def draw_class(pipeline: IPTV2Pipeline, label: int | None, arguments: argparse.Namespace) -> list[Image.Image]:
    """Draw the images of one class."""
    import torch
    from tqdm import tqdm

    pictures: list[Image.Image] = []
    seeds = range(arguments.seed, arguments.seed + arguments.number)
    batches = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
    pipeline.set_progress_bar_config(disable=True)
    description = name_of(pipeline, label)
    with tqdm(total=len(batches) * arguments.steps, desc=description, leave=False, file=sys.stderr) as bar:

        def count_step(*_: Any) -> dict[str, Any]:
            bar.update()
            return {}

        for batch in batches:
            with user_errors(ValueError, RuntimeError):
                pictures += pipeline(
                    label,
                    num_images_per_label=len(batch),
                    num_inference_steps=arguments.steps,
                    guidance_scale=arguments.guidance_scale,
                    height=arguments.height,
                    width=arguments.width,
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    callback_on_step_end=count_step,
                ).images
    return pictures


def name_of(pipeline: IPTV2Pipeline, label: int | None) -> str:
    """Return the name of a class for rows and files."""
    return "unlabelled" if label is None else pipeline.id2label.get(label, f"class-{label}")


def save(arguments: argparse.Namespace, rows: list[list[Image.Image]], names: list[str]) -> list[dict[str, Any]]:
    """Write the images and the sheet; returns file, class and seed of each image."""
    from iptv2_diffusion.data.own_folder import OwnFolder
    from iptv2_diffusion.evaluation.pictures import picture_sheet

    written: list[dict[str, Any]] = []
    with user_errors(OSError, ValueError):
        folder = OwnFolder.claim(arguments.output, "generated pictures")
        for row, name in zip(rows, names, strict=True):
            stem = re.sub(r"[^\w.-]+", "-", name)[:80]
            for seed, picture in enumerate(row, start=arguments.seed):
                with folder.writing(f"{stem}-{seed}.png") as temporary:
                    picture.save(temporary, format="png")
                path = Path(arguments.output) / f"{stem}-{seed}.png"
                written.append({"file": str(path), "class": name, "seed": seed})
        if arguments.grid is not None:
            arguments.grid.parent.mkdir(parents=True, exist_ok=True)
            picture_sheet(rows, names).save(arguments.grid)
    return written


def run() -> None:
    """The console script."""
    run_main(main)


if __name__ == "__main__":
    run()
