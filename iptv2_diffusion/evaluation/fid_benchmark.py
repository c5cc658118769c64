"""FID and related metrics of IPT-V2 and DiT pipelines: generate images (or reuse them), score, tabulate, plot."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.evaluation.feature_extractors import FeatureExtractor, extract_features, make_extractor
from iptv2_diffusion.evaluation.fid_options import BenchmarkConfig
from iptv2_diffusion.evaluation.generation_metrics import (
    frechet_distance,
    half_half_floor,
    half_sample_error,
    inception_score,
    kid,
    mean_kernel,
    precision_recall,
    principal_axes,
    statistics,
)
from iptv2_diffusion.evaluation.reference_images import ReferenceImages
from iptv2_diffusion.evaluation.sample_folder import SampleFolder
from iptv2_diffusion.evaluation.sampling import generate, start_accelerator
from iptv2_diffusion.training.accelerator import available_cores
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.options import config_to_dict

# GMACs and FID-50K on ImageNet 256×256 as the papers report them: ADM's protocol, 400 K steps, batch 256, no guidance
PUBLISHED = {
    "DiT (paper)": [(6.06, 68.4), (23.0, 43.5), (80.7, 23.3), (118.6, 19.5)],
    "SiT (paper)": [(23.0, 33.0), (80.7, 18.8), (118.6, 17.2)],
    "U-DiT (paper)": [(6.02, 31.5), (22.18, 16.6), (84.91, 10.1)],
}


# --------------------------------------------------------------------------------------------------------------------
# Check of the number of images


def check_numbers(config: BenchmarkConfig, extractors: list[FeatureExtractor], reference: ReferenceImages) -> None:
    """Raise a `ConfigError`, before sampling, if there are too few images for a metric.

    With at most D images, the covariance of D features is singular.
    """
    fewest = min(reference.count, *(e.generation.num_samples for e in config.entries()))
    if fewest < 4:
        raise ConfigError(f"there are {fewest} images to compare; use at least 4 samples and 4 references")
    for extractor in extractors:
        if config.pca_components > (most := min(reference.count - 1, extractor.dimensions)):
            raise ConfigError(
                f"pca_components is {config.pca_components}, but {reference.count} references of "
                f"{extractor.dimensions} features ({extractor.name}) allow {most}; lower it or give more references"
            )
        kept = "spatial" in extractor.heads and "pool" in reference.stored
        counts = {f"samples of {e.name}": e.generation.num_samples for e in config.entries()}
        counts |= {} if kept else {"references": reference.count}
        for what, count in counts.items():
            if count <= extractor.dimensions and not config.allow_small_n:
                raise ConfigError(
                    f"{count} {what} for {extractor.dimensions} features of {extractor.name}: a Fréchet distance of "
                    f"fewer than {extractor.dimensions + 1} is mostly bias; use more images, or --allow_small_n with "
                    f"KID and the distance in {config.pca_components} principal components"
                )


# --------------------------------------------------------------------------------------------------------------------
# Scores


class Scorer:
    """Reference features of one encoder, and the scores of samples against them."""

    def __init__(self, extractor: FeatureExtractor, reference: ReferenceImages, config: BenchmarkConfig) -> None:
        self.extractor, self.config = extractor, config
        real = extract_features(extractor, reference.batches())
        stored = reference.stored if "spatial" in extractor.heads else {}
        self.statistics = {name: stored.get(name) or statistics(real[name]) for name in real if name != "logits"}
        pool = real["pool"]
        self.axes = principal_axes(pool, config.pca_components)
        self.projected = statistics(pool.double() @ self.axes)
        self.within = mean_kernel(pool)
        self.real = pool
        chosen = torch.linspace(0, len(pool) - 1, min(len(pool), config.precision_recall_references)).long()
        self.manifold = pool[chosen]

    def metrics(self) -> dict[str, Callable[[Tensor], float]]:
        """Return name -> function of (N, D) sample features, for the metrics with a standard error."""
        return {
            "fd": lambda pool: frechet_distance(pool, self.statistics["pool"]),
            "fd_pca": lambda pool: frechet_distance(pool.double() @ self.axes, self.projected),
            "kid": lambda pool: kid(pool, self.real, self.within),
        }

    def score(self, features: dict[str, Tensor]) -> dict[str, float]:
        """Compute all metrics of an encoder, with standard errors over the choice of the samples."""
        pool, repeats = features["pool"], self.config.repeats
        result = {name: metric(pool) for name, metric in self.metrics().items()}
        if repeats:
            result |= {f"{name}_error": half_sample_error(m, pool, repeats) for name, m in self.metrics().items()}
        result["precision"], result["recall"] = precision_recall(pool, self.manifold)
        if "spatial" in features:
            result["sfid"] = frechet_distance(features["spatial"], self.statistics["spatial"])
            result["inception_score"] = inception_score(features["logits"])
        return result

    def floor(self) -> dict[str, float]:
        """Compute the metrics between two halves of the reference: no model can be shown to score better."""

        def in_components(a: Tensor, b: Tensor) -> float:
            return frechet_distance(a.double() @ self.axes, b.double() @ self.axes)

        metrics = {"fd": frechet_distance, "fd_pca": in_components, "kid": kid}
        return {"count": len(self.real) // 2} | {n: half_half_floor(self.real, m) for n, m in metrics.items()}


def describe(config: BenchmarkConfig, extractors: list[FeatureExtractor], reference: ReferenceImages) -> dict[str, Any]:
    """Describe all settings, except the images, that determine the metrics."""
    packages = ("torch", "torchvision", "diffusers", "torch-fidelity", "numpy", "pillow")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "config": config_to_dict(config),
        "reference": {
            "source": reference.source,
            "split": config.reference_split,
            "count": reference.count,
            "sha256": reference.sha256(),
            "statistics": "stored in the file" if reference.stored else "of these images",
            "preparation": reference.preparation,
        },
        "images": "8-bit RGB: round(255 x), PNG; scored as they were saved",
        "precision": "float32 encoders; statistics, distances and KID in float64",
        "extractors": {
            e.name: {"sha256": e.sha256, "dimensions": e.dimensions, "preprocessing": e.preprocessing}
            for e in extractors
        },
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
    }


# --------------------------------------------------------------------------------------------------------------------
# Table and plot


def title(extractor: str) -> str:
    """Return "FID" for Inception; the name of any other Fréchet distance contains its encoder."""
    return "FID" if extractor.startswith("inception") else f"FD ({extractor})"


def table(results: dict[str, Any]) -> str:
    """Format a Markdown table with one row per model, followed by the floors."""
    names = list(results["extractors"])
    components = results["config"]["pca_components"]
    columns = ["model", "M parameters", "GMACs", "training steps", "guidance", "images", "s/image"]
    for name in names:
        columns += [title(name), f"PCA-{components}", "KID", "precision", "recall"]
        columns += ["sFID", "IS"] if name.startswith("inception") else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in results["models"]:
        steps = "" if row["training_steps"] is None else f"{row['training_steps']:,}"
        cells = [row["name"], f"{row['parameters'] / 1e6:.1f}", f"{row['gmacs']:.3g}", steps]
        cells += [f"{row['guidance_scale']:g}", f"{row['num_samples']:,}", f"{row['seconds_per_image']:.3g}"]
        for name in names:
            s = row["scores"][name]
            cells += [with_error(s, "fd"), with_error(s, "fd_pca"), with_error(s, "kid", digits=4)]
            cells += [f"{s['precision']:.3f}", f"{s['recall']:.3f}"]
            cells += [f"{s['sfid']:.2f}", f"{s['inception_score']:.2f}"] if "sfid" in s else []
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name in names:
        f = results["floor"][name]
        lines.append(
            f"Floor of {title(name)}, half of the reference against the other ({f['count']:,} images each): "
            f"{f['fd']:.2f}; PCA-{components} {f['fd_pca']:.2f}; KID {f['kid']:.4f}."
        )
    return "\n".join(lines) + "\n"


def with_error(scores: dict[str, float], name: str, digits: int = 2) -> str:
    """Format a value with its standard error, if it has one."""
    text = f"{scores[name]:.{digits}f}"
    return f"{text} ± {scores[f'{name}_error']:.{digits}f}" if f"{name}_error" in scores else text


def plot(results: dict[str, Any], path: Path, published: bool) -> None:
    """Plot the first encoder's Fréchet distance over GMACs and, if known, over training hours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = next(iter(results["extractors"]))
    axes_of = {"gmacs": "GMACs of a forward pass", "training_hours": "hours of training"}
    known = {key: [r for r in results["models"] if r[key] is not None] for key in axes_of}
    known = {key: rows for key, rows in known.items() if rows}
    figure, panels = pyplot.subplots(1, len(known), figsize=(6 * len(known), 4.5), squeeze=False)
    for panel, (key, rows) in zip(panels[0], known.items(), strict=True):
        for row in rows:
            s = row["scores"][name]
            panel.errorbar(row[key], s["fd"], yerr=s.get("fd_error"), fmt="o", capsize=3, label=row["name"])
        if published and key == "gmacs" and title(name) == "FID":
            for label, points in PUBLISHED.items():
                panel.plot(*zip(*points, strict=True), "--x", color="grey", alpha=0.7, label=label)
        panel.axhline(results["floor"][name]["fd"], color="black", lw=0.8, ls=":", label="half/half floor")
        panel.set(xlabel=axes_of[key], ylabel=title(name), xscale="log", yscale="log")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------------------------
# Running


def evaluate(
    config: BenchmarkConfig, extractors: list[FeatureExtractor], reference: ReferenceImages, folders: list[SampleFolder]
) -> dict[str, Any]:
    """Score all models and describe the settings that determine the scores."""
    with user_errors(ValueError):
        scorers = {extractor.name: Scorer(extractor, reference, config) for extractor in extractors}
    rows = []
    for entry, folder in zip(config.entries(), folders, strict=True):
        about, count = folder.about(), entry.generation.num_samples
        row = {"name": entry.name, "training_steps": entry.training_steps, "training_hours": entry.training_hours}
        row |= {"num_samples": count, "guidance_scale": entry.generation.guidance_scale}
        row |= {key: about["recipe"][key] for key in ("parameters", "gmacs")}
        row |= {"seconds_per_image": folder.seconds_per_image(), "generation": about, "scores": {}}
        for name, scorer in scorers.items():
            with user_errors(ValueError):
                row["scores"][name] = scorer.score(extract_features(scorer.extractor, folder.batches(count)))
            print(f"{entry.name}: {title(name)} {with_error(row['scores'][name], 'fd')}", flush=True)
        rows.append(row)
    floors = {name: scorer.floor() for name, scorer in scorers.items()}
    return {**describe(config, extractors, reference), "floor": floors, "models": rows}


def made_before_records(folder: Path) -> list[str] | None:
    """Return the results that a version without records wrote; None if the folder is something else."""
    names = [name for name in ("results.json", "results.md", "fid.png") if (folder / name).is_file()]
    return names if names or any(folder.glob("*/generation.json")) else None


def run_benchmark(config: BenchmarkConfig) -> int:
    """Generate with all processes, score with the main process, write the results; returns the exit code."""
    accelerator = start_accelerator(config.num_threads)
    with user_errors(OSError, ValueError, ModuleNotFoundError):
        extractors = [make_extractor(name, config.inception_weights) for name in config.extractors]
        reference = ReferenceImages(config.reference, split=config.reference_split, size=config.resolution)
    extractors = [extractor.to(accelerator.device) for extractor in extractors]
    check_numbers(config, extractors, reference)
    with user_errors(OSError, ValueError):
        if accelerator.is_main_process:
            OwnFolder.claim(Path(config.output_dir), "benchmark results", earlier=made_before_records)
    output_dir, folders = Path(config.output_dir), []
    for entry in config.entries():
        accelerator.print(f"{entry.name}: {entry.generation.num_samples} images of {entry.generation.pipeline}")
        folders.append(generate(entry.generation, accelerator, output_dir / entry.name))
    main_process = accelerator.is_main_process
    accelerator.end_training()  # the other processes must not wait while the main process scores
    if not main_process:
        return 0
    torch.set_num_threads(available_cores())  # for sampling, the processes shared the cores
    results = evaluate(config, extractors, reference, folders)
    text = f"`{results['command']}`\n\n{table(results)}"
    own = OwnFolder(output_dir, "benchmark results")
    with user_errors(OSError, ValueError):
        with own.writing("results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        with own.writing("results.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        with own.writing("fid.png") as temporary:
            plot(results, temporary, config.published)
    print(text)
    print(f"wrote results.json, results.md and fid.png to {output_dir}/")
    return 0
