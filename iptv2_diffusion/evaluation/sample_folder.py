"""Folders of generated images: the same bytes on any number of processes, and after any kill.

Image i has label and noise from (seed, i) alone. The networks take images in groups whose members are fixed (group g is
images g·G to g·G + G - 1), because a matrix product of another shape rounds differently: each group is drawn whole by
one process, so that the bytes depend on neither the number of processes nor, on a CPU, the batch size. An image is
written beside its place and moved there: a killed run leaves whole images only, and the same command draws the rest.
"""

from __future__ import annotations

import functools
import json
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from iptv2_diffusion.data.draws import derive_seed, generator_for
from iptv2_diffusion.data.files import file_sha256
from iptv2_diffusion.models.presets import count_macs, count_parameters
from iptv2_diffusion.training.checkpoint import differing_fields
from iptv2_diffusion.training.errors import ConfigError, UserError, loading, user_errors
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.loop import PROCESS_TIMEOUT, set_threads
from iptv2_diffusion.training.options import frozen_fields, option

CPU_GROUP_SIZE = 8
RECIPE = "generation.json"
IMAGES = "images"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk of a whole PNG file

NOISE_SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
FLOW_SCHEDULERS = {"flow-euler": "FlowMatchEulerDiscreteScheduler", "flow-heun": "FlowMatchHeunDiscreteScheduler"}


@dataclass(kw_only=True)
class GenerationConfig:
    """What decides the images."""

    pipeline: str = option(
        "assets/iptv2-emoji64", "folder or Hub name of an IPT-V2 or DiT pipeline", group="images", free=True
    )
    num_samples: int = option(50_000, "images in all", group="images", free=True)
    labels: Literal["balanced", "random", "none"] = option(
        "balanced", "image i has class i mod K; or a random one; or the null label", group="images"
    )
    class_counts: list[int] | None = option(  # noqa: RUF009
        None, "of balanced labels: how many of each class there are in every sum(class_counts) images", group="images"
    )
    seed: int = option(0, "image i depends on (seed, i)", group="images")
    num_inference_steps: int = option(250, "sampling steps", group="sampler")
    guidance_scale: float = option(1.0, "classifier-free guidance; 1: none", group="sampler")
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0), "fractions of the steps from and up to which guidance acts", group="sampler"
    )
    scheduler: Literal[
        "saved", "ddpm", "ddim", "dpm++", "euler", "euler-ancestral", "heun", "flow-euler", "flow-heun"
    ] = option("saved", "saved: the pipeline's own", group="sampler")
    batch_size: int = option(
        32,
        "images that go through the networks together on a GPU, unless group_size is given",
        group="machine",
        free=True,
    )
    group_size: int | None = option(
        None,
        "images that go through the networks together; another number rounds differently, by a grey level in one "
        f"value of some 20,000; none: on a CPU {CPU_GROUP_SIZE}, as fast as more and the same bytes for any batch_size",
        group="machine",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "autocast precision of the denoiser", group="machine")
    num_threads: int = option(
        1, "CPU threads a process; other numbers round differently: start more processes instead", group="machine"
    )
    overwrite: bool = option(False, "delete the images in output_dir and start again", group="results", free=True)

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work, naming them."""
        for name in ("num_samples", "num_inference_steps", "batch_size", "num_threads", "group_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        counts = self.class_counts
        if counts is not None and (self.labels != "balanced" or min(counts, default=0) < 1):
            raise ConfigError(f"class_counts is {counts}; give a positive count for each class, and balanced labels")
        start, stop = self.guidance_interval
        if not 0 <= start < stop <= 1:
            raise ConfigError(f"guidance_interval is {start:g},{stop:g}; it must rise within 0 and 1")


def start_accelerator(num_threads: int) -> Accelerator:
    """The accelerator of a sampling run: nothing is trained, so autocast is not its business."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)])
    set_threads(num_threads, accelerator)
    return accelerator


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def load_pipeline(config: GenerationConfig, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline, ready to sample, and what it is: the files' hashes, the scheduler, the versions.

    diffusers' `DiTPipeline` becomes ours around the same components: its ancestral noise comes from no seed of an
    image's own, and it knows no guidance interval.
    """
    from iptv2_diffusion import IPTV2Pipeline  # late: diffusers' pipelines take seconds to import

    diffusers.utils.logging.disable_progress_bar()
    with loading(config.pipeline):
        folder = config.pipeline if Path(config.pipeline).is_dir() else DiffusionPipeline.download(config.pipeline)
        pipeline = DiffusionPipeline.from_pretrained(folder)
    if isinstance(pipeline, DiTPipeline):
        pipeline = IPTV2Pipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    if not isinstance(pipeline, IPTV2Pipeline):
        raise ConfigError(f"{config.pipeline} is a {type(pipeline).__name__}; give an IPTV2Pipeline or a DiTPipeline")
    if config.scheduler != "saved":
        pipeline.scheduler = change_scheduler(pipeline, config.scheduler)
    pipeline.to(device).set_progress_bar_config(disable=True)
    if hasattr(pipeline.transformer, "fuse"):
        pipeline.transformer = pipeline.transformer.fuse()
    pipeline.transformer.eval()
    if config.mixed_precision != "no":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        pipeline.transformer.forward = torch.autocast(device.type, dtype)(pipeline.transformer.forward)
    files = sorted(p for kind in ("*.json", "*.safetensors") for p in Path(folder).rglob(kind))
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if k not in ("_use_default_values",)}
    return pipeline, {
        "files": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
        "scheduler_class": type(pipeline.scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(scheduler, default=str)),
        "num_classes": pipeline.num_classes,
        "parameters": count_parameters(pipeline.transformer),
        "gmacs": count_macs(pipeline.transformer) / 1e9,
    }


def change_scheduler(pipeline: Any, name: str) -> Any:
    """Another scheduler of the same kind, for the target that the denoiser was trained on."""
    flow = type(pipeline.scheduler).__name__ in FLOW_SCHEDULERS.values()
    fitting = FLOW_SCHEDULERS if flow else NOISE_SCHEDULERS
    if name not in fitting:
        target = "flow matching" if flow else "noise"
        raise ConfigError(f"scheduler {name} does not fit a denoiser of {target}; use one of {', '.join(fitting)}")
    scheduler_class, options = getattr(diffusers, fitting[name]), {}
    if scheduler_class in (DDPMScheduler, DDIMScheduler):
        options["clip_sample"] = False  # their default, for pixels in [-1, 1]
    if scheduler_class is DDPMScheduler:
        learned = pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
        options["variance_type"] = "learned_range" if learned else "fixed_small"
    return scheduler_class.from_config(pipeline.scheduler.config, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


class SampleFolder:
    """A folder with images/000000.png …, generation.json (what decided them) and seconds-*.jsonl (how long it took)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.folder / IMAGES / f"{index:06d}.png"

    def has(self, index: int) -> bool:
        """Whether the image is there and whole (a crash of the machine, unlike a kill, may cut a file)."""
        try:
            with self.path(index).open("rb") as file:
                file.seek(-len(_PNG_END), os.SEEK_END)
                return file.read() == _PNG_END
        except OSError:
            return False

    def about(self) -> dict[str, Any]:
        """generation.json: pipeline, versions, and the recipe, which must not change; empty if there is none."""
        try:
            return json.loads((self.folder / RECIPE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.folder / RECIPE} is not JSON: delete it, or use --overwrite") from error

    def check(self, recipe: dict[str, Any]) -> None:
        """Refuse to add to images that were made otherwise."""
        saved = self.about()
        changed = differing_fields(saved["recipe"], recipe) if saved else []
        if changed:
            changes = "; ".join(changed)
            raise ConfigError(
                f"{self.folder} holds images made otherwise: {changes}; use another folder, or --overwrite"
            )

    def prepare(self, about: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, remove what a kill left half-written, write generation.json."""
        (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / IMAGES).iterdir():
            if path.name.startswith(".tmp-") or (overwrite and path.suffix == ".png"):
                path.unlink()
        if overwrite:
            for path in self.folder.glob("seconds-*.jsonl"):
                path.unlink()
        temporary = self.folder / f".tmp-{RECIPE}"
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / RECIPE)

    def write(self, index: int, image: np.ndarray) -> None:
        """(H, W, 3) uint8 to its place, whole or not at all."""
        temporary = self.folder / IMAGES / f".tmp-{index:06d}.png"
        Image.fromarray(image).save(temporary)
        temporary.replace(self.path(index))

    def note_seconds(self, process: int, images: int, seconds: float) -> None:
        """Append how long a group took."""
        with (self.folder / f"seconds-{process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, "seconds": round(seconds, 4)}) + "\n")

    def seconds_per_image(self) -> float | None:
        """Of one process, over all groups drawn so far; None before the first."""
        rows = [row for path in self.folder.glob("seconds-*.jsonl") for row in read_metrics(path)]
        images = sum(row["images"] for row in rows)
        return sum(row["seconds"] for row in rows) / images if images else None

    def batches(self, count: int, batch_size: int = 64) -> Iterator[Tensor]:
        """The first `count` images: (N, 3, H, W) uint8."""
        for start in range(0, count, batch_size):
            with user_errors(OSError):
                images = [np.asarray(Image.open(self.path(i))) for i in range(start, min(start + batch_size, count))]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def write_npz(self, labels: list[int] | None, count: int) -> Path:
        """ADM's file: arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels, image by image, so that N does not matter."""
        height, width = np.asarray(Image.open(self.path(0))).shape[:2]
        path = self.folder / f"samples_{count}x{height}x{width}x3.npz"
        temporary = path.with_name(f".tmp-{path.name}")
        with user_errors(OSError), zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(count):
                    file.write(np.asarray(Image.open(self.path(index))).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
        temporary.replace(path)
        return path


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def label_of(config: GenerationConfig, index: int, num_classes: int | None) -> int | None:
    """Class of image `index`; None without classes."""
    if config.labels == "none" or num_classes is None:
        return None
    if config.labels == "random":
        return derive_seed(config.seed, "label", index) % num_classes
    if config.class_counts is None:
        return index % num_classes
    order = spread_labels(tuple(config.class_counts))
    return order[index % len(order)]


@functools.cache
def spread_labels(class_counts: tuple[int, ...]) -> list[int]:
    """Class k `class_counts[k]` times at equal distances, so that the first n labels have about these shares."""
    places = [((i + 0.5) / count, label) for label, count in enumerate(class_counts) for i in range(count)]
    return [label for _, label in sorted(places)]


def draw(pipeline: Any, config: GenerationConfig, indices: list[int]) -> np.ndarray:
    """The images of these numbers: (N, H, W, 3) uint8."""
    labels = [label_of(config, index, pipeline.num_classes) for index in indices]
    images = pipeline(
        None if labels[0] is None else labels,
        num_images_per_label=len(indices) if labels[0] is None else 1,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        generator=[generator_for(config.seed, "image", index) for index in indices],
        output_type="pt",
    ).images
    if not torch.isfinite(images).all():
        raise UserError(f"images {indices[0]} to {indices[-1]} are not finite; try --mixed_precision no")
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def generate(config: GenerationConfig, accelerator: Accelerator, output_dir: str | Path) -> SampleFolder:
    """Draw what is missing of `num_samples` images into `output_dir`, on all processes together."""
    pipeline, made_by = load_pipeline(config, accelerator.device)
    if config.class_counts is not None and len(config.class_counts) != pipeline.num_classes:
        raise ConfigError(
            f"class_counts has {len(config.class_counts)} numbers, the pipeline {pipeline.num_classes} classes"
        )
    on_cpu = accelerator.device.type == "cpu"
    size = config.group_size or (CPU_GROUP_SIZE if on_cpu else config.batch_size)
    recipe = {**frozen_fields(config), "group_size": size, "device": accelerator.device.type, **made_by}
    folder = SampleFolder(output_dir)
    if not config.overwrite:
        folder.check(recipe)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about = {"pipeline": config.pipeline, "versions": versions, "recipe": recipe}
    accelerator.wait_for_everyone()  # before the first writes what all have just read
    missing: list[Any] = [None]
    if accelerator.is_main_process:
        with user_errors(OSError):
            folder.prepare(about, config.overwrite)
        groups = range(-(-config.num_samples // size))
        missing = [[g for g in groups if any(not folder.has(i) for i in members(g, size, config.num_samples))]]
    (missing,) = broadcast_object_list(missing)
    draw_groups(pipeline, config, accelerator, folder, missing, size)
    accelerator.wait_for_everyone()
    return folder


def members(group: int, size: int, count: int) -> range:
    """Numbers of the images of a group that are wanted."""
    return range(group * size, min(group * size + size, count))


def draw_groups(
    pipeline: Any,
    config: GenerationConfig,
    accelerator: Accelerator,
    folder: SampleFolder,
    missing: list[int],
    size: int,
) -> None:
    """This process's share of the missing groups."""
    processes = accelerator.num_processes
    absent = sum(len(members(g, size, config.num_samples)) for g in missing)
    bar = tqdm(
        total=config.num_samples,
        initial=config.num_samples - absent,
        desc="sampling",
        unit="image",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    for group in missing[accelerator.process_index :: processes]:
        started = time.perf_counter()
        images = draw(pipeline, config, list(range(group * size, group * size + size)))
        folder.note_seconds(accelerator.process_index, size, time.perf_counter() - started)
        indices = members(group, size, config.num_samples)
        with user_errors(OSError):
            for index, image in zip(indices, images, strict=False):
                if not folder.has(index):
                    folder.write(index, image)
        bar.update(min(len(indices) * processes, bar.total - bar.n))  # the others are about as far
    bar.close()
