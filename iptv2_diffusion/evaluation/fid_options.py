"""The options of `iptv2-fid`: the models, the reference and the metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from iptv2_diffusion.evaluation.generation_options import GenerationConfig
from iptv2_diffusion.files import inside
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.options import option
from iptv2_diffusion.training.parsing import coerce_fields


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(GenerationConfig):
    """Options of the models, the reference and the metrics."""

    models: list[dict] = option(  # noqa: RUF009
        [],
        "pipelines to compare, each with its own options of images and sampler, name, training_steps and "
        "training_hours; empty: one pipeline, with the options here",
        group="run",
    )
    output_dir: str = option("runs/benchmark", "folder for the images and the results", free=True)
    reference: str = option(
        "data/emoji64", "reference images: a folder, a data set, or ADM's .npz with its stored statistics"
    )
    reference_split: str = option("train", "split of a reference data set")
    resolution: int = option(
        64, "size to which reference images are cropped, as by ADM; an .npz has its own", at_least=1
    )
    extractors: list[str] = option(  # noqa: RUF009
        ["inception"],
        "encoders to score with: inception, efficientnet-lite0 (or efficientnet-lite0@64), dinov2 (or "
        "dinov2:NAME_OR_FOLDER)",
        nonempty=True,
    )
    inception_weights: str | None = option(None, "local copy of Inception's weights; none: download them")
    allow_small_n: bool = option(
        False, "allow fewer samples or references than features, although the distance is then mostly bias"
    )
    pca_components: int = option(64, "number of components of the low-dimensional Fréchet distance", at_least=1)
    precision_recall_references: int = option(
        10_000, "largest number of references for precision and recall (ADM: 10,000)", at_least=1
    )
    repeats: int = option(20, "number of half samples for the standard errors; 0: no errors", at_least=0)
    published: bool = option(
        False, "also plot the ImageNet 256 figures of the papers, if the first encoder is Inception"
    )

    def validate(self) -> None:
        super().validate()
        if self.repeats == 1:
            raise ConfigError("repeats is 1; a standard error needs at least 2, and 0 disables it")
        names = [entry.name for entry in self.entries()]
        if len(set(names)) < len(names):
            raise ConfigError(f"models share a name: {', '.join(sorted(n for n in names if names.count(n) > 1))}")

    def entries(self) -> list[Entry]:
        """Return the models. The options of each model replace the common ones."""
        return [Entry.of(self, entry) for entry in self.models or [{}]]


@dataclass(frozen=True)
class Entry:
    """One row of the table: options of the samples, and facts about the training."""

    name: str
    generation: GenerationConfig
    training_steps: int | None
    training_hours: float | None

    @classmethod
    def of(cls, config: BenchmarkConfig, options: dict[str, Any]) -> Entry:
        """Create an entry from an item of `models`.

        If the item does not state the training steps and hours, they come from the log of the run of
        train_ldm.py that contains the pipeline.
        """
        options = dict(options)
        facts = {key: options.pop(key, None) for key in ("name", "training_steps", "training_hours")}
        common = GenerationConfig(**{f.name: getattr(config, f.name) for f in fields(GenerationConfig)})
        generation = replace(common, **coerce_fields(GenerationConfig, options, "models"))
        path = Path(generation.pipeline)
        logged = [row for row in read_metrics(path.parent / "metrics.jsonl") if "seconds" in row]
        steps, hours = facts["training_steps"], facts["training_hours"]
        if logged:
            steps = logged[-1]["step"] if steps is None else steps
            hours = logged[-1]["seconds"] / 3600 if hours is None else hours
        run = path.parent.name if path.name == "pipeline" else path.name
        name = str(facts["name"] or f"{run}-cfg{generation.guidance_scale:g}")
        try:
            inside(Path(config.output_dir), name)
        except ValueError as error:
            raise ConfigError(f"models: {error}") from error
        return cls(name, generation, steps, hours)
