"""Compare IPT-V2 and DiT at equal MACs: train, sample and score both with one recipe.

    python eval/arena.py --config configs/arena/emoji64/small.yaml
    python eval/arena.py --config configs/arena/emoji64/small.yaml --stop_after grid

A model may have several shapes (for DiT: patch sizes 2 and 1). Short runs of each shape on a grid of learning rates
select one shape and learning rate per model. The selected one is trained in full with every seed. All runs use
`train/train_ldm.py`, one after another, in OUTPUT_DIR/SIZE. Run the same command to resume; it skips finished runs.
The metrics of `evaluation/generation_metrics.py` score the samples of every full run. The results are a JSON list of
rows. NAME-about.json has the machine, the recipe and the scores of real images. See `eval/arena_report.py` for tables.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iptv2_diffusion.files import write_text
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.options import Config, config_to_dict, option
from iptv2_diffusion.training.parsing import parse_config

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("kid", "kid_error", "fd_pca64", "fd_train", "nearest_neighbour_median", "sampling_seconds_per_image")


@dataclass(frozen=True, kw_only=True)
class ArenaConfig(Config):
    """Options of a comparison at one model size."""

    size: str = option("small", "name of this size in the results")
    recipe: tuple[str, ...] = option(
        ("configs/arena/emoji64/recipe.yaml",),
        "configuration files for train_ldm.py; a later one overrides an earlier one",
    )
    models: dict = option(  # noqa: RUF009
        {}, "model -> shape -> preset (`model`), overrides and a known `learning_rate`, as JSON or YAML", nonempty=True
    )
    tolerance: float = option(3.0, "largest difference in MACs between shapes, in per cent", at_least=0)
    learning_rates: list[float] = option(  # noqa: RUF009
        [1e-3, 2e-3, 4e-3], "learning rates of the grid, the same for every shape", above=0, nonempty=True
    )
    grid_steps: int = option(1000, "number of steps of a grid run", at_least=1)
    max_train_steps: int = option(4000, "number of steps of a full run", at_least=1)
    seeds: list[int] = option([0, 1, 2], "seeds of the full runs; the grid uses the first", nonempty=True)  # noqa: RUF009
    num_threads: int = option(1, "number of CPU threads of a run", at_least=1)
    num_samples: int = option(1731, "number of samples of each full run; classes as in the held-out images", at_least=1)
    guidance_scale: float = option(2.0, "classifier-free guidance scale of the samples")
    num_inference_steps: int = option(25, "number of denoising steps", at_least=1)
    variant_column: str | None = option("skin_tone", "compare with images where this column is empty; none: with all")
    encoder_size: int = option(64, "size in pixels at which EfficientNet-Lite0 sees an image", at_least=32)
    stop_after: Literal["count", "grid", "train", "score"] = option(
        "score", "last stage to run: count: compare MACs; grid: the short runs; train: the full runs; score: all"
    )
    output_dir: str = option("runs/arena-emoji64", "folder of the runs")
    results: str = option("docs/results/arena-emoji64.json", "file of results; the rows of these shapes are replaced")


@dataclass
class Run:
    """One training run of the arena."""

    model: str
    shape: str
    learning_rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def log(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl so far."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def curve(self) -> list[dict[str, float]]:
        """Log lines with a held-out loss, up to the last step of this run."""
        return [line for line in self.log if "heldout_loss" in line and line["step"] <= self.steps]

    @property
    def finished(self) -> bool:
        return (self.folder / "pipeline" / "model_index.json").is_file() and self.log[-1]["step"] == self.steps

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent in training steps."""
        return max(line.get("seconds", 0.0) for line in self.log if line["step"] <= self.steps)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step without other load: the first decile over the intervals between two log lines."""
        lines = [line for line in self.log if "seconds" in line]
        pairs = [(a, b) for a, b in itertools.pairwise(lines) if b["step"] > a["step"] > 1]
        times = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs]
        return statistics.quantiles(times, n=10)[0]


def count_costs(config: ArenaConfig) -> dict[tuple[str, str], dict[str, Any]]:
    """Count the parameters and the MACs, fused and in training, of each (model, shape)."""
    from iptv2_diffusion.models.presets import count_macs, count_parameters, create_model

    batch_size = read_recipe(config)["batch_size"]
    costs = {}
    for name, shapes in config.models.items():
        for shape, arguments in shapes.items():
            if "model" not in arguments:
                raise ConfigError(f"models: {name}/{shape} has no `model`; name its preset")
            overrides = {k: v for k, v in arguments.items() if k not in ("model", "learning_rate")}
            with user_errors(OSError, ValueError):
                model = create_model(arguments["model"], **overrides)
            costs[name, shape] = {
                "parameters": count_parameters(model),
                "macs_fused": count_macs(model.fuse() if hasattr(model, "fuse") else model),
                "macs_train": count_macs(model, batch_size=batch_size),
            }
    return costs


def read_recipe(config: ArenaConfig) -> dict[str, Any]:
    """Return the options of `train_ldm.py` that the recipe's configuration files give."""
    return config_to_dict(parse_config(LDMConfig, [word for path in config.recipe for word in ("--config", path)]))


def check_equal(costs: dict[tuple[str, str], dict[str, Any]], tolerance: float) -> None:
    """Raise a `ConfigError` if the MACs of two shapes, fused or in training, differ by more than `tolerance` %."""
    kinds = ("macs_fused", "macs_train")
    for (one, ours), (other, theirs) in itertools.combinations(costs.items(), 2):
        off = 100 * min(abs(ours[a] / theirs[b] - 1) for a in kinds for b in kinds)
        if off > tolerance:
            macs = [f"{cost['macs_fused'] / 1e6:.2f} M" for cost in (ours, theirs)]
            raise ConfigError(
                f"{'/'.join(one)} has {macs[0]} MACs, {'/'.join(other)} has {macs[1]}: {off:.1f} % apart, "
                f"but at most {tolerance:g} % is allowed; change widths or layers"
            )


def make_run(config: ArenaConfig, name: str, shape: str, learning_rate: float, seed: int, *, grid: bool) -> Run:
    parent = Path(config.output_dir).expanduser() / config.size / ("grid" if grid else "full")
    steps = config.grid_steps if grid else config.max_train_steps
    return Run(name, shape, learning_rate, seed, steps, parent / f"{name}-{shape}-lr{learning_rate:g}-seed{seed}")


def train(config: ArenaConfig, run: Run) -> None:
    """Run `train_ldm.py` unless the run is finished. An interrupted run resumes from its checkpoint."""
    if run.log and run.log[-1]["step"] > run.steps:
        problem = f"{run.folder} has {run.log[-1]['step']} steps, but {run.steps} are requested"
        raise ConfigError(f"{problem}; use the old number or another output_dir")
    if run.finished:
        return
    arguments = dict(config.models[run.model][run.shape])
    arguments.pop("learning_rate", None)
    options = {
        "model": arguments.pop("model"),
        "model_overrides": json.dumps(arguments),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "max_train_steps": run.steps,
        "num_threads": config.num_threads,
        "output_dir": run.folder,
    }
    pairs = [*(("config", path) for path in config.recipe), *options.items()]
    words = [word for name, value in pairs for word in (f"--{name}", str(value))]
    print(f"training {run.folder.name}, {run.steps} steps", flush=True)
    result = subprocess.run([sys.executable, str(ROOT / "train" / "train_ldm.py"), *words])
    if result.returncode:
        raise ConfigError(f"training {run.folder} failed with exit code {result.returncode}; see its error above")
    for checkpoint in run.folder.glob("checkpoint-*"):  # 12 bytes per parameter; the pipeline has the final weights
        shutil.rmtree(checkpoint)


def run_grid(config: ArenaConfig, name: str) -> tuple[list[Run], Run]:
    """Train every shape of a model at every learning rate (or its known one); return all runs and the best one.

    The best run has the lowest held-out loss. A single combination is the best without a run.
    """
    runs = [
        make_run(config, name, shape, rate, config.seeds[0], grid=True)
        for shape, arguments in config.models[name].items()
        for rate in ([float(arguments["learning_rate"])] if "learning_rate" in arguments else config.learning_rates)
    ]
    if len(runs) == 1:
        return [], runs[0]
    for run in runs:
        train(config, run)
    best = min(runs, key=lambda run: run.curve[-1]["heldout_loss"])
    for run in runs:
        mark = "  <- selected" if run is best else ""
        loss, seconds = run.curve[-1]["heldout_loss"], run.seconds
        print(f"{run.folder.name:44} held-out loss {loss:.4f} after {run.steps} steps, {seconds:.0f} s{mark}")
    rates = [run.learning_rate for run in runs if run.shape == best.shape]
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)):
        print(f"{name}: the best learning rate {best.learning_rate:g} is at the edge of the grid; widen the grid")
    return runs, best


# --------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class Reference:
    """Real images, (N, 3, H, W) uint8, and their features."""

    train: Any
    heldout: Any
    train_features: Any
    heldout_features: Any
    class_counts: list[int]
    extractor: Any


def load_reference(config: ArenaConfig) -> Reference:
    """Load the images of both splits of the recipe's data and compute their features."""
    from iptv2_diffusion.evaluation.feature_extractors import efficientnet_lite0, extract_features

    recipe = read_recipe(config)
    with user_errors(ModuleNotFoundError, ValueError):
        extractor = efficientnet_lite0(config.encoder_size)
    splits = (recipe["train_split"], recipe["heldout_split"])
    (train, _), (heldout, labels) = (load_split(config, recipe, split) for split in splits)
    features = [extract_features(extractor, images.split(64))["pool"] for images in (train, heldout)]
    return Reference(train, heldout, *features, [labels.count(k) for k in range(max(labels) + 1)], extractor)


def load_split(config: ArenaConfig, recipe: dict[str, Any], split: str) -> tuple[Any, list[int]]:
    """Load the images (N, 3, H, W) uint8 and the labels of a split, without variants."""
    import datasets

    from iptv2_diffusion.data.images import ImageTensors, load_image_dataset

    with user_errors(OSError, ValueError):
        images = ImageTensors(load_image_dataset(recipe["data"], split=split), size=recipe["resolution"])
        indices = images.valid_indices()
        if config.variant_column:
            table = datasets.load_dataset(recipe["data"], split=split)
            if config.variant_column not in table.column_names:
                raise ConfigError(f"no column {config.variant_column!r}; use one of {', '.join(table.column_names)}")
            variants = table[config.variant_column]
            indices = [i for i in indices if not variants[i]]
        return images.pixels(indices), [images.labels[i] for i in indices]


def score(config: ArenaConfig, run: Run, reference: Reference) -> dict[str, float]:
    """Sample from a full run and compare the samples with both splits; scores.json caches the result."""
    import torch

    from iptv2_diffusion.evaluation import generation_metrics
    from iptv2_diffusion.evaluation.feature_extractors import extract_features
    from iptv2_diffusion.evaluation.generation_options import GenerationConfig
    from iptv2_diffusion.evaluation.sampling import generate, start_accelerator

    drawn = GenerationConfig(
        pipeline=str(run.folder / "pipeline"),
        num_samples=config.num_samples,
        class_counts=reference.class_counts,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        num_threads=config.num_threads,
    )
    folder = generate(drawn, start_accelerator(config.num_threads), run.folder / "samples")
    about = {
        "samples": [config.num_samples, folder.about()],
        "encoder": [reference.extractor.name, reference.extractor.sha256],
        "images": [len(reference.train), len(reference.heldout)],
    }
    path = folder.folder / "scores.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    if saved.get("about") == about:
        return saved["scores"]
    samples = torch.cat(list(folder.batches(config.num_samples)))
    features, heldout = extract_features(reference.extractor, samples.split(64))["pool"], reference.heldout_features
    distance, _ = generation_metrics.nearest_neighbour_distance(samples, reference.train)
    result = {
        "kid": generation_metrics.kid(features, heldout),
        "kid_error": generation_metrics.half_sample_error(lambda part: generation_metrics.kid(part, heldout), features),
        "fd_pca64": generation_metrics.frechet_distance_pca(features, heldout),
        "fd_train": generation_metrics.frechet_distance(features, reference.train_features),
        "nearest_neighbour_median": distance.median().item(),
        "sampling_seconds_per_image": folder.seconds_per_image(),
    }
    write_text(path, json.dumps({"about": about, "scores": result}, indent=1) + "\n")
    return result


def floors(reference: Reference) -> dict[str, float]:
    """Compute the same metrics for real images: training images against held-out images."""
    from iptv2_diffusion.evaluation import generation_metrics

    distance, _ = generation_metrics.nearest_neighbour_distance(reference.heldout, reference.train)
    features, heldout = reference.train_features, reference.heldout_features
    return {
        "heldout_images": len(reference.heldout),
        "train_images": len(reference.train),
        "encoder": reference.extractor.name,
        "encoder_sha256": reference.extractor.sha256,
        "kid_train_to_heldout": generation_metrics.kid(features, heldout),
        "fd_pca64_train_to_heldout": generation_metrics.frechet_distance_pca(features, heldout),
        "fd_train_half_to_half": generation_metrics.half_half_floor(features),
        "nearest_neighbour_median_heldout": distance.median().item(),
    }


# --------------------------------------------------------------------------------------------------------------------
# Results


def make_row(config: ArenaConfig, run: Run, cost: dict[str, Any], *, chosen: bool, scores: dict[str, float]) -> dict:
    last = run.curve[-1]
    return {
        "model": run.model,
        "size": config.size,
        "shape": run.shape,
        "seed": run.seed,
        "chosen": chosen,
        "learning_rate": run.learning_rate,
        **cost,
        "steps": run.steps,
        "seconds": round(run.seconds, 1),
        "step_seconds": round(run.step_seconds, 4),
        "held_out_loss": last["heldout_loss"],
        **{f"held_out_loss_t{q}": last[f"heldout_loss_t{q}"] for q in (0, 25, 50, 75)},
        "held_out_curve": [(line["step"], round(line["heldout_loss"], 5)) for line in run.curve],
        **scores,
    }


def write_results(config: ArenaConfig, rows: list[dict], reference: dict[str, Any] | None) -> Path:
    """Replace the rows of these shapes in the results file; write the machine and the recipe to NAME-about.json."""
    from iptv2_diffusion.evaluation.speed import describe_machine

    path = Path(config.results)
    beside = path.with_name(f"{path.stem}-about.json")
    with user_errors(OSError, ValueError):
        saved = json.loads(path.read_text()) if path.is_file() else []
        about = json.loads(beside.read_text()) if beside.is_file() else {}
    counted = {row["model"] for row in rows if row["chosen"]}
    earlier = [row for row in saved if row["size"] == config.size and row["chosen"] and row["model"] in counted]
    replaced = {(config.size, row["model"], row["shape"]) for row in rows + earlier}
    saved = [row for row in saved if (row["size"], row["model"], row["shape"]) not in replaced]
    about[" ".join([config.size, *sorted(config.models)])] = {
        **describe_machine(),
        "command": " ".join(["python", "eval/arena.py", *sys.argv[1:]]),
        "options": {k: v for k, v in vars(config).items() if k not in ("output_dir", "results", "stop_after")},
        "recipe": read_recipe(config),
        "reference": reference,
    }
    with user_errors(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(saved + rows, indent=1) + "\n")
        write_text(beside, json.dumps(about, indent=1) + "\n")
    return path


def main() -> int:
    config = parse_config(ArenaConfig, description=__doc__)
    costs = count_costs(config)
    for (name, shape), cost in costs.items():
        size, fused, trained = (f"{cost[kind] / 1e6:.3g} M" for kind in ("parameters", "macs_fused", "macs_train"))
        print(f"{name}/{shape}: {size} parameters, {fused} MACs, {trained} unfused in training", flush=True)
    check_equal(costs, config.tolerance)
    if config.stop_after == "count":
        return 0
    grids = {name: run_grid(config, name) for name in config.models}
    rows = [
        make_row(config, run, costs[run.model, run.shape], chosen=False, scores=dict.fromkeys(SCORES))
        for runs, _ in grids.values()
        for run in runs
    ]
    if config.stop_after == "grid":
        print(f"wrote {write_results(config, rows, None)}")
        return 0
    full = [
        make_run(config, name, best.shape, best.learning_rate, seed, grid=False)
        for seed in config.seeds
        for name, (_, best) in grids.items()
    ]
    for run in full:
        train(config, run)
    if config.stop_after == "train":
        return 0
    reference = load_reference(config)
    for run in full:
        scores = score(config, run, reference)
        rows.append(make_row(config, run, costs[run.model, run.shape], chosen=True, scores=scores))
        print(f"{run.folder.name}: held-out loss {rows[-1]['held_out_loss']:.4f}, {json.dumps(scores)}", flush=True)
    print(f"wrote {write_results(config, rows, floors(reference))}")
    return 0


if __name__ == "__main__":
    run_main(main)
