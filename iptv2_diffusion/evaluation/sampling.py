"""Sampling of a pipeline into a `SampleFolder`: the same bytes for any number of processes.

The label and the noise of image i depend only on (seed, i). The networks process images in fixed groups (group g has
images g·G to g·G + G - 1), because a matrix product of another shape rounds differently. One process samples a whole
group, so the bytes do not depend on the number of processes or, on a CPU, on the batch size.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline
from tqdm import tqdm

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.data.draws import derive_seed, generator_for
from iptv2_diffusion.evaluation.generation_options import CPU_GROUP_SIZE, LABEL_WORDS, GenerationConfig
from iptv2_diffusion.evaluation.sample_folder import SampleFolder
from iptv2_diffusion.files import file_sha256, shipped
from iptv2_diffusion.models.presets import count_macs, count_parameters, find_weights
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.training.accelerator import PROCESS_TIMEOUT, set_threads
from iptv2_diffusion.training.errors import ConfigError, LocalError, UserError, loading, user_errors
from iptv2_diffusion.training.options import frozen_fields

NOISE_SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
FLOW_SCHEDULERS = {"flow-euler": "FlowMatchEulerDiscreteScheduler", "flow-heun": "FlowMatchHeunDiscreteScheduler"}


def start_accelerator(num_threads: int) -> Accelerator:
    """Create the accelerator of a sampling run. `load_pipeline` handles autocast instead."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)])
    set_threads(num_threads, accelerator)
    return accelerator


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def load_pipeline(config: GenerationConfig, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Load the pipeline and put it on the device, fused, with the scheduler and the precision of `config`.

    The components of diffusers' `DiTPipeline` are put into an `IPTV2Pipeline`, because `DiTPipeline` does not support
    one seed per image for ancestral noise, or a guidance interval.

    Returns:
        The pipeline and its description: SHA-256 of the files, scheduler, number of classes, parameters, GMACs.

    Raises:
        ConfigError: the pipeline has another class, or the scheduler does not fit.
        UserError: the pipeline cannot be loaded.
    """
    diffusers.utils.logging.disable_progress_bar()
    with loading(config.pipeline):
        local = shipped(config.pipeline)
        folder = local if local.is_dir() else DiffusionPipeline.download(config.pipeline)
        pipeline = DiffusionPipeline.from_pretrained(folder)
    if isinstance(pipeline, DiTPipeline):
        pipeline = IPTV2Pipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    if not isinstance(pipeline, IPTV2Pipeline):
        raise ConfigError(f"{config.pipeline} is a {type(pipeline).__name__}; give an IPTV2Pipeline or a DiTPipeline")
    if config.scheduler != "saved":
        pipeline.scheduler = change_scheduler(pipeline, config.scheduler)
    if config.guidance_model is not None:
        with loading(config.guidance_model):
            pipeline.load_guidance_model(config.guidance_model)
    pipeline.to(device).set_progress_bar_config(disable=True)
    for name in ("transformer", "guidance_model"):
        model = getattr(pipeline, name)
        if model is None:
            continue
        model = model.fuse().eval() if hasattr(model, "fuse") else model.eval()
        if config.mixed_precision != "no":
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
            model.forward = torch.autocast(device.type, dtype)(model.forward)
        setattr(pipeline, name, model)
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if k not in ("_use_default_values",)}
    guide = None if config.guidance_model is None else find_weights(config.guidance_model)
    return pipeline, {
        "files": hashes(Path(folder), "*.json", "*.safetensors"),
        **({} if guide is None else {"guidance_files": hashes(guide.folder, "*.json", "*.safetensors")}),
        "scheduler_class": type(pipeline.scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(scheduler, default=str)),
        "num_classes": pipeline.num_classes,
        "parameters": count_parameters(pipeline.transformer),
        "gmacs": count_macs(pipeline.transformer) / 1e9,
    }


def hashes(folder: Path, *kinds: str) -> dict[str, str]:
    """Return the SHA-256 of a folder's files of some kinds, such as "*.json", by relative name."""
    files = sorted(path for kind in kinds for path in folder.rglob(kind))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def change_scheduler(pipeline: Any, name: str) -> Any:
    """Create another scheduler for the denoiser's training target (noise or flow matching).

    Raises:
        ConfigError: the scheduler is for the other target.
    """
    flow = type(pipeline.scheduler).__name__ in FLOW_SCHEDULERS.values()
    fitting = FLOW_SCHEDULERS if flow else NOISE_SCHEDULERS
    if name not in fitting:
        target = "flow matching" if flow else "noise"
        raise ConfigError(f"scheduler {name} does not fit a denoiser of {target}; use one of {', '.join(fitting)}")
    scheduler_class, options = getattr(diffusers, fitting[name]), {}
    if scheduler_class in (DDPMScheduler, DDIMScheduler):
        options["clip_sample"] = False  # the default True is for pixels in [-1, 1]
    if scheduler_class is DDPMScheduler:
        learned = pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
        options["variance_type"] = "learned_range" if learned else "fixed_small"
    return scheduler_class.from_config(pipeline.scheduler.config, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def label_of(config: GenerationConfig, index: int, num_classes: int | None) -> int | None:
    """Return the class of image `index`; None for the null label or an unconditional pipeline."""
    if config.labels == "none" or num_classes is None:
        return None
    if config.labels not in LABEL_WORDS:  # numbers, see `numbered_labels`
        chosen = config.labels.split(",")
        return int(chosen[index % len(chosen)])
    if config.labels == "random":
        return derive_seed(config.seed, "label", index) % num_classes
    if config.class_counts is None:
        return index % num_classes
    order = spread_labels(tuple(config.class_counts))
    return order[index % len(order)]


def numbered_labels(config: GenerationConfig, pipeline: Any) -> GenerationConfig:
    """Replace class names in `labels` by their numbers. Raises a `ConfigError` for unknown names."""
    if config.labels in LABEL_WORDS:
        return config
    if pipeline.num_classes is None:
        raise ConfigError(f"labels is {config.labels}, but {config.pipeline} has no classes; use --labels none")
    words = [word.strip() for word in config.labels.split(",")]
    with user_errors(ValueError, as_error=ConfigError):
        numbers = pipeline.get_label_ids([int(word) if word.isdigit() else word for word in words])
    return replace(config, labels=",".join(map(str, numbers)))


@functools.cache
def spread_labels(class_counts: tuple[int, ...]) -> list[int]:
    """Spread each class k evenly over a list that has it `class_counts[k]` times.

    The first n labels of the list then have approximately the same class frequencies.
    """
    places = [((i + 0.5) / count, label) for label, count in enumerate(class_counts) for i in range(count)]
    return [label for _, label in sorted(places)]


def draw(
    pipeline: Any, config: GenerationConfig, indices: list[int]
) -> tuple[np.ndarray, dict[int, NonFiniteImageError]]:
    """Sample the images with these indices.

    Returns:
        The images (N, H, W, 3) uint8, and the errors of the images with NaN or infinity, by index.
    """
    labels = [label_of(config, index, pipeline.num_classes) for index in indices]
    spoilt: dict[int, NonFiniteImageError] = {}
    try:
        images = pipeline(
            None if labels[0] is None else labels,
            num_images_per_label=len(indices) if labels[0] is None else 1,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            generator=[generator_for(config.seed, "image", index) for index in indices],
            output_type="pt",
        ).images
    except NonFiniteImageError as error:
        images, spoilt = error.images, {indices[place]: error for place in error.indices}
    except ValueError as error:  # for example a scheduler that does not fit
        raise UserError(str(error)) from error
    return (images.nan_to_num(0.0) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(), spoilt


def generate(config: GenerationConfig, accelerator: Accelerator, output_dir: str | Path) -> SampleFolder:
    """Sample the missing images of `config.num_samples` into `output_dir`, on all processes together.

    Raises:
        ConfigError: the options do not fit the pipeline or the images in the folder.
        UserError: a file cannot be written.
        KeyboardInterrupt: the run was interrupted. The message gives the number of complete images.
    """
    pipeline, made_by = load_pipeline(config, accelerator.device)
    config = numbered_labels(config, pipeline)
    if config.class_counts is not None and len(config.class_counts) != pipeline.num_classes:
        raise ConfigError(
            f"class_counts has {len(config.class_counts)} numbers, but the pipeline has {pipeline.num_classes} classes"
        )
    on_cpu = accelerator.device.type == "cpu"
    size = config.group_size or (CPU_GROUP_SIZE if on_cpu else config.batch_size)
    recipe = {**frozen_fields(config), "group_size": size, "device": accelerator.device.type, **made_by}
    height, width = pipeline.codec.image_size(*_pair(pipeline.transformer.config.sample_size))
    folder = SampleFolder(output_dir, accelerator.process_index, (height, width))
    if not config.overwrite:
        folder.check(recipe)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about = {"pipeline": config.pipeline, "versions": versions, "recipe": recipe}
    accelerator.wait_for_everyone()  # the main process writes the file that all processes have read above
    missing: list[Any] = [None]
    if accelerator.is_main_process:
        with user_errors(OSError, ValueError):
            folder.prepare(about, config.overwrite)
        groups = range(-(-config.num_samples // size))
        missing = [[g for g in groups if any(not folder.has(i) for i in members(g, size, config.num_samples))]]
    (missing,) = broadcast_object_list(missing)
    folder.refresh()  # includes images of an earlier version that the main process recorded
    try:
        draw_groups(pipeline, config, accelerator, folder, missing, size)
    except KeyboardInterrupt:
        folder.refresh()
        there = sum(folder.has(index) for index in range(config.num_samples))
        raise KeyboardInterrupt(
            f"stopped: {output_dir} has {there} of {config.num_samples} images; run the same command to continue"
        ) from None
    accelerator.wait_for_everyone()
    folder.refresh()
    return folder


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def members(group: int, size: int, count: int) -> range:
    """Return the indices below `count` of the images of a group."""
    return range(group * size, min(group * size + size, count))


def draw_groups(
    pipeline: Any,
    config: GenerationConfig,
    accelerator: Accelerator,
    folder: SampleFolder,
    missing: list[int],
    size: int,
) -> None:
    """Sample this process's share of the missing groups.

    Raises:
        LocalError: some images have NaN or infinity. All others are written.
    """
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
    failed: dict[int, NonFiniteImageError] = {}
    for group in missing[accelerator.process_index :: processes]:
        started = time.perf_counter()
        images, spoilt = draw(pipeline, config, list(range(group * size, group * size + size)))
        folder.note_seconds(accelerator.process_index, size, time.perf_counter() - started)
        indices = members(group, size, config.num_samples)
        with user_errors(OSError, ValueError):
            for index, image in zip(indices, images, strict=False):
                if index not in spoilt and not folder.has(index):
                    folder.write(index, image)
        failed |= {index: error for index, error in spoilt.items() if index in indices}
        bar.update(min(len(indices) * processes, bar.total - bar.n))  # the other processes progress equally fast
    bar.close()
    if failed:
        first = min(failed)
        precision = (
            "" if config.mixed_precision == "no" else f" (with --mixed_precision {config.mixed_precision}: try no)"
        )
        raise LocalError(
            f"{len(failed)} images are missing, for example {first}: {failed[first]}{precision}; the others are in "
            f"{folder.folder}"
        )
