"""Latent-diffusion runs small enough for two cores: 24 pictures, a random VAE, 8x8 latents, the `tiny` preset."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from kl_vae import make_kl_vae
from PIL import Image
from safetensors.torch import load_file

from iptv2_diffusion.training.logging import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "train_ldm.py"
CACHE_SCRIPT = ROOT / "train" / "cache_latents.py"
SIZE, CHANNELS, STEPS = 32, 4, 30
TIMEOUT = 300
# a run that ends early draws samples where a longer one does not
STOPPED = ("--lr_schedule", "constant", "--kid_samples", 0)


def lay_ground(folder):
    """`images/CLASS/*.png`, `vae/` and `run.yaml` in a folder."""
    write_pictures(folder / "images")
    torch.manual_seed(0)
    make_kl_vae(4, 4, 4, scaling_factor=1.0).save_pretrained(folder / "vae")
    config = {
        "data": str(folder / "images"),
        "heldout_fraction": 0.25,
        "resolution": SIZE,
        "vae": str(folder / "vae"),
        "cache_dir": str(folder / "cache"),
        "model": "tiny",
        "batch_size": 8,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 3,
        "num_threads": 1,
        "log_every": 1,
        "eval_every": 10,
        "preview_every": 0,
        "checkpoint_every": 10,
        "sample_steps": 2,
        "kid_samples": 40,  # two batches: each of two processes draws one
        "kid_every": 20,
        "kid_extractor": "efficientnet-lite0@32",
        "preview_per_class": 2,
        "report_to": "none",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_pictures(folder, classes=("bird", "fish", "moth"), count=8):
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = np.full((SIZE, SIZE, 3), 60 * number) + random.integers(0, 60, (SIZE, SIZE, 3))
            Image.fromarray(colour.astype(np.uint8)).save(folder / name / f"{name}-{i}.png")


def words(ground, output, *options):
    return ["--config", str(ground / "run.yaml"), "--output_dir", str(output), *map(str, options)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}  # fmt: skip


def launch(ground, output, *options, processes=1, script=SCRIPT, launcher=()):
    """Start the documented command on CPU processes; the caller waits. `launcher`: options of `accelerate launch`.

    `accelerate launch --cpu` starts one process regardless of --num_processes. --multi_gpu starts that many, on CPUs if
    ACCELERATE_USE_CPU is set (see docs/training.md).
    """
    launcher = launcher or (("--multi_gpu",) if processes > 1 else ("--cpu",))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", *launcher]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(script)]
    return subprocess.Popen(
        command + words(ground, output, *options),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def log(folder):
    timing = ("time", "seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(folder / "metrics.jsonl")]


def newest(folder):
    return max(folder.glob("checkpoint-*"))


def tensors(folder):
    found = newest(folder)
    optimizer = torch.load(found / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{i}.{k}": v for i, state in optimizer.items() for k, v in state.items()}
    return {**load_file(found / "model.safetensors"), **moments}, load_file(found / "ema.safetensors")


def assert_equal_bit_for_bit(left, right):
    for a, b in zip(tensors(left), tensors(right), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert log(left) == log(right)


def assert_equal_to_rounding(left, right):
    """Compare the losses at every step, and the EMA weights at the end."""
    ours, theirs = log(left), log(right)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():  # KID: a pixel may round to the next grey level
            assert value == pytest.approx(other.pop(name), rel=1e-2 if name.startswith("kid") else 1e-4), name
        assert not other
    for name, value in tensors(left)[1].items():
        assert torch.allclose(value, tensors(right)[1][name], atol=2e-5), name
