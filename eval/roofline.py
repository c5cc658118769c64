"""Predict the time of a forward pass and of a training step by a roofline model. No GPU is needed.

    python eval/roofline.py                                             # S and DiT-S/2 on an H100
    python eval/roofline.py --models iptv2-b,dit-b-2 --machine a100 --latent_size 32,64,128 --modes training
    python eval/roofline.py --models iptv2-s:patch_size=2:channels=256,dit-s-2 --forms compiled,kernels --parts
    python eval/roofline.py --machine this --precision float32 --batch_size 4 --measure
    python eval/roofline.py --models iptv2-s,iptv2-s-2,dit-s-2 --json   # one JSON object as the last line

A model is a preset, or a preset with other arguments (`iptv2-s:window_size=4`). Ratios are relative to the last DiT of
the same size (S, B, L, XL) among the models. There are three forms: "eager" runs one kernel per operator, "compiled"
fuses operators as `torch.compile` does, and "kernels" also uses this package's Triton kernels. The time of a kernel is
2 microseconds for its launch plus the larger of two times: its products at 0.6 of the published rate, and its bytes at
0.9 of the published bandwidth. These predictions are usually lower bounds; see docs/roofline.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors
from iptv2_diffusion.training.options import Config, option
from iptv2_diffusion.training.parsing import parse_config


@dataclass(frozen=True, kw_only=True)
class RooflineConfig(Config):
    """Options of the prediction. Lists are separated by commas; every combination is a row."""

    models: str = option("iptv2-s,dit-s-2", "presets, separated by commas; other arguments as in iptv2-s:window_size=4")
    modes: tuple[Literal["inference", "training"], ...] = option(
        ("inference", "training"), "what to predict: inference (fused weights), training (with backward)"
    )
    forms: tuple[Literal["eager", "compiled", "kernels"], ...] = option(
        ("eager", "compiled", "kernels"), "how operators are grouped into kernels"
    )
    machine: Literal["h100", "a100", "rtx4090", "this"] = option(
        "h100", "machine to predict for; this: this CPU, whose rates are measured first"
    )
    precision: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of weights and maps")
    batch_size: int = option(64, "number of samples per step", at_least=1)
    latent_size: tuple[int, ...] = option((), "sides of the latent; empty: the size of each model", at_least=1)
    launch_us: float | None = option(
        None, "launch time of a kernel in microseconds; none: that of the machine", at_least=0
    )
    parts: bool = option(False, "print the share of each part of the model")
    measure: bool = option(False, "also time the step itself, once after a warm-up; needs machine this")
    json: bool = option(False, "print one JSON object as the last line")
    plot: str | None = option(None, "file for a plot of the ratio to DiT over the side of the latent")

    @property
    def names(self) -> list[str]:
        return re.split(r",(?![^\[]*\])", self.models)  # commas inside brackets belong to a model's arguments

    def validate(self) -> None:
        if self.measure and self.machine != "this":
            raise ConfigError(f"measure times this machine, not {self.machine}; add --machine this")


def make_rows(config: RooflineConfig) -> list[dict[str, Any]]:
    """Predict one row per model, latent size, mode and form."""
    import dataclasses

    from diffusers import DiTTransformer2DModel

    from iptv2_diffusion.evaluation.machines import MACHINES, measure_this_machine
    from iptv2_diffusion.evaluation.roofline import count
    from iptv2_diffusion.evaluation.roofline_steps import make_on_meta, record

    machine = measure_this_machine(config.precision) if config.machine == "this" else MACHINES[config.machine]
    if config.launch_us is not None:
        machine = dataclasses.replace(machine, launch=config.launch_us * 1e-6)
    rate, bandwidth = machine.flops[config.precision] / 1e12, machine.bandwidth / 1e12
    print(f"{machine.name}: {rate:.4g} TFLOP/s of products, {bandwidth:.3g} TB/s, batch {config.batch_size}")
    rows = []
    for size in config.latent_size or (None,):
        for spec in config.names:
            for mode in config.modes:
                with user_errors(ValueError):
                    model = make_on_meta(spec, size, config.precision, fused=mode == "inference")
                measured = measure(spec, size, mode, config) if config.measure else None
                recorders = {}
                for form in config.forms:
                    own = form == "kernels" and not isinstance(model, DiTTransformer2DModel)
                    if own not in recorders:  # eager and compiled run the same operators
                        recorders[own] = record(model, config.batch_size, mode == "training", form)
                    recorder = recorders[own]
                    cost = count(recorder, form, machine, config.precision)
                    row = {"model": spec, "latent": model.config.sample_size, "what": mode, "form": form}
                    row |= {"gmacs": cost.macs / config.batch_size / 1e9, "gigabytes": cost.nbytes / 1e9}
                    row |= {"kernels": cost.launches, "predicted_ms": 1e3 * cost.seconds, "measured_ms": measured}
                    row["parts"] = {part: seconds / cost.seconds for part, seconds in cost.parts.items()}
                    rows.append(row)
                    show(row, config.parts)
    return rows


def measure(spec: str, size: int | None, mode: str, config: RooflineConfig) -> float:
    """Measure an eager step on this CPU, in milliseconds."""
    from iptv2_diffusion.evaluation.machines import best_of
    from iptv2_diffusion.evaluation.timed_steps import deploy, make_model, make_step

    model = make_model(spec, size)
    model = model if mode == "training" else deploy(model, "fused")
    return 1e3 * best_of(1, make_step(model, config.batch_size, config.precision, mode == "training"))


def show(row: dict[str, Any], parts: bool) -> None:
    name = f"{row['model']} {row['latent']} {row['what']} {row['form']}"
    measured = "" if row["measured_ms"] is None else f"  measured {row['measured_ms']:.4g} ms"
    print(
        f"{name:48} {row['gmacs']:8.4g} GMACs per sample {row['gigabytes']:8.4g} GB {row['kernels']:6} kernels "
        f"{row['predicted_ms']:8.4g} ms predicted{measured}",
        flush=True,
    )
    if parts:
        shares = sorted(row["parts"].items(), key=lambda item: -item[1])
        print("    " + ", ".join(f"{part} {share:.0%}" for part, share in shares))


def reference_of(spec: str, names: list[str]) -> str | None:
    """Return the DiT to compare a model with: the last one of its size, or else the last one; None without a DiT."""
    dits = [name for name in names if name.startswith("dit-")]
    sizes = re.findall(r"-(s|b|l|xl)(?=-|:|$)", spec)
    own = [name for name in dits if sizes and f"-{sizes[0]}-" in f"{name}-"]
    return (own or dits or [None])[-1]


def ratios(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Compute the ratio of the predicted times of each model and its DiT, row by row."""
    ours = [row for row in rows if not row["model"].startswith("dit-")]
    result = []
    for row in ours:
        reference = reference_of(row["model"], names)
        same = [r for r in rows if r["model"] == reference and all(r[k] == row[k] for k in ("latent", "what", "form"))]
        if same:
            ratio = row["predicted_ms"] / same[0]["predicted_ms"]
            result.append({**{k: row[k] for k in ("model", "latent", "what", "form")}, "to": reference, "ratio": ratio})
    return result


def save_plot(table: list[dict[str, Any]], path: Path) -> None:
    """Plot the ratio over the side of the latent for the last form, with a line per model and a panel per mode."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["what"] for row in table))
    figure = Figure(figsize=(5 * len(modes), 4), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        rows = [row for row in table if row["what"] == mode and row["form"] == table[-1]["form"]]
        for model in dict.fromkeys(row["model"] for row in rows):
            points = sorted((row["latent"], row["ratio"]) for row in rows if row["model"] == model)
            axes.plot(*zip(*points, strict=True), marker="o", label=model)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="side of the latent", ylabel="predicted time / DiT's", title=mode)
        axes.set_xticks(sorted({row["latent"] for row in rows}), [str(s) for s in sorted({r["latent"] for r in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Predict, print and plot."""
    config = parse_config(RooflineConfig, description=__doc__)
    import diffusers

    diffusers.logging.set_verbosity_error()  # no warnings of casts, which have no effect here
    rows = make_rows(config)
    table = ratios(rows, config.names)
    for row in table:
        what = f"{row['model']} / {row['to']}"
        print(f"{what:32} {row['latent']:4} {row['what']:10} {row['form']:9} predicted ratio {row['ratio']:.2f}")
    if config.plot and table:
        save_plot(table, Path(config.plot))
    if config.json:
        predicted: dict[str, Any] = {}
        for row in table:  # the last form and the first latent size of each model are kept
            if row["latent"] == next(r["latent"] for r in table if r["model"] == row["model"]):
                predicted.setdefault(row["model"], {})[row["what"]] = row["ratio"]
        print(json.dumps({"predicted_ratio_to_dit": predicted, "ratios": table, "rows": rows}))
    return 0


if __name__ == "__main__":
    run_main(main)
