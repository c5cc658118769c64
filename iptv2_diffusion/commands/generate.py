"""Draw images of chosen classes with a pipeline, from noise or from an image.

    iptv2-generate food_drink flags -n 8 --grid sheet.png
    iptv2-generate flags --image cat.png --strength 0.6
    iptv2-generate smileys_emotion --image face.png --mask mask.png
    iptv2-generate --list-classes

Every image is written to OUT/CLASS-SEED.png and depends only on its class and its seed. OUT is a new folder, or a
folder of an earlier run of this command.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iptv2_diffusion.completion import complete
from iptv2_diffusion.files import atomic, printable, shipped, user_path
from iptv2_diffusion.training.errors import UserError, loading, run_main, user_errors

if TYPE_CHECKING:
    from PIL import Image

    from iptv2_diffusion import IPTV2Pipeline

DEFAULT_PIPELINE = "assets/iptv2-emoji64"
BATCH = 16  # number of images that are drawn together


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
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
    add("--grid", type=user_path, metavar="FILE", help="also write all images as one grid, with a row per class")
    add("--pipeline", default=DEFAULT_PIPELINE, help=f"folder or Hub name of an IPTV2Pipeline [{DEFAULT_PIPELINE}]")
    add("--lora", metavar="ADAPTER", help="file, folder or Hub name of a LoRA adapter for the pipeline")
    add("--image", type=user_path, metavar="FILE", help="image to change instead of noise; it is resized to the output")
    add(
        "--strength",
        type=float,
        help="how much --image changes, from 0 (not at all) to 1 (completely) [0.8; with --mask 1]",
    )
    add(
        "--mask",
        type=user_path,
        metavar="FILE",
        help="image that is white where --image is repainted; all other pixels are kept",
    )
    add(
        "--guidance-model",
        metavar="NAME",
        help="folder or Hub name of a weaker denoiser that replaces the null label in the guidance (AutoGuidance)",
    )
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
    complete(parser)
    arguments = parser.parse_args(argv)
    if arguments.number < 1:
        parser.error(f"-n is {arguments.number}; it must be at least 1")
    if not 0 <= arguments.seed <= 2**63 - arguments.number:
        parser.error(f"--seed is {arguments.seed}; it must be in [0, 2**63 - {arguments.number}]")
    for name in ("mask", "strength"):
        if getattr(arguments, name) is not None and arguments.image is None:
            parser.error(f"--{name} needs the image to change: give --image FILE")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Draw the images; returns the exit code."""
    arguments = parse(argv)
    pipeline = load(arguments)
    if arguments.list_classes:
        return list_classes(pipeline, as_json=arguments.json)
    with user_errors(ValueError):
        words = [int(word) if word.isdecimal() else word for word in arguments.classes]
        labels: list[int | None] = [*dict.fromkeys(pipeline.get_label_ids(words))] if words else [None]
    pipeline, given = from_image(pipeline, arguments)
    written = draw(pipeline, labels, arguments, given)
    if arguments.json:
        print(json.dumps(written, indent=2))
    else:
        grid = f", all of them in {arguments.grid}" if arguments.grid else ""
        print(f"{len(written)} images in {arguments.output}/{grid}")
    return 0


def load(arguments: argparse.Namespace) -> IPTV2Pipeline:
    """Load the pipeline on its device, with the adapter."""
    from iptv2_diffusion import IPTV2Pipeline  # late: it takes seconds
    from iptv2_diffusion.pipelines.devices import find_device

    path = shipped(arguments.pipeline)
    if arguments.pipeline == DEFAULT_PIPELINE and not path.exists():
        raise UserError(
            f"the default pipeline {DEFAULT_PIPELINE} is part of the repository, but not of the installed package; run "
            "the command in a clone of the repository, or give --pipeline FOLDER_OR_HUB_NAME"
        )
    with loading(arguments.pipeline):
        pipeline = IPTV2Pipeline.from_pretrained(path if path.exists() else arguments.pipeline)
    if arguments.lora is not None:
        with loading(arguments.lora):
            pipeline.load_lora_weights(str(user_path(arguments.lora)))
            pipeline.fuse_lora()
    if arguments.guidance_model is not None:
        with loading(arguments.guidance_model):
            pipeline.load_guidance_model(arguments.guidance_model)
    with user_errors(RuntimeError, AssertionError):  # torch's error about the device
        pipeline.to(find_device(arguments.device))
    return pipeline


def from_image(pipeline: IPTV2Pipeline, arguments: argparse.Namespace) -> tuple[IPTV2Pipeline, dict[str, Any]]:
    """Return the pipeline for `--image` and `--mask`, and its arguments for them; the same pipeline without them."""
    if arguments.image is None:
        return pipeline, {}
    from iptv2_diffusion import IPTV2Img2ImgPipeline, IPTV2InpaintPipeline

    given: dict[str, Any] = {"image": read_picture(arguments.image)}
    if arguments.mask is not None:
        given["mask_image"] = read_picture(arguments.mask)
    if arguments.strength is not None:
        given["strength"] = arguments.strength
    height, width = pipeline.codec.image_size(*pipeline.sample_size)
    given |= {"height": arguments.height or height, "width": arguments.width or width}
    return (IPTV2Img2ImgPipeline if arguments.mask is None else IPTV2InpaintPipeline).from_pipe(pipeline), given


def read_picture(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB."""
    from iptv2_diffusion.data.image_files import ImageFileError, as_rgb, read_image_file

    try:
        with user_errors(OSError):
            return as_rgb(read_image_file(path).pixels)
    except ImageFileError as error:
        raise UserError(f"{printable(path)}: {error}") from error


def list_classes(pipeline: IPTV2Pipeline, *, as_json: bool) -> int:
    """Print the classes by number; returns the exit code."""
    names = {number: pipeline.id2label.get(number, "") for number in range(pipeline.num_classes or 0)}
    if as_json:
        print(json.dumps(names, indent=2))
    elif not names:
        print("the pipeline has no classes: it draws without a label")
    else:
        print("\n".join(f"{number:>5}  {printable(name)}".rstrip() for number, name in names.items()))
    return 0


def draw(
    pipeline: IPTV2Pipeline, labels: list[int | None], arguments: argparse.Namespace, given: dict[str, Any]
) -> list[dict[str, Any]]:
    """Draw the images and write each batch as soon as it is ready; return file, class and seed of each image.

    `given` are further arguments of the pipeline.
    """
    from tqdm import tqdm

    from iptv2_diffusion.data.own_folder import OwnFolder
    from iptv2_diffusion.evaluation.pictures import picture_sheet

    names = {label: name_of(pipeline, label) for label in labels}
    stems = file_stems(names)
    rows: dict[int | None, list[Image.Image]] = {label: [] for label in labels}
    written: list[dict[str, Any]] = []
    seeds = range(arguments.seed, arguments.seed + arguments.number)
    batches = [(label, seeds[start : start + BATCH]) for label in labels for start in range(0, len(seeds), BATCH)]
    pipeline.set_progress_bar_config(disable=True)
    with user_errors(OSError, ValueError):  # before the drawing, which takes minutes
        folder = OwnFolder.claim(arguments.output, "generated pictures")
        if arguments.grid is not None:
            check_grid(arguments.grid)
    with tqdm(total=len(batches) * max(arguments.steps, 1), leave=False, file=sys.stderr) as bar:
        for label, batch in batches:
            bar.set_description(printable(names[label]))
            pictures = draw_batch(pipeline, label, batch, arguments, given, bar)
            with user_errors(OSError, ValueError):
                for seed, picture in zip(batch, pictures, strict=True):
                    name = f"{stems[label]}-{seed}.png"
                    with folder.writing(name) as temporary:
                        picture.save(temporary, format="png")
                    file = str(Path(arguments.output) / name)
                    written.append({"file": file, "class": names[label], "seed": seed})
            if arguments.grid is not None:
                rows[label] += pictures
    if arguments.grid is not None:
        with user_errors(OSError, ValueError), atomic(arguments.grid) as temporary:
            picture_sheet(list(rows.values()), list(names.values())).save(temporary)
    return written


def check_grid(grid: Path) -> None:
    """Raise an error if the grid cannot be written under this name. Its folder is created."""
    from PIL import Image

    Image.init()
    if Image.registered_extensions().get(grid.suffix.lower()) not in Image.SAVE or grid.is_dir():
        raise ValueError(f"--grid is {printable(grid)}; give the name of an image file, such as sheet.png")
    grid.parent.mkdir(parents=True, exist_ok=True)


def file_stems(names: dict[int | None, str]) -> dict[int | None, str]:
    """Return the beginning of each class's file names: its name, with its number if two names look the same."""
    shown = {
        label: re.sub(r"[^\w.-]+", "-", name).encode()[:80].decode(errors="ignore") for label, name in names.items()
    }
    alike = collections.Counter(stem.casefold() for stem in shown.values())
    return {label: stem if alike[stem.casefold()] == 1 else f"{stem}-class-{label}" for label, stem in shown.items()}


def draw_batch(
    pipeline: IPTV2Pipeline,
    label: int | None,
    seeds: range,
    arguments: argparse.Namespace,
    given: dict[str, Any],
    bar: Any,
) -> list[Image.Image]:
    """Draw the images of a class and of these seeds."""
    import torch

    def count_step(*_: Any) -> dict[str, Any]:
        bar.update()
        return {}

    with user_errors(ValueError, RuntimeError):
        return pipeline(
            label,
            num_images_per_label=len(seeds),
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            **{"height": arguments.height, "width": arguments.width, **given},
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=count_step,
            return_dict=False,
        )[0]


def name_of(pipeline: IPTV2Pipeline, label: int | None) -> str:
    """Return the name of a class for rows and files."""
    return "unlabelled" if label is None else pipeline.id2label.get(label, f"class-{label}")


def run() -> None:
    """The console script."""
    run_main(main)


if __name__ == "__main__":
    run()
