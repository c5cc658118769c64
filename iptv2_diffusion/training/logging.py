"""Output of a run: progress bar, metrics.jsonl, TensorBoard or wandb (through accelerate), plot of the loss curve."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from iptv2_diffusion.files import write_text
from iptv2_diffusion.training.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def available_trackers(report_to: str) -> tuple[list[str], list[str]]:
    """Return the usable trackers of 'tensorboard', 'wandb', 'all' or 'none', and messages about the others."""
    wanted = {"none": [], "all": ["tensorboard", "wandb"]}.get(report_to, [w.strip() for w in report_to.split(",")])
    for name in wanted:
        if name not in ("tensorboard", "wandb"):
            raise ConfigError(f"report_to is {report_to!r}; choose tensorboard, wandb, all or none")
    usable = [name for name in wanted if importlib.util.find_spec(name) is not None]
    missing = [f"{name} is not installed: `pip install {name}` to log there" for name in wanted if name not in usable]
    return usable, missing if report_to != "all" else []


def log_picture(accelerator: Accelerator, name: str, path: Path | None, step: int) -> None:
    """Send an image file to the trackers of the main process; nothing for None."""
    if path is None or not accelerator.is_main_process or not accelerator.trackers:
        return
    import numpy as np  # late: --help needs neither
    from PIL import Image

    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=step, **layout)


class MetricLog:
    """metrics.jsonl: one JSON object per line, always with "step" and "time" (seconds since the epoch).

    Each line is flushed, so a kill loses none. On resumption the lines after the resumed step are dropped, so the file
    reads as if the run had never stopped. If that step must still be evaluated, its lines without a training loss are
    dropped too.
    """

    def __init__(
        self, path: str | Path, *, resumed_step: int = 0, evaluated: bool = True, enabled: bool = True
    ) -> None:
        self.path, self.enabled = Path(path), enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_metrics(self.path) if resumed_step else []
            kept = [row for row in rows if row["step"] < resumed_step + (evaluated or "loss" in row)]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. NaN and infinity become null, because JSON does not have them."""
        if not self.enabled:
            return
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a last line that a kill cut short."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


class ProgressBar:
    """tqdm bar with images/s, loss, learning rate and time left, on the main process only.

    With a time budget, the number of steps is estimated from the fraction of the time that has passed.
    """

    def __init__(self, total: int, *, initial: int, batch_size: int, enabled: bool = True) -> None:
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(
            total=total, initial=initial, disable=not enabled, bar_format=layout, desc="training", dynamic_ncols=True
        )
        self._batch_size = batch_size
        self._window: list[tuple[float, int]] = [(time.perf_counter(), initial)]

    @property
    def images_per_second(self) -> float:
        """Images per second over about the last 20 steps, without pauses for evaluation (see `pause`)."""
        (start, first), (end, last) = self._window[0], self._window[-1]
        return (last - first) * self._batch_size / (end - start) if end > start else 0.0

    def update(self, step: int, values: Mapping[str, float], fraction: float = 0.0) -> None:
        """Show that `step` steps are done. `fraction` is the part of a time budget that has passed, 0 without one."""
        self._window = [*self._window[-20:], (time.perf_counter(), step)]
        if fraction > 0:
            self._bar.total = max(step, round(step / fraction))
        shown = {"img/s": f"{self.images_per_second:.0f}", **{k: f"{v:.4g}" for k, v in values.items()}}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def pause(self) -> None:
        """Exclude the time since the last step (evaluation, saving) from the training speed."""
        now, (last, _) = time.perf_counter(), self._window[-1]
        self._window = [(moment + now - last, step) for moment, step in self._window]

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            tqdm.write(message)

    def close(self) -> None:
        """Close the bar and keep its last state on the screen."""
        self._bar.close()


def plot_curves(
    metrics_path: str | Path,
    picture_path: str | Path,
    *,
    curves: Sequence[str] = ("loss", "heldout_loss"),
    title: str = "",
) -> bool:
    """Plot curves of metrics.jsonl over the steps, with running means of noisy ones. Returns False without data."""
    rows = read_metrics(metrics_path)
    series = {name: _points(rows, name) for name in curves}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return False
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", title=title)
    for index, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        colour, many = f"C{index}", len(points) >= 60
        axes.plot(steps, values, color=colour, alpha=0.25 if many else 1.0, label=None if many else name, marker=".")
        if many:
            axes.plot(steps, _running_mean(values), color=colour, label=f"{name} (running mean)")
    finite = [value for points in series.values() for _, value in points]
    if min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture_path, dpi=110)
    return True


def _points(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _running_mean(values: Sequence[float], share: float = 0.04) -> list[float]:
    half = max(1, round(len(values) * share / 2))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
