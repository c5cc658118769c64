"""Measure the time, memory and FLOP/s of a forward pass and of a training step, for several models in turn.

    python eval/throughput.py --quick                      # ratios to DiT in a minute
    python eval/throughput.py --models emoji64-s,dit-emoji64-s --batch_size 32 --num_threads 2
    python eval/throughput.py --models iptv2-s,unet-s,dit-s-2 --latent_size 32,64,128 --batch_size 1,4,32 \\
        --num_threads 1,2 --forms fused,unfused,compiled --memory --output_dir runs/throughput
    python eval/throughput.py --models restoration-s --megapixels 0.25,1,4,16 --tiles none,512
    python eval/throughput.py --operators --modes inference --batch_size 4 --num_threads 1
    python eval/throughput.py --device cuda --models iptv2-s,dit-s-2 --batch_size 1,64 --forms fused,compiled --memory

A model is a preset, `unet-s` (diffusers' UNet2DModel with about the MACs of DiT-S/2), or one of these with other
arguments, such as `iptv2-s:conditioning_dim=64`. Models take turns in one process. After a warm-up round, the script
reports the median, minimum and maximum over the rounds, and the median ratio to the last model of the list. The same
run measures the machine's rate of matrix products, which is the upper limit. The last line of the output is JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iptv2_diffusion.training.errors import ConfigError, UserError, run_main, user_errors
from iptv2_diffusion.training.options import Config, option
from iptv2_diffusion.training.parsing import parse_config


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(Config):
    """Options of the measurement. Lists are separated by commas; every combination is a row."""

    models: str = option(
        "emoji64-s,dit-emoji64-s", "names, separated by commas; the others are compared with the last one"
    )
    modes: tuple[Literal["inference", "training"], ...] = option(
        ("training", "inference"), "what to time: training (a forward and a backward pass), inference"
    )
    forms: tuple[Literal["fused", "unfused", "compiled"], ...] = option(
        ("fused",),
        "forms of the model in inference: fused, unfused (branch by branch), compiled (fused, torch.compile)",
    )
    batch_size: tuple[int, ...] = option((32,), "number of samples per step", at_least=1, nonempty=True)
    latent_size: tuple[int, ...] = option((), "side of the latents; empty: the size of each model", at_least=1)
    precisions: tuple[Literal["float32", "bfloat16", "float16"], ...] = option(
        ("float32", "bfloat16"), "autocast precisions; float32: no autocast"
    )
    device: Literal["cpu", "cuda"] = option(
        "cpu", "device that runs the models; on a GPU, times include synchronisation"
    )
    kernels: Literal["auto", "off"] = option("auto", "fast forms of kernels/; off: the plain formulas")
    cuda_graphs: bool = option(False, "replay steps as CUDA graphs, so that kernel launches take no time")
    allow_tf32: bool = option(False, "let a GPU multiply float32 matrices in TF32 (10 bits of mantissa)")
    num_threads: tuple[int, ...] = option((2,), "CPU threads", at_least=1, nonempty=True)
    rounds: int = option(7, "number of timed rounds, after one warm-up", at_least=1)
    clock: Literal["wall", "cpu"] = option(
        "wall",
        "clock to read; cpu: CPU seconds, summed over all threads, for a shared machine; use it with one thread",
    )
    memory: bool = option(False, "also measure the peak memory of each row, in a separate process")
    memory_only: bool = option(False, "measure the peak memory of the first row and time nothing")
    operators: bool = option(False, "print a table of times by kind of operator instead")
    megapixels: tuple[float, ...] = option(
        (), "time the restoration of images of this many megapixels instead", above=0
    )
    tiles: tuple[str, ...] = option(
        ("none", "512"), "sides of the tiles, with megapixels; none: the whole image at once"
    )
    output_dir: str | None = option(None, "folder for rows.csv, rows.md and plots; none: only print")
    quick: bool = option(
        False,
        "compare iptv2-s with dit-s-2 (inference, batch 4) and emoji64-s with dit-emoji64-s (training, batch 64), in "
        "float32 only",
    )

    @property
    def seconds(self) -> Callable[[], float]:
        """The function that reads the clock, in seconds."""
        if self.device == "cuda":
            return waiting_clock
        return {"wall": time.perf_counter, "cpu": time.process_time}[self.clock]

    @property
    def names(self) -> list[str]:
        return re.split(r",(?![^\[]*\])", self.models)  # commas inside brackets belong to a model's arguments

    def validate(self) -> None:
        for tile in self.tiles:
            if tile != "none" and not tile.isdecimal():
                raise ConfigError(f"tiles has {tile!r}; use a number of pixels, or none")
        if self.device == "cuda" and self.clock == "cpu":
            raise ConfigError("clock cpu does not count the time of a GPU; use --clock wall with --device cuda")
        if self.cuda_graphs and self.device != "cuda":
            raise ConfigError("cuda_graphs needs a GPU; add --device cuda")
        if self.cuda_graphs and (self.quick or self.operators or self.megapixels):
            raise ConfigError("cuda_graphs works for plain rows only; leave out quick, operators and megapixels")


def waiting_clock() -> float:
    """Return the wall-clock time after the GPU has finished its work."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------------------------
# Rows


def settings(config: ThroughputConfig) -> Iterator[tuple[int, int | None, str, str, str, int]]:
    """Iterate over (threads, latent size, mode, form, precision, batch size) of every group of rows."""
    for threads, size, mode in itertools.product(config.num_threads, config.latent_size or (None,), config.modes):
        forms = config.forms if mode == "inference" else ("unfused",)
        for form, precision, batch in itertools.product(forms, config.precisions, config.batch_size):
            yield threads, size, mode, form, precision, batch


def measure_group(config: ThroughputConfig, group: tuple, rates: dict[tuple[int, str], float]) -> list[dict[str, Any]]:
    """Time all models in turn at one setting: one row per model."""
    import torch

    from iptv2_diffusion.evaluation.speed import matmul_rate, ratio, summary, time_interleaved
    from iptv2_diffusion.evaluation.timed_steps import deploy, make_model, make_step
    from iptv2_diffusion.models.presets import count_macs, count_parameters

    threads, size, mode, form, precision, batch = group
    torch.set_num_threads(threads)
    if (threads, precision) not in rates:
        rates[threads, precision] = matmul_rate(config.rounds, precision, config.seconds, config.device)
    models = {spec: make_model(spec, size, config.device) for spec in config.names}
    if mode == "inference":
        models = {spec: deploy(model, form) for spec, model in models.items()}
    costs = {}
    for spec, model in models.items():
        counted = getattr(model, "_orig_mod", model)  # the model inside torch.compile's wrapper
        costs[spec] = count_macs(counted, batch_size=batch), count_parameters(counted), model.config.sample_size
    steps = {
        spec: make_step(model, batch, precision, mode == "training", config.cuda_graphs)
        for spec, model in models.items()
    }
    seconds = time_interleaved(steps, config.rounds, config.seconds)
    rows = []
    for spec, (macs, parameters, side) in costs.items():
        row = {"model": spec, "what": mode, "form": form, "precision": precision, "latent": side, "batch": batch}
        row |= {"threads": threads, "gmacs": macs / 1e9, "parameters": parameters, **summary(seconds[spec])}
        row["ratio"] = ratio(seconds, spec, list(costs)[-1])
        passes = 3 if mode == "training" else 1  # a backward has twice the products of a forward
        row["gflops"] = passes * 2 * macs * batch / row["median_s"] / 1e9
        row["of_matmul_rate"] = row["gflops"] / rates[threads, precision]
        if config.memory:
            row["peak_mb"] = peak_of(*device_options(config), f"--models={spec}", *as_options(group))
        rows.append(row)
        show(row)
    return rows


def as_options(group: tuple) -> list[str]:
    threads, size, mode, form, precision, batch = group
    options = [f"--num_threads={threads}", f"--modes={mode}", f"--forms={form}", f"--precisions={precision}"]
    return [*options, f"--batch_size={batch}", *([] if size is None else [f"--latent_size={size}"])]


def device_options(config: ThroughputConfig) -> list[str]:
    return [f"--{name}={getattr(config, name)}" for name in ("device", "cuda_graphs", "allow_tf32")]


def show(row: dict[str, Any]) -> None:
    shown = ("what", "form", "precision", "latent", "batch", "megapixels", "tile", "threads", "model")
    name = " ".join(str(row[key]) for key in shown if key in row)
    times = f"{1e3 * row['median_s']:8.0f} ms ({1e3 * row['min_s']:.0f} to {1e3 * row['max_s']:.0f})"
    rest = "".join(f"  {key} {row[key]:.3g}" for key in ("ratio", "of_matmul_rate", "peak_mb") if key in row)
    print(f"{name:64} {times}{rest}", flush=True)


def peak_of(*options: str) -> float:
    """Measure the memory of a row, without the libraries, in a separate process, in MB."""
    command = [sys.executable, __file__, "--memory_only", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[2:])} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def own_peak(config: ThroughputConfig) -> float:
    """Measure the peak memory of two steps of the first row, relative to the memory before, in MB.

    With device "cuda" the figure is the GPU's memory.
    """
    import psutil
    import torch

    from iptv2_diffusion.evaluation.timed_steps import deploy, make_model, make_step
    from iptv2_diffusion.memory import peak_bytes

    if config.device == "cuda":
        held, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    else:
        held, peak = lambda: psutil.Process().memory_info().rss, peak_bytes
    spec = config.names[0]
    if config.megapixels:
        restore, _ = make_restoration(spec, config.megapixels[0], config.tiles[0], config.device)
        before = held()
        restore()
        return (peak() - before) / 1e6
    _, size, mode, form, precision, batch = next(settings(config))
    fusible = hasattr(make_model(spec, device="meta"), "fuse")
    before = held()
    if mode == "inference" and form != "unfused" and fusible:
        spec += ":fused=true"  # fuse() would hold both forms at once
    model = make_model(spec, size, config.device)
    model = deploy(model, "unfused" if form == "fused" else form) if mode == "inference" else model
    step = make_step(model, batch, precision, mode == "training", config.cuda_graphs)
    step()
    step()
    return (peak() - before) / 1e6


def operator_tables(config: ThroughputConfig) -> list[dict[str, Any]]:
    """Measure the milliseconds by kind of operator: one row per kind, one column per model."""
    import torch

    from iptv2_diffusion.evaluation.speed import operator_times, to_markdown
    from iptv2_diffusion.evaluation.timed_steps import deploy, make_model, make_step

    rows = []
    for threads, size, mode, form, precision, batch in settings(config):
        torch.set_num_threads(threads)
        times = {}
        for spec in config.names:
            model = make_model(spec, size, config.device)
            model = deploy(model, form) if mode == "inference" else model
            step = make_step(model, batch, precision, mode == "training")
            times[spec] = operator_times(step, config.rounds, config.seconds)
        kinds = dict.fromkeys(kind for table in times.values() for kind in table)
        table = [{"operators": k, **{spec: 1e3 * t.get(k, 0.0) for spec, t in times.items()}} for k in kinds]
        print(f"ms of a step: {mode}, {form}, {precision}, batch {batch}, {threads} threads\n")
        print(to_markdown(table, ["operators", *times]))
        rows += [{"what": mode, "form": form, "precision": precision, "batch": batch, **row} for row in table]
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Restoration


def make_restoration(spec: str, megapixels: float, tile: str, device: str) -> tuple[Callable[[], Any], int]:
    """Return a function that restores a square colour image, and the number of pixels of the image."""
    import torch

    from iptv2_diffusion import IPTV2RestorationPipeline
    from iptv2_diffusion.evaluation.timed_steps import make_model

    pipeline = IPTV2RestorationPipeline(make_model(spec, device=device).fuse())
    pipeline.set_progress_bar_config(disable=True)
    side = round((megapixels * 1e6) ** 0.5)
    image = torch.rand(3, side, side)
    given = {"sigma": 25.0} if pipeline.model.config.sigma_conditioning is not None else {}
    size = None if tile == "none" else int(tile)
    return lambda: pipeline(image, tile=size, output_type="pt", **given), side * side


def restoration_rows(config: ThroughputConfig) -> list[dict[str, Any]]:
    """Measure the seconds per megapixel of whole and tiled images."""
    import torch

    from iptv2_diffusion.evaluation.speed import summary, time_interleaved

    rows = []
    for threads, megapixels in itertools.product(config.num_threads, config.megapixels):
        torch.set_num_threads(threads)
        for spec, tile in itertools.product(config.names, config.tiles):
            restore, pixels = make_restoration(spec, megapixels, tile, config.device)
            row = {"model": spec, "what": "restoration", "megapixels": megapixels, "tile": tile, "threads": threads}
            with user_errors(ValueError):  # the tile may be too small
                row |= summary(time_interleaved({spec: restore}, config.rounds, config.seconds)[spec])
            row["s_per_megapixel"] = row["median_s"] / (pixels / 1e6)
            if config.memory:
                options = (f"--models={spec}", f"--megapixels={megapixels}", f"--tiles={tile}")
                row["peak_mb"] = peak_of(*device_options(config), *options, f"--num_threads={threads}")
            rows.append(row)
            show(row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# The short benchmark


def quick(config: ThroughputConfig) -> dict[str, float]:
    """Measure the main figures in under a minute on two cores: inference at size S, training at the demo's size."""
    from iptv2_diffusion.evaluation.speed import matmul_rate, ratio, summary, time_interleaved
    from iptv2_diffusion.evaluation.timed_steps import make_model, make_step
    from iptv2_diffusion.models.presets import count_macs

    trainable, dit = (make_model(name, device=config.device).eval() for name in ("iptv2-s", "dit-s-2"))
    fused = trainable.fuse()
    models = {"iptv2-s": fused, "unfused": trainable, "dit-s-2": dit}
    steps = {name: make_step(model, 4, "float32", training=False) for name, model in models.items()}
    clock = config.seconds
    inference = time_interleaved(steps, config.rounds, clock)
    rate = matmul_rate(config.rounds, clock=clock, device=config.device)

    models = {name: make_model(name, device=config.device) for name in ("emoji64-s", "dit-emoji64-s")}
    steps = {name: make_step(model, 64, "float32", training=True) for name, model in models.items()}
    training = time_interleaved(steps, config.rounds, clock)
    for what, seconds in (("inference", inference), ("training", training)):
        for name, values in seconds.items():
            show({"what": what, "model": name, **summary(values)})
    achieved = 2 * 4 * count_macs(fused) / summary(inference["iptv2-s"])["median_s"] / 1e9
    print(f"matrix products {rate:.0f} GFLOP/s, iptv2-s {achieved:.0f} GFLOP/s")
    return {
        "inference_ratio_to_dit": ratio(inference, "iptv2-s", "dit-s-2"),
        "training_ratio_to_dit": ratio(training, "emoji64-s", "dit-emoji64-s"),
        "fused_speedup": ratio(inference, "unfused", "iptv2-s"),
        "fraction_of_matmul_rate": achieved / rate,
    }


def save(rows: list[dict[str, Any]], folder: Path) -> None:
    from iptv2_diffusion.evaluation.speed import save_plot, save_rows

    folder.mkdir(parents=True, exist_ok=True)
    save_rows(rows, folder)
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        for x, label in (("latent", "side of the latent"), ("gmacs", "GMACs per sample"), ("megapixels", "megapixels")):
            save_plot(own, x, "median_s", (label, "seconds per step"), folder / f"{what}_time_over_{x}.png")
            save_plot(own, x, "peak_mb", (label, "peak MB"), folder / f"{what}_memory_over_{x}.png")


def main(argv: list[str] | None = None) -> int:
    """Measure what the options select and print or write the rows."""
    config = parse_config(ThroughputConfig, argv, description=__doc__)
    if config.device == "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if config.kernels == "off":
        os.environ["IPTV2_KERNELS"] = "off"  # read when the kernels are imported, in the processes of --memory too
    import torch

    from iptv2_diffusion.kernels import fast_forms_in_use
    from iptv2_diffusion.memory import keep_freed_memory

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU; leave it out to use the CPU")
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.set_num_threads(config.num_threads[0])
    if config.device == "cpu":
        keep_freed_memory()
    if config.memory_only:
        print(json.dumps({"peak_mb": own_peak(config)}))
        return 0
    card = f", {torch.cuda.get_device_name()}" if config.device == "cuda" else ""
    card += "" if fast_forms_in_use() else ", plain formulas"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, threads {', '.join(map(str, config.num_threads))}{card}")
    if config.quick:
        print(json.dumps(quick(config)))
        return 0
    rates: dict[tuple[int, str], float] = {}
    if config.megapixels:
        rows = restoration_rows(config)
    elif config.operators:
        rows = operator_tables(config)
    else:
        rows = [row for group in settings(config) for row in measure_group(config, group, rates)]
    if config.output_dir:
        save(rows, Path(config.output_dir))
    matmul = [{"threads": t, "precision": p, "gflops": rate} for (t, p), rate in rates.items()]
    print(json.dumps({"matmul": matmul, "rows": rows}))
    return 0


if __name__ == "__main__":
    run_main(main)
