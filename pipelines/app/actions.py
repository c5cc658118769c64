"""Actions of the page, independent of Gradio: generate, restore, compare."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from iptv2_diffusion.data.image_files import ImageFile, Limits
from iptv2_diffusion.models.presets import count_macs, count_parameters

from ..image_io import from_array, to_pil
from ..noise_estimation import estimate_sigma
from ..restore_cli import read, write
from .jobs import Report

__all__ = ["AS_SAVED", "GenerateSettings", "RestoreSettings", "compare", "generate", "noise_level", "restore"]

AS_SAVED = "as saved"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Name on the page -> scheduler, and config entries that it needs in addition to the saved ones
NOISE_SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
FLOW_SCHEDULERS = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", FLOW),
    "UniPC": ("UniPCMultistepScheduler", FLOW),
}
MAX_IMAGES = 64
PREVIEWS = 4  # number of images that are decoded between steps
PREVIEW_SECONDS = 0.5  # time between two previews
MEMORY = 0.5  # GB for the activations of a tile, as in iptv2-restore


@dataclass(frozen=True)
class GenerateSettings:
    """Settings that determine the images. Each file contains them.

    Attributes:
        labels: class names or ids; empty for the null label or an unconditional model.
        number: number of images of each label.
        seed: seed of the first image. The next image has the next seed.
        steps: number of denoising steps.
        guidance_scale, guidance_interval: as in `IPTV2Pipeline`.
        scheduler: one of `scheduler_names`.
    """

    labels: tuple[str | int, ...] = ()
    number: int = 4
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scheduler: str = AS_SAVED


@dataclass(frozen=True)
class RestoreSettings:
    """Settings of a restoration.

    Attributes:
        sigma: noise level on the 0-255 scale; None to estimate it. Blind models ignore it.
        task: number of the task, for a model that has several.
        strength: weight of the restored image: 0: the input, 1: fully restored.
        bits: bits per channel of the file, 8 or 16.
    """

    sigma: float | None = None
    task: int | None = None
    strength: float = 1.0
    bits: int = 8


def scheduler_names(pipeline: Any) -> list[str]:
    """Return the names of the schedulers that fit a pipeline's model."""
    return [AS_SAVED, *(FLOW_SCHEDULERS if pipeline.config.flow_matching else NOISE_SCHEDULERS)]


@contextmanager
def scheduled(pipeline: Any, name: str) -> Iterator[None]:
    """Context manager that sets another scheduler in the pipeline."""
    saved = pipeline.scheduler
    if name != AS_SAVED:
        known = FLOW_SCHEDULERS if pipeline.config.flow_matching else NOISE_SCHEDULERS
        if name not in known:
            raise ValueError(f"the scheduler {name} does not fit this model; choose {', '.join((AS_SAVED, *known))}")
        kind, options = known[name]
        pipeline.scheduler = getattr(diffusers, kind).from_config(saved.config, **options)
    try:
        yield
    finally:
        pipeline.scheduler = saved


def generate(pipeline: Any, settings: GenerateSettings, report: Report) -> list[Image.Image]:
    """Generate images, each from its own seed. Reports (step, steps, previews or None) after every step."""
    labels = list(settings.labels) or None
    count = settings.number * len(labels or [None])
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"{count} images were requested; choose 1 to {MAX_IMAGES}")
    if not 0 <= settings.seed <= 2**63 - MAX_IMAGES:
        raise ValueError(f"seed is {settings.seed}; it must be in [0, 2**63 - {MAX_IMAGES}]")
    last = 0.0

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        nonlocal last
        previews = None
        if time.monotonic() - last > PREVIEW_SECONDS:
            decoded = pipe.codec.decode(tensors["latents"][:PREVIEWS]).nan_to_num(0.0)
            previews, last = pipe.image_processor.postprocess(decoded, "pil"), time.monotonic()
        report((step + 1, pipe.num_timesteps, previews))
        return {}

    with scheduled(pipeline, settings.scheduler):
        return pipeline(
            labels,
            num_images_per_label=settings.number,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            generator=[torch.Generator().manual_seed(settings.seed + index) for index in range(count)],
            callback_on_step_end=after_step,
        ).images


def save_images(images: Sequence[Image.Image], model: str, settings: GenerateSettings, folder: str) -> list[str]:
    """Write PNG files whose text chunk "parameters" has the settings as JSON; return their paths."""
    target = Path(tempfile.mkdtemp(dir=folder))
    paths = []
    for index, image in enumerate(images):
        labels = [settings.labels[index // settings.number]] if settings.labels else []
        own = {"labels": labels, "number": 1, "seed": settings.seed + index}
        text = PngInfo()
        text.add_text(
            "parameters", json.dumps({"model": model, **asdict(settings), **own, "seed": settings.seed + index})
        )
        path = target / f"{index + 1:02d}-seed{settings.seed + index}.png"
        image.save(path, pnginfo=text)
        paths.append(str(path))
    return paths


class TileProgress:
    """Progress bar of a restorer that reports (tiles done, tiles)."""

    def __init__(self, report: Report, total: int):
        self.report, self.total, self.done = report, total, 0

    def __enter__(self) -> TileProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        self.done += 1
        self.report((self.done, self.total))


def noise_level(path: str, max_pixels: int) -> tuple[ImageFile, float]:
    """Return a photograph and its estimated noise level on the 0-255 scale."""
    picture = read_upload(path, max_pixels)
    return picture, estimate_sigma(next(from_array(picture.pixels)).pixels)


def read_upload(path: str | None, max_pixels: int) -> ImageFile:
    """Read an uploaded photograph. Error messages name the file, but not its folder on the server."""
    if not path:
        raise ValueError("there is no photograph; drop one into the field")
    try:
        return read(Path(path), Limits(max_pixels))
    except ValueError as error:
        raise ValueError(str(error).replace(str(Path(path)), Path(path).name)) from error


def restored(
    pipeline: Any, picture: ImageFile, settings: RestoreSettings, report: Report
) -> tuple[Any, float | None, list[str]]:
    """Return the restored pixels (H, W, C) float32 in [0, 1], the noise level, and notes."""
    options = {"sigma": settings.sigma, "task": settings.task, "strength": settings.strength, "memory": MEMORY}
    if pipeline.model.config.sigma_conditioning is None:
        options["sigma"] = None
    pipeline.progress_bar = lambda total: TileProgress(report, total)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            result = pipeline(picture.pixels, output_type="np", **options)
    finally:
        del pipeline.progress_bar
    notes = [str(warning.message).partition("; clip=")[0] for warning in caught if warning.category is UserWarning]
    return result.images[0], result.sigmas[0] if result.sigmas else None, notes


def restore(
    pipeline: Any, path: str | None, settings: RestoreSettings, max_pixels: int, folder: str, report: Report
) -> tuple[Image.Image, Image.Image, str, str]:
    """Restore a photograph. Reports (tiles done, tiles).

    Returns:
        The images before and after, the path of the PNG, and a line that describes it.
    """
    picture = read_upload(path, max_pixels)
    start = time.perf_counter()
    pixels, sigma, notes = restored(pipeline, picture, settings, report)
    seconds = time.perf_counter() - start
    after = to_pil(next(from_array(pixels)))
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(str(path)).stem}-restored.png"
    if settings.bits == 16:
        write(pixels, "uint16", target, picture)
    else:
        write(after, "uint8", target, picture)
    height, width = picture.pixels.shape[:2]
    used = [] if sigma is None else [f"σ {sigma:.3g}"]
    parts = [f"{width} × {height} pixels", *used, f"{seconds:.1f} s", *notes, *picture.metadata.notes]
    return to_pil(next(from_array(picture.pixels))), after, str(target), "; ".join(parts)


@dataclass(frozen=True)
class Compared:
    """One side of a comparison.

    Attributes:
        image: the result, or a grid of the results.
        parameters: number of parameters of the model.
        macs: multiply–accumulates of one forward pass for one image.
        seconds: time for all images, without loading.
    """

    image: Image.Image
    parameters: int
    macs: int
    seconds: float


def compare(pipeline: Any, inputs: GenerateSettings | tuple[ImageFile, RestoreSettings], report: Report) -> Compared:
    """Run one side: generate images, or restore a photograph."""
    start = time.perf_counter()
    if isinstance(inputs, GenerateSettings):
        images = generate(pipeline, inputs, report)
        seconds = time.perf_counter() - start
        columns = inputs.number if inputs.labels else len(images)
        model, size = pipeline.transformer, ()
        image = make_image_grid(images, rows=len(images) // columns, cols=columns)
    else:
        picture, settings = inputs
        pixels, _, _ = restored(pipeline, picture, settings, report)
        seconds = time.perf_counter() - start
        image = to_pil(next(from_array(pixels)))
        model, size = pipeline.model, picture.pixels.shape[:2]
    return Compared(image, count_parameters(model), count_macs(model, *size), seconds)
