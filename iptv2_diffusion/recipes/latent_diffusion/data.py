"""Data of a latent-diffusion run: images, codec and latents, from the options of `LDMConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import datasets
import torch
from accelerate import Accelerator

from iptv2_diffusion.data.draws import DataOrder, Order, RunDraws, class_balanced_weights
from iptv2_diffusion.data.feature_folder import FeatureFolder, holds_features
from iptv2_diffusion.data.image_files import Limits
from iptv2_diffusion.data.images import (
    ImageTensors,
    class_names,
    heldout_shares,
    load_image_dataset,
    with_labels_of,
)
from iptv2_diffusion.data.latent_cache import CachedLatents, LatentCache, StoredLatents, cached_latents
from iptv2_diffusion.data.latent_encoding import EncodedLatents, Encoding, LatentSource
from iptv2_diffusion.data.streaming import ImageStream, StreamedLatents, StreamOrder
from iptv2_diffusion.files import shipped, user_path
from iptv2_diffusion.imagenet_classes import imagenet_id2label
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.models.loading import load_vae
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.accelerator import process_slices, resolve_sharding, start_accelerator
from iptv2_diffusion.training.errors import ConfigError, LocalError, user_errors
from iptv2_diffusion.training.image_splits import load_splits
from iptv2_diffusion.training.precision import fastest_precision

# Smallest standard deviation of latents in model units, and inverse of the largest. SD's VAE without its scaling has 5.
LEAST_DEVIATION = 1 / 3
Images = ImageTensors | ImageStream | FeatureFolder


def load_images(config: LDMConfig, accelerator: Accelerator) -> tuple[Images, Images | None, list[str]]:
    """Return training images, held-out images (None without any) and class names ([] without labels).

    For published latents, the images are a `FeatureFolder` of latents.
    """
    columns = {"image_column": config.image_column, "label_column": config.label_column, "revision": config.revision}
    with user_errors(OSError, ValueError):
        has_features = holds_features(user_path(config.data))
    if has_features:
        return _load_features(config, accelerator)
    if config.streaming:
        return _load_stream(config, accelerator, columns)
    train, heldout = load_splits(config, accelerator, source=source_of(config), label_column=config.label_column)
    names = class_names(train) or []
    if train.info.description and config.label_column is None:
        accelerator.print(f"{config.data}: {train.info.description}")
    if config.class_balance and not names:
        raise ConfigError(
            f"class_balance is {config.class_balance}, but no labels were found in {config.data}; set "
            "--label_column, put every class into its own sub-folder, or leave class_balance out"
        )
    if config.dry_run:
        train, heldout = _first(train, 2 * config.batch_size), _first(heldout, 16)

    def tensors(dataset: Any) -> ImageTensors:
        return ImageTensors(dataset, size=config.size, strict=config.strict, limits=Limits(config.max_pixels))

    with user_errors(ValueError):
        return tensors(train), None if heldout is None else tensors(heldout), names


def _first(images: Any, count: int) -> Any:
    """Return the first `count` of the images, or all if there are fewer; None for None."""
    return None if images is None else images.select(range(min(len(images), count)))


def _load_features(
    config: LDMConfig, accelerator: Accelerator
) -> tuple[FeatureFolder, FeatureFolder | None, list[str]]:
    """Do the same for published latents, which have a single split."""
    for option, value, default in (
        ("streaming", config.streaming, False),
        ("heldout_split", config.heldout_split, None),
        ("train_split", config.train_split, "train"),
        ("crops", config.crops, 1),
        ("kid_samples", config.kid_samples, 0),
    ):
        if value != default:
            raise ConfigError(
                f"{option} is {value}, but {config.data} contains latents: one split, one view of each image and no "
                f"pixels; set {option} to {'none' if default is None else str(default).lower()}"
            )
    # One process writes the index, and the others then read it from the disk.
    with user_errors(OSError, ValueError), accelerator.local_main_process_first():
        labelled = config.label_column != "ignore"
        options: dict[str, Any] = {"labelled": labelled, "num_workers": config.num_workers}
        features = FeatureFolder(user_path(config.data), config.cache_dir, **options)
    found = max(features.labels, default=-1) + 1
    names = [str(label) for label in range(found)]
    classes = imagenet_id2label()
    if features.kind.startswith("imagenet") and 0 < found <= len(classes) <= (config.num_classes or len(classes)):
        names = list(classes.values())
    shares = heldout_shares(len(features), config.heldout_fraction, config.seed)
    train, heldout = (features, None) if shares is None else map(features.select, shares)
    if config.dry_run:
        train, heldout = _first(train, 2 * config.batch_size), _first(heldout, 16)
    return train, heldout, names


def check_latents(config: LDMConfig, codec: LatentCodec, latents: StoredLatents) -> str | None:
    """Check latents against the VAE and the image size; return a note on unusual statistics.

    Raises:
        ConfigError: the shape or the standard deviation of published latents does not fit.
    """
    height, width = codec.latent_size(*config.size)
    expected = (codec.latent_channels, height, width)
    if latents.latent_shape != expected:
        channels, *size = latents.latent_shape
        pixels = codec.image_size(*size)
        remedy = (
            f"set --resolution {pixels[0] if pixels[0] == pixels[1] else f'{pixels[0]},{pixels[1]}'}"
            if channels == expected[0]
            else "set --vae to the VAE that encoded them"
        )
        raise ConfigError(
            f"{config.data} contains latents of {'x'.join(map(str, latents.latent_shape))}, but the VAE {config.vae} "
            f"gives {'x'.join(map(str, expected))} at {config.size[0]}x{config.size[1]} pixels; {remedy}"
        )
    with user_errors(OSError, ValueError, as_error=LocalError):
        deviation = latents.deviation()
    if LEAST_DEVIATION <= deviation <= 1 / LEAST_DEVIATION:
        return None
    scale = codec.vae.config.get("scaling_factor")
    unusual = f"the latents have a standard deviation of {deviation:.3g}, but a denoiser needs about 1"
    if isinstance(latents, FeatureFolder):
        raise ConfigError(
            f"{config.data}: {unusual}; encode the images again and multiply by the VAE's scaling_factor {scale}, as "
            "fast-DiT does, or set --vae to the VAE that encoded them"
        )
    if not deviation > 0:
        return f"note: {unusual}; the VAE {config.vae} may be untrained"
    better = (scale or 1) / deviation
    return f"note: {unusual}; set scaling_factor in the VAE's config.json to {better:.4g} instead of {scale}"


def source_of(config: LDMConfig) -> str:
    """Return the data as an argument of `load_image_dataset`: a path or a name on the Hub."""
    path = shipped(config.data)
    return str(path) if path.exists() else config.data


def _load_stream(
    config: LDMConfig, accelerator: Accelerator, columns: dict[str, Any]
) -> tuple[ImageStream, ImageTensors | None, list[str]]:
    """Do the same for a stream. Its held-out images are the first images of a separate split, kept in memory."""
    with user_errors(OSError, ValueError):
        train = load_image_dataset(source_of(config), split=config.train_split, streaming=True, **columns)
        names = class_names(train) or []
        if "label" in train.column_names and not names:
            if config.num_classes is None:
                raise ConfigError(
                    f"the classes of a stream cannot be counted in advance, and {config.data} does not name them: set "
                    "--num_classes, or --label_column ignore"
                )
            names = [str(label) for label in range(config.num_classes)]
        heldout = None
        if config.heldout_split is None:
            accelerator.print("no held-out loss: a stream needs a separate --heldout_split for it")
        else:
            first = load_image_dataset(source_of(config), split=config.heldout_split, streaming=True, **columns)
            records = list(first.take(config.heldout_samples))
            dataset = datasets.Dataset.from_list(records, features=first.features)
            dataset = with_labels_of(dataset, train, f'{config.data}, split "{config.heldout_split}"')
            limits = Limits(config.max_pixels)
            heldout = ImageTensors(dataset, size=config.size, strict=config.strict, limits=limits)
    limits = Limits(config.max_pixels)
    stream = ImageStream(train, config.size, strict=config.strict, block=config.shuffle_block, limits=limits)
    return stream, heldout, names


def load_codec(config: LDMConfig, device: torch.device) -> LatentCodec:
    """Load the VAE and return its codec, frozen, on the device."""
    with user_errors(Exception):  # from diffusers and safetensors, for any content of the folder
        vae = load_vae(str(shipped(config.vae)), config.vae_subfolder)
    vae.to(device, memory_format=torch.channels_last)
    with user_errors(ValueError):
        codec = LatentCodec(vae)
        codec.latent_size(*config.size)  # raises if the image size does not fit
    return codec


def open_caches(
    config: LDMConfig,
    accelerator: Accelerator,
    codec: LatentCodec,
    *images: ImageTensors | None,
    whole_run: bool = False,
) -> list[LatentCache | None]:
    """Return the latent caches of training and held-out images, and create those that are missing.

    Held-out images are never mirrored. The processes of each machine share the work. With `whole_run`, the processes of
    all machines do, which requires a shared disk.
    """
    share = (accelerator.process_index, accelerator.num_processes)
    if not whole_run:
        share = (accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", share[1])))
    caches: list[LatentCache | None] = []
    for part, training in zip(images, (True, False), strict=True):
        encoding = Encoding(
            flips=config.random_flip and training,
            crops=config.crops if training else 1,
            dtype=config.cache_dtype,
            precision=encode_precision(config),
        )
        with user_errors(OSError, ValueError, as_error=LocalError):
            cache = part and cached_latents(
                part,
                codec,
                config.cache_dir,
                encoding,
                batch_size=config.encode_batch_size,
                num_workers=config.num_workers,
                shard_images=config.cache_shard_images,
                share=share,
                say=accelerator.print,
            )
        caches.append(cache)
    return caches


def make_caches(config: LDMConfig) -> int:
    """Encode the missing parts of the run's caches on all processes of all machines; return the exit code."""
    if config.streaming:
        raise ConfigError(
            "a stream is encoded during training and not cached; leave --streaming out to cache its images"
        )
    accelerator = start_accelerator(resolve_sharding(config))
    train, heldout, _ = load_images(config, accelerator)
    if isinstance(train, FeatureFolder):
        raise ConfigError(f"{config.data} already contains latents; train_ldm.py reads them directly")
    codec = load_codec(config, accelerator.device)
    for what, cache in zip(
        ("training", "held-out"),
        open_caches(config, accelerator, codec, train, heldout, whole_run=True),
        strict=True,
    ):
        if cache is not None:
            accelerator.print(f"{len(cache)} {what} images with latents {cache.latent_shape} in {cache.folder}")
    accelerator.end_training()
    return 0


def encode_precision(config: LDMConfig) -> Literal["float32", "bfloat16"]:
    """Return `config.encode_precision`, with `auto` resolved for this machine."""
    if config.encode_precision != "auto":
        return config.encode_precision
    return "bfloat16" if fastest_precision() == "bf16" else "float32"


def run_draws(config: LDMConfig, accelerator: Accelerator, codec: LatentCodec, order: Order) -> RunDraws:
    """Create the random draws of the run for this process."""
    slices = process_slices(accelerator, config.batch_size, config.gradient_accumulation_steps)
    latent_shape = (codec.latent_channels, *codec.latent_size(*config.size))
    return RunDraws(order, config.batch_size, latent_shape, slices, stratified=config.stratified_timesteps)


def latents_from_cache(
    config: LDMConfig, accelerator: Accelerator, codec: LatentCodec, cache: StoredLatents
) -> LatentSource:
    """Return a source of latents on the disk, in the order of the run."""
    weights = class_balanced_weights(cache.class_labels, config.class_balance)
    order = DataOrder(len(cache), config.seed, weights)
    draws = replace(run_draws(config, accelerator, codec, order), posterior=cache.has_spread)
    return CachedLatents(cache, draws)


def latents_on_the_fly(
    config: LDMConfig,
    accelerator: Accelerator,
    codec: LatentCodec,
    images: ImageTensors | ImageStream,
    start: int,
    *,
    position: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> LatentSource:
    """Return a source that encodes latents when they are needed, from optimiser step `start` on.

    For a stream, `position` is its position at that step, and labels must be below `num_classes`.
    """
    encoding = Encoding(flips=config.random_flip, crops=config.crops, precision=encode_precision(config))
    reading: dict[str, Any] = {"start": start, "encoding": encoding, "num_workers": config.num_workers}
    if isinstance(images, ImageStream):
        draws = run_draws(config, accelerator, codec, StreamOrder(config.seed))
        return StreamedLatents(images, codec, draws, position=position, num_classes=num_classes, **reading)
    with user_errors(OSError, ValueError):
        labels = torch.tensor(images.labels)[images.valid_indices()]
        order = DataOrder(len(labels), config.seed, class_balanced_weights(labels, config.class_balance))
        return EncodedLatents(images, codec, run_draws(config, accelerator, codec, order), **reading)
