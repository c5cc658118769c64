"""train_vae.py as a user runs it: a real process on a few tiny images, resumed, and with wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TINY = """
heldout_split: null
heldout_fraction: 0.25
resolution: 16
block_out_channels: [8, 8, 16]
norm_num_groups: 4
batch_size: 4
learning_rate: 1.0e-2
ema_decay: 0.9
checkpoint_every: 2
eval_every: 2
preview_every: 2
log_every: 1
report_to: none
channels_last: false
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(16):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 18)).save(folder / f"{index:02}.png")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def start(images: Path, output: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """The script on the tiny images, in a separate process."""
    command = [sys.executable, *launcher, str(ROOT / "train" / "train_vae.py")]
    command += ["--config", str(images / "tiny.yaml"), "--data", str(images), "--output_dir", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def test_trains_resumes_exactly_and_saves(images: Path, tmp_path: Path) -> None:
    """4 steps ≡ 2 steps + the same command again, bit for bit; the result loads with its latent statistics."""
    accelerate = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    whole = start(images, tmp_path / "whole", "--max_train_steps", "4")
    first = start(images, tmp_path / "halves", "--max_train_steps", "2", launcher=accelerate)
    told, _ = finish(whole), finish(first)
    assert "held-out PSNR" in told
    again = ("--max_train_steps", "4", "--heldout_samples", "3")  # the number of measured images may change
    assert "resumed from" in finish(start(images, tmp_path / "halves", *again))

    for name in ("checkpoint-00000004/model.safetensors", "checkpoint-00000004/ema.safetensors"):
        one, two = (load_file(tmp_path / run / name) for run in ("whole", "halves"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k in ("step", "loss", "lr", "grad_norm", "heldout_psnr")}
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "halves")
    ]
    # The first half ended at step 2, the whole run did not: only the end of a run logs twice there.
    assert [r for r in rows[0] if "loss" in r] == [r for r in rows[1] if "loss" in r]

    vae = AutoencoderKL.from_pretrained(tmp_path / "whole" / "vae")
    assert (
        load_file(tmp_path / "whole" / "vae" / "diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"].dtype
        == torch.float16
    )
    assert vae.config.scaling_factor == 1.0
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
    assert all(std > 0 for std in vae.config.latents_std)
    for name in ("config.yaml", "loss_curve.png", "reconstructions.png", "previews/step-00000002.png"):
        assert (tmp_path / "whole" / name).is_file()


def test_wrong_options(images: Path, tmp_path: Path) -> None:
    """One line that names the numbers and the remedy; nothing is written."""
    cases = {
        ("--resolution", "18"): "resolution 18x18 is not a multiple of the VAE's factor 4; use 16,16",
        ("--block_out_channels", "8,9"): "block_out_channels is 8,9; each must be a multiple of norm_num_groups 4",
        ("--preview_images", "0"): "preview_images is 0; it must be at least 1",
        ("--kl_wieght", "1"): "did you mean kl_weight",
    }
    processes = {options: start(images, tmp_path / "run", *options) for options in cases}
    for options, message in cases.items():
        _, err = processes[options].communicate(timeout=300)
        assert processes[options].returncode == 1
        assert message in err
        assert err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_help_teaches() -> None:
    out = subprocess.run(
        [sys.executable, str(ROOT / "train" / "train_vae.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout
    assert "--kl_weight" in out
    assert "examples:" in out
