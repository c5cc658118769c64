"""Seconds of a training step and of a forward: models side by side in one process, interleaved round by round.

    python eval/throughput.py --quick                      # the ratios to DiT in a minute
    python eval/throughput.py --models emoji64,dit-emoji64 --batch_size 32 --num_threads 2

Each model runs at its own sample size. Reported are the median over the rounds after a warm-up, with minimum and
maximum, and the ratio to the last model named, round by round; the last line is the same as JSON. `--quick`
sets the achieved GFLOP/s beside the machine's own rate of matrix products, measured in the same run: the limit.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iptv2_diffusion.training.config import option, parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class ThroughputConfig:
    """What is timed, and how."""

    models: str = option("emoji64,dit-emoji64", "presets, separated by commas; the last is what the others are held to")
    batch_size: int = option(32, "samples a step")
    precisions: str = option("float32,bfloat16", "of autocast; float32 is none")
    num_threads: int = option(2, "CPU threads")
    rounds: int = option(7, "counted rounds after one warm-up")
    quick: bool = option(
        False,
        "iptv2-s beside dit-s-2 (inference, batch 4) and emoji64 beside dit-emoji64 (training, batch 64), float32",
    )

    def validate(self) -> None:
        for name in ("batch_size", "num_threads", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for precision in self.precisions.split(","):
            if precision not in ("float32", "bfloat16", "float16"):
                raise ConfigError(f"precision {precision!r}: use float32, bfloat16 or float16")


def make_step(model: nn.Module, batch_size: int, precision: str, training: bool) -> Callable[[], None]:
    """A function that runs one forward, or one forward and backward, on fixed random inputs."""
    import torch

    from iptv2_diffusion.training.latent_diffusion import null_label

    size, labels = model.config.sample_size, null_label(model)
    latents = torch.randn(batch_size, model.config.in_channels, size, size)
    timestep = torch.linspace(0, 999, batch_size)
    class_labels = torch.arange(batch_size) % labels

    def run() -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"),
        ):
            sample = model(latents, timestep, class_labels).sample
        if training:
            sample.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    return run


def time_interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each counted round; the functions take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of the seconds of one to those of another."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def matmul_rate(rounds: int) -> float:
    """GFLOP/s of float32 matrix products (2048×1024 by 1024×1024), the best of the rounds: the machine's limit."""
    import torch

    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    seconds = time_interleaved({"matmul": lambda: [torch.mm(a, b) for _ in range(20)]}, rounds)["matmul"]
    return 20 * 2 * 2048 * 1024 * 1024 / min(seconds) / 1e9


def quick(config: ThroughputConfig) -> dict[str, float]:
    """The figures that matter most, under a minute on two cores: S for inference, the demo's size for training."""
    import torch

    from iptv2_diffusion.models.presets import count_macs, create_model

    def channels_last(name: str) -> nn.Module:
        return create_model(name).to(memory_format=torch.channels_last)

    trainable, dit = channels_last("iptv2-s").eval(), channels_last("dit-s-2").eval()
    fused = trainable.fuse()
    models = {"iptv2-s": fused, "unfused": trainable, "dit-s-2": dit}
    steps = {name: make_step(model, 4, "float32", training=False) for name, model in models.items()}
    inference = time_interleaved(steps, config.rounds)
    rate = matmul_rate(config.rounds)

    models = {name: channels_last(name) for name in ("emoji64", "dit-emoji64")}
    steps = {name: make_step(model, 64, "float32", training=True) for name, model in models.items()}
    training = time_interleaved(steps, config.rounds)
    for what, seconds in (("inference", inference), ("training step", training)):
        for name, values in seconds.items():
            print(f"{what:13} {name:12} {1e3 * statistics.median(values):6.0f} ms ({show_range(values)})")
    achieved = 2 * 4 * count_macs(fused) / statistics.median(inference["iptv2-s"]) / 1e9
    print(f"matrix products {rate:.0f} GFLOP/s, iptv2-s {achieved:.0f} GFLOP/s")
    return {
        "inference_ratio_to_dit": ratio(inference, "iptv2-s", "dit-s-2"),
        "training_ratio_to_dit": ratio(training, "emoji64", "dit-emoji64"),
        "fused_speedup": ratio(inference, "unfused", "iptv2-s"),
        "fraction_of_matmul_rate": achieved / rate,
    }


def show_range(seconds: list[float]) -> str:
    return f"{1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}"


def main() -> int:
    config = parse_config(ThroughputConfig, description=__doc__)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a CPU benchmark
    import torch

    from iptv2_diffusion.models.presets import count_macs, count_parameters, create_model
    from iptv2_diffusion.training.memory import keep_freed_memory

    torch.set_num_threads(config.num_threads)
    keep_freed_memory()
    if config.quick:
        print(f"{config.num_threads} threads, torch {torch.__version__}")
        print(json.dumps(quick(config)))
        return 0
    names = config.models.split(",")
    with user_errors(ValueError):
        models = {name: create_model(name).to(memory_format=torch.channels_last) for name in names}
    print(f"{config.num_threads} threads, batch {config.batch_size}, torch {torch.__version__}")
    costs = {}
    for name, model in models.items():
        macs = {"gmacs_training": count_macs(model, batch_size=config.batch_size) / 1e9}
        if hasattr(model, "fuse"):
            macs["gmacs_fused"] = count_macs(model.fuse()) / 1e9
        costs[name] = {"parameters": count_parameters(model), **macs}
        print(f"{name}: {costs[name]['parameters'] / 1e6:.2f} M, " + ", ".join(f"{k} {v:.3f}" for k, v in macs.items()))

    rows = []
    for training in (True, False):
        shown = models if training else {n: m.fuse() if hasattr(m, "fuse") else m.eval() for n, m in models.items()}
        for precision in config.precisions.split(","):
            steps = {name: make_step(model, config.batch_size, precision, training) for name, model in shown.items()}
            seconds = time_interleaved(steps, config.rounds)
            for name, values in seconds.items():
                to_last = ratio(seconds, name, names[-1])
                what = "training step" if training else "inference"
                row = {"model": name, "what": what, "precision": precision, "median_s": statistics.median(values)}
                rows.append({**row, "min_s": min(values), "max_s": max(values), "ratio": to_last})
                print(
                    f"{what:13} {precision:8} {name:12} {1e3 * row['median_s']:6.0f} ms "
                    f"({show_range(values)})  x {to_last:.2f}"
                )
    print(json.dumps({"costs": costs, "rows": rows}))
    return 0


if __name__ == "__main__":
    run_main(main)
