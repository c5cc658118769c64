"""The arena: IPT-V2 and DiT trained, sampled and scored side by side at equal MACs, by one recipe.

    python eval/arena.py --config configs/arena/emoji64/small.yaml
    python eval/arena.py --config configs/arena/emoji64/small.yaml --stop_after grid

Every model may come in several shapes (DiT: patch 2 and patch 1). A short run of each shape at each learning rate of one
grid tells which of them counts ("chosen"); that one is trained in full from every seed. Runs are those of
`train/train_ldm.py`, one after another, in OUTPUT_DIR/SIZE; the same command resumes, and never trains a finished run again.
Then samples of every full run are scored: see `iptv2_diffusion/metrics/generation.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from iptv2_diffusion.training.config import option, parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03  # of MACs, between the models of one size


@dataclass(kw_only=True)
class ArenaConfig:
    """One size of the arena."""

    size: str = option("small", "name of this size in the results")
    recipe: str = option("configs/arena/emoji64/recipe.yaml", "a train_ldm.py configuration that all models share")
    models: dict = option({}, "JSON or YAML: model -> shape -> preset (`model`) and overrides")  # noqa: RUF009
    learning_rates: list[float] = option([1e-3, 2e-3, 4e-3], "the grid, the same for every shape")  # noqa: RUF009
    grid_steps: int = option(1000, "steps of a run of the grid")
    max_train_steps: int = option(4000, "steps of a full run")
    seeds: list[int] = option([0, 1, 2], "of the full runs; the grid uses the first")  # noqa: RUF009
    num_threads: int = option(1, "CPU threads of a run")
    stop_after: Literal["count", "grid", "train", "score"] = option(
        "score", "count: only compare MACs; grid: the short runs; train: the full ones; score: all"
    )
    output_dir: str = option("runs/arena-emoji64", "folder of the runs")
    results: str = option("docs/results/arena-emoji64.json", "rows of this size are replaced in this file")

    def validate(self) -> None:
        for name in ("learning_rates", "seeds", "models"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")
        for name in ("grid_steps", "max_train_steps", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class Run:
    """One training run of the arena."""

    model: str
    shape: str
    learning_rate: float
    seed: int
    steps: int
    folder: Path
    costs: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    @property
    def curve(self) -> list[dict[str, float]]:
        """The lines with a held-out loss, up to the last step of this run."""
        return [line for line in self.log if "heldout_loss" in line and line["step"] <= self.steps]

    @property
    def finished(self) -> bool:
        return (self.folder / "pipeline" / "model_index.json").is_file() and self.curve[-1]["step"] >= self.steps

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent in training steps."""
        return max(line.get("seconds", 0.0) for line in self.log)


def count_costs(config: ArenaConfig) -> dict[tuple[str, str], dict[str, Any]]:
    """Parameters and MACs (fused, and as trained) of each (model, shape)."""
    from iptv2_diffusion.models.presets import count_macs, count_parameters, create_model

    batch_size = read_recipe(config)["batch_size"]
    costs = {}
    for name, shapes in config.models.items():
        for shape, arguments in shapes.items():
            with user_errors(ValueError, TypeError, KeyError):
                model = create_model(**rename(arguments))
            fused = model.fuse() if hasattr(model, "fuse") else model
            costs[name, shape] = {
                "parameters": count_parameters(model),
                "macs_fused": count_macs(fused),
                "macs_train": count_macs(model, batch_size=batch_size),
            }
    return costs


def rename(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a shape as `create_model` takes them."""
    return {"name" if key == "model" else key: value for key, value in arguments.items()}


def read_recipe(config: ArenaConfig) -> dict[str, Any]:
    from iptv2_diffusion.training.config import config_to_dict
    from iptv2_diffusion.training.ldm_config import LDMConfig

    return config_to_dict(parse_config(LDMConfig, ["--config", config.recipe]))


def check_equal(costs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """An error for a shape whose MACs are neither the first one's fused nor its training MACs, within 3 %."""
    first = next(iter(costs))
    for shape, cost in costs.items():
        off = min(abs(cost["macs_fused"] / costs[first][kind] - 1) for kind in ("macs_fused", "macs_train"))
        if off > TOLERANCE:
            raise ConfigError(
                f"{'/'.join(shape)} has {cost['macs_fused'] / 1e6:.2f} M MACs, {'/'.join(first)} has "
                f"{costs[first]['macs_fused'] / 1e6:.2f} M: {100 * off:.1f} % apart, {100 * TOLERANCE:.0f} are allowed; "
                "change widths or layers"
            )


def make_run(config: ArenaConfig, name: str, shape: str, learning_rate: float, seed: int, *, grid: bool) -> Run:
    kind = "grid" if grid else "full"
    folder = Path(config.output_dir).expanduser() / config.size / kind / f"{name}-{shape}-lr{learning_rate:g}-seed{seed}"
    return Run(name, shape, learning_rate, seed, config.grid_steps if grid else config.max_train_steps, folder)


def train(config: ArenaConfig, run: Run) -> None:
    """Run `train_ldm.py`, or nothing if it has run; a killed one goes on from its checkpoint."""
    if run.finished:
        return
    arguments = dict(config.models[run.model][run.shape])
    preset = arguments.pop("model")
    options = {
        "config": config.recipe,
        "model": preset,
        "model_overrides": json.dumps(arguments),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "max_train_steps": run.steps,
        "num_threads": config.num_threads,
        "output_dir": run.folder,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    print(f"training {run.folder.name}, {run.steps} steps", flush=True)
    result = subprocess.run([sys.executable, str(ROOT / "train" / "train_ldm.py"), *words])
    if result.returncode:
        raise ConfigError(f"training {run.folder} ended with {result.returncode}; its error stands above")
    for checkpoint in run.folder.glob("checkpoint-*"):  # 12 bytes a parameter, and the pipeline has the result
        shutil.rmtree(checkpoint)


def run_grid(config: ArenaConfig, name: str) -> tuple[list[Run], Run]:
    """The short runs of all shapes of a model at all rates, and the one of the lowest held-out loss."""
    runs = [
        make_run(config, name, shape, rate, config.seeds[0], grid=True)
        for shape in config.models[name]
        for rate in config.learning_rates
    ]
    for run in runs:
        train(config, run)
    best = min(runs, key=lambda run: run.curve[-1]["heldout_loss"])
    for run in runs:
        mark = "  <- counts" if run is best else ""
        loss, seconds = run.curve[-1]["heldout_loss"], run.seconds
        print(f"{run.folder.name:44} held-out loss {loss:.4f} after {run.steps} steps, {seconds:.0f} s{mark}")
    edges = (min(config.learning_rates), max(config.learning_rates))
    if len(config.learning_rates) > 1 and best.learning_rate in edges:
        print(f"{name}: the best rate {best.learning_rate:g} is at the edge of the grid; widen it")
    return runs, best


def main() -> int:
    config = parse_config(ArenaConfig, description=__doc__)
    costs = count_costs(config)
    for (name, shape), cost in costs.items():
        print(
            f"{name}/{shape}: {cost['parameters'] / 1e6:.3f} M parameters, {cost['macs_fused'] / 1e6:.2f} M MACs fused, "
            f"{cost['macs_train'] / 1e6:.2f} M in training"
        )
    check_equal(costs)
    if config.stop_after == "count":
        return 0
    for name in config.models:
        run_grid(config, name)
    return 0


if __name__ == "__main__":
    run_main(main)
