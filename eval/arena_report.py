"""Make tables and plots of the results of `eval/arena.py`.

    python eval/arena_report.py --results docs/results/arena-emoji64.json

The script prints a Markdown table. Next to the results file it writes plots of the held-out loss over steps and over
seconds and, if the folder of the runs exists, samples of all models side by side. The seconds of a curve are its steps
times the seconds of a step without other load, so that other processes do not affect them.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors
from iptv2_diffusion.training.options import Config, option
from iptv2_diffusion.training.parsing import parse_config

METRICS = {
    "held_out_loss": "held-out loss",
    "kid": "KID",
    "fd_pca64": "FD-PCA64",
    "fd_train": "FD to train",
    "nearest_neighbour_median": "nearest neighbour",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Options of the report."""

    results: str = option("docs/results/arena-emoji64.json", "file of results, written by eval/arena.py")
    runs: str = option("runs/arena-emoji64", "folder of the runs, for the sample grids")
    columns: int = option(12, "number of samples of each model", at_least=1)


Group = dict[tuple[str, str], list[dict[str, Any]]]


def full_runs(results: list[dict[str, Any]]) -> Group:
    """Group the full runs of the selected shapes by (size, model)."""
    groups: Group = {}
    for row in results:
        if row["chosen"]:
            groups.setdefault((row["size"], row["model"]), []).append(row)
    return groups


def mean_curve(rows: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return the steps that all seeds have, and the mean, minimum and maximum held-out loss over the seeds there."""
    curves = [dict(map(tuple, row["held_out_curve"])) for row in rows]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    return steps, [statistics.mean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def step_seconds(rows: list[dict[str, Any]]) -> float:
    """Return the seconds of a step of the fastest run."""
    return min(row["step_seconds"] for row in rows)


def loss_at(rows: list[dict[str, Any]], seconds: float) -> float | None:
    """Interpolate the mean held-out loss after `seconds` of training; None outside the curve."""
    import numpy as np

    steps, mean, _, _ = mean_curve(rows)
    times = [step * step_seconds(rows) for step in steps]
    return float(np.interp(seconds, times, mean)) if times[0] <= seconds <= times[-1] else None


def spread(values: list[float]) -> str:
    """Format the mean, and the minimum and maximum if there are several values."""
    digits = 4 if abs(values[0]) < 10 else 1
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(groups: Group) -> str:
    """Format a Markdown table with a row for each size and model."""
    from iptv2_diffusion.evaluation.speed import to_markdown

    lines = []
    for (size, model), rows in groups.items():
        first = rows[0]
        line = {
            "size": size,
            "model": f"{model} ({first['shape']}, lr {first['learning_rate']:g})",
            "seeds": len(rows),
            "parameters": f"{first['parameters'] / 1e6:.2f} M",
            "MACs fused / trained": f"{first['macs_fused'] / 1e6:.1f} / {first['macs_train'] / 1e6:.1f} M",
            "steps": first["steps"],
            "ms per step": f"{1e3 * step_seconds(rows):.0f}",
        }
        lines.append(line | {title: spread([row[name] for row in rows]) for name, title in METRICS.items()})
    return to_markdown(lines, list(lines[0]))


def equal_time(groups: Group) -> str:
    """Compare the held-out losses at equal training time: that of the faster of IPT-V2 and DiT."""
    lines = []
    for size in dict.fromkeys(size for size, _ in groups):
        pair = {name: groups.get((size, name)) for name in ("iptv2", "dit")}
        if not all(pair.values()):
            continue
        totals = {name: rows[0]["steps"] * step_seconds(rows) for name, rows in pair.items()}
        seconds = min(totals.values())
        losses = {name: loss_at(rows, seconds) for name, rows in pair.items()}
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        lines.append(f"- {size}, held-out loss after {seconds:.0f} s of training each: {shown}")
    return "\n".join(lines)


def plot(groups: Group, path: Path) -> None:
    """Plot the held-out loss over steps and over seconds, with a band from minimum to maximum over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(size for size, _ in groups))
    figure, axes = plt.subplots(len(sizes), 2, figsize=(10, 3.6 * len(sizes)), squeeze=False)
    for (size, model), rows in groups.items():
        steps, mean, low, high = mean_curve(rows)
        for column, scale, unit in ((0, 1.0, "steps"), (1, step_seconds(rows), "seconds without other load")):
            axis = axes[sizes.index(size), column]
            x = [step * scale for step in steps]
            (line,) = axis.plot(x, mean, label=f"{model}, {len(rows)} seeds")
            axis.fill_between(x, low, high, alpha=0.2, color=line.get_color())
            axis.set(xlabel=unit, ylabel="held-out loss", title=size, yscale="log")
            axis.legend()
            axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sheets(groups: Group, config: ReportConfig, folder: Path) -> list[Path]:
    """Write one grid of samples per size, a row per model. Samples of a column have the same class and noise."""
    from PIL import Image

    from iptv2_diffusion.evaluation.pictures import picture_sheet

    written = []
    for size in dict.fromkeys(size for size, _ in groups):
        rows, names = [], []
        for (own_size, model), runs in groups.items():
            run = runs[0]
            name = f"{model}-{run['shape']}-lr{run['learning_rate']:g}-seed{run['seed']}"
            images = Path(config.runs).expanduser() / size / "full" / name / "samples" / "images"
            if own_size == size and images.is_dir():
                # The class changes from one sample to the next, so every 48th sample shows most classes.
                rows.append([Image.open(p) for p in sorted(images.glob("*.png"))[::48][: config.columns]])
                names.append(model)
        if rows:
            written.append(folder / f"arena-samples-{size}.png")
            picture_sheet(rows, names).save(written[-1])
    return written


def main() -> int:
    """Read the results, write the plots, print the table."""
    config = parse_config(ReportConfig, description=__doc__)
    path = Path(config.results)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; eval/arena.py writes it")
    with user_errors(OSError, ValueError):
        results = json.loads(path.read_text())
    groups = full_runs(results)
    if not groups:
        raise ConfigError(f"{path} has no full runs; run eval/arena.py to completion first")
    curves = path.with_name(path.stem + "-curves.png")
    longest = {
        size: max(rows[0]["steps"] for (other, _), rows in groups.items() if other == size) for size, _ in groups
    }
    shown = {key: rows for key, rows in groups.items() if rows[0]["steps"] == longest[key[0]]}  # no short ablations
    plot(shown, curves)
    text = table(groups) + "\n" + equal_time(groups)
    print(text)
    for written in (curves, *sheets(shown, config, path.parent)):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    run_main(main)
