"""Measure the distance of samples to their nearest training images, to detect memorisation.

    python eval/nearest_neighbours.py --pipeline assets/iptv2-emoji64 --output_dir runs/neighbours

For every sample the script finds the nearest training image, or its mirror image, by root-mean-square difference of
pixels on the 0–255 scale. It measures the same distance for held-out images, which the model has never seen. Samples
that are much nearer than held-out images are copies. The script writes neighbours.json and neighbours.png, a grid of
samples above their nearest training images.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iptv2_diffusion.files import write_text
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors
from iptv2_diffusion.training.options import Config, option
from iptv2_diffusion.training.parsing import parse_config

if TYPE_CHECKING:
    from torch import Tensor

    from iptv2_diffusion import IPTV2Pipeline


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig(Config):
    """Options of the samples and the data set."""

    pipeline: str = option("assets/iptv2-emoji64", "folder of a class-conditional pipeline")
    data: str = option("data/emoji64", "data of the training: a folder, parquet shards, or a name on the Hub")
    train_split: str = option("train", "split that the pipeline was trained on")
    heldout_split: str = option("heldout", "split that the pipeline never saw")
    resolution: int = option(64, "image size in pixels", at_least=1)
    per_class: int = option(32, "number of samples of each class", at_least=1)
    num_inference_steps: int = option(30, "number of denoising steps", at_least=1)
    guidance_scale: float = option(3.0, "classifier-free guidance scale; 1: no guidance")
    seed: int = option(0, "seed; sample i uses seed + i")
    output_dir: str = option("runs/neighbours", "folder for neighbours.json and neighbours.png")


def load_split(config: NeighbourConfig, split: str) -> Tensor:
    """Load all images of a split: (N, 3, H, W) float32 in [0, 255]."""
    from iptv2_diffusion.data.images import ImageTensors, load_image_dataset

    with user_errors(OSError, ValueError):
        images = ImageTensors(load_image_dataset(config.data, split=split), size=config.resolution)
        return images.pixels(images.valid_indices()).float()


def draw_samples(pipeline: IPTV2Pipeline, config: NeighbourConfig) -> Tensor:
    """Sample `per_class` images of each class, in the order of the classes: (N, 3, H, W) float32 in [0, 255]."""
    import torch

    rows = []
    for label in range(pipeline.num_classes):
        seeds = [config.seed + label * config.per_class + i for i in range(config.per_class)]
        result = pipeline(
            label,
            num_images_per_label=config.per_class,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        rows.append(result.images.float().cpu() * 255)
    return torch.cat(rows)


def quantiles(distances: Tensor) -> dict[str, float]:
    """Return the minimum, 5 % quantile, median and mean."""
    import torch

    low, median = torch.quantile(distances, torch.tensor([0.05, 0.5])).tolist()
    values = {"min": distances.min().item(), "q05": low, "median": median, "mean": distances.mean().item()}
    return {name: round(value, 2) for name, value in values.items()}


def write_picture(samples: Tensor, neighbours: Tensor, names: list[str], path: Path, columns: int = 10) -> None:
    """Write a grid with two rows per class: samples, and their nearest training images."""
    from torchvision.transforms.functional import to_pil_image

    from iptv2_diffusion.evaluation.pictures import picture_sheet

    def row(images: Tensor) -> list:
        return [to_pil_image(image.clamp(0, 255).round().byte()) for image in images[:columns]]

    pairs = zip(samples.chunk(len(names)), neighbours.chunk(len(names)), strict=True)
    rows = [line for ours, theirs in pairs for line in (row(ours), row(theirs))]
    labels = [line for name in names for line in (name, "nearest")]
    picture_sheet(rows, labels).save(path)


def main() -> int:
    """Sample, find the nearest training images, write the results."""
    config = parse_config(NeighbourConfig, description=__doc__)
    from iptv2_diffusion import IPTV2Pipeline

    with user_errors(OSError, ValueError):
        pipeline = IPTV2Pipeline.from_pretrained(config.pipeline)
        output_dir = Path(config.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    if pipeline.num_classes is None:
        raise ConfigError(f"{config.pipeline} is unconditional; this script draws samples by class")
    from iptv2_diffusion.evaluation.generation_metrics import nearest_neighbour_distance

    train, heldout = load_split(config, config.train_split), load_split(config, config.heldout_split)
    samples = draw_samples(pipeline, config)

    distance, index = nearest_neighbour_distance(samples, train)
    result = {
        "samples_to_train": quantiles(distance),
        "heldout_to_train": quantiles(nearest_neighbour_distance(heldout, train)[0]),
        "samples": len(samples),
        "command": " ".join(sys.argv),
    }
    write_text(output_dir / "neighbours.json", json.dumps(result, indent=2) + "\n")
    names = [pipeline.id2label.get(label, f"class {label}") for label in range(pipeline.num_classes)]
    write_picture(samples, train[index], names, output_dir / "neighbours.png")
    print(json.dumps(result, indent=2))
    print(f"wrote {output_dir}/neighbours.json and {output_dir}/neighbours.png")
    return 0


if __name__ == "__main__":
    run_main(main)
