"""Sharding by torch's fully_shard over gloo: real `accelerate launch` on CPU processes."""

import shutil

import pytest
import torch
from ldm_runs import STOPPED, TIMEOUT, assert_equal_to_rounding, finish, launch, log, newest
from safetensors.torch import load_file

from iptv2_diffusion import IPTV2Pipeline


@pytest.mark.parametrize(
    "form", ["zero3", pytest.param("zero2 --gradient_accumulation_steps 2", marks=pytest.mark.slow)]
)
def test_fsdp_on_two_processes_gives_the_run_of_one_and_its_checkpoint(ground, reference, form):
    """Gathered checkpoints are those of an unsharded run: one process reads one and continues from it."""
    folder = ground / form
    finish(launch(ground, folder, "--sharding", *form.split(), "--preview_every", 20, processes=2))
    assert len(list(newest(folder).glob("random_states_*"))) == 2
    assert_equal_to_rounding(folder, reference)
    assert (folder / "previews/step-00000020.png").is_file()
    average = load_file(newest(folder) / "ema.safetensors")
    saved = IPTV2Pipeline.from_pretrained(folder / "pipeline").transformer.state_dict()
    assert all(torch.equal(saved[name], average[name]) for name in average)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_fsdp_checkpoints_resume_on_one_process_and_on_two(ground, form):
    constant = (*STOPPED, "--checkpoint_every", 10, "--ema", "power")
    sharding = ("--sharding", "zero3", "--sharded_checkpoints", str(form == "sharded").lower())
    whole, folder = ground / f"whole-{form}", ground / f"parts-{form}"
    finish(launch(ground, whole, *constant, "--max_train_steps", 30))
    finish(launch(ground, folder, *constant, *sharding, "--max_train_steps", 10, processes=2))
    assert (newest(folder) / "sharded").is_dir() == (form == "sharded")
    one = shutil.copytree(folder, ground / f"one-{form}")
    output = finish(launch(ground, one, *constant, "--max_train_steps", 30))
    assert "at step 10" in output
    assert_equal_to_rounding(one, whole)
    # back to two processes, from what one wrote, sharded again
    output = finish(launch(ground, folder, *constant, *sharding, "--max_train_steps", 20, processes=2))
    assert "at step 10" in output
    for left, right in zip(log(folder), log(whole), strict=False):
        assert left == pytest.approx(right, rel=1e-4)


def test_fsdp2_of_accelerate_gives_the_run_of_one_and_its_checkpoint(ground, reference):
    """`accelerate launch --use_fsdp --fsdp_version 2` is equivalent to --sharding zero3, also on CPUs."""
    folder = ground / "plugin"
    launcher = ("--use_fsdp", "--fsdp_version", "2")
    output = finish(launch(ground, folder, processes=2, launcher=launcher))
    assert "accelerate's FSDP 2 is --sharding zero3 here" in output
    assert "sharding: zero3" in (folder / "config.yaml").read_text()
    assert_equal_to_rounding(folder, reference)


@pytest.mark.slow
def test_fsdp1_of_accelerate_is_refused(ground):
    process = launch(ground, ground / "refused", processes=2, launcher=("--use_fsdp",))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "accelerate is set to FSDP 1" in output
    assert "--fsdp_version 2" in output
    assert "--sharding zero3" in output
    assert not (ground / "refused").exists()
