"""Many processes, kills, signals and sharding: real `accelerate launch` on CPU processes over gloo."""

import os
import re
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from ldm_runs import STEPS, TIMEOUT, assert_equal_bit_for_bit, finish, launch, log, newest, tensors
from safetensors.torch import load_file

from iptv2_diffusion import IPTV2Pipeline

# a run that ends early draws samples where a longer one does not
STOPPED = ("--lr_schedule", "constant", "--kid_samples", 0)


def assert_equal_to_rounding(left, right):
    """Losses at every step, and the averaged weights at the end."""
    ours, theirs = log(left), log(right)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():  # KID: a pixel may round to the next grey level
            assert value == pytest.approx(other.pop(name), rel=1e-2 if name.startswith("kid") else 1e-4), name
        assert not other
    for name, value in tensors(left)[1].items():
        assert torch.allclose(value, tensors(right)[1][name], atol=2e-5), name


def test_kill_in_mid_run_and_the_same_command_gives_the_same_run_bit_for_bit(ground, reference):
    folder = ground / "killed"
    process = launch(ground, folder, "--checkpoint_every", 3)
    deadline = time.monotonic() + TIMEOUT
    while not list(folder.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < int(newest(folder).name[-8:]) < STEPS
    output = finish(launch(ground, folder, "--checkpoint_every", 3))
    assert "resumed from" in output
    assert_equal_bit_for_bit(folder, reference)


def test_processes_two_give_the_loss_curve_of_one(ground, reference):
    """Equal to rounding at every step: each sample, its noise and its label drop fell to exactly one process."""
    folder = ground / "two"
    output = finish(launch(ground, folder, processes=2))
    assert output.count("What to try next") == 1
    assert "Grad strides do not match" not in output  # which torch says to whoever wastes time on it
    assert [row["step"] for row in log(folder) if "kid" in row] == [20, STEPS]
    assert len(list(newest(folder).glob("random_states_*"))) == 2
    assert_equal_to_rounding(folder, reference)


def test_processes_agree_on_the_precision_that_they_measure(ground):
    output = finish(launch(ground, ground / "auto", "--dry_run", "--mixed_precision", "auto", processes=2))
    assert output.count("every stage ran") == 1
    assert len(list(newest(ground / "auto/dry_run").glob("random_states_*"))) == 2


@pytest.mark.slow
def test_processes_four_give_the_loss_curve_of_one(ground, reference):
    folder = ground / "four"
    finish(launch(ground, folder, processes=4))
    assert len(list(newest(folder).glob("random_states_*"))) == 4
    assert_equal_to_rounding(folder, reference)


@pytest.mark.slow
def test_processes_may_change_between_stop_and_resumption(ground, reference):
    folder = ground / "changed"
    finish(launch(ground, folder, *STOPPED, "--max_train_steps", 10, processes=2))
    finish(launch(ground, folder, *STOPPED, "--max_train_steps", 20))
    one = ground / "unchanged"
    finish(launch(ground, one, *STOPPED, "--max_train_steps", 20))
    assert [r["step"] for r in log(folder)] == [r["step"] for r in log(one)]
    for left, right in zip(log(folder), log(one), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


@pytest.mark.slow
def test_processes_share_a_stream_and_resume_it_on_another_number(ground):
    """Two processes, then four, then one: the losses and the averages of one process all along."""
    options = (*STOPPED, "--streaming", "--num_workers", 1, "--shuffle_block", 8)
    whole, folder = ground / "stream", ground / "stream-shared"
    finish(launch(ground, whole, *options))
    for steps, processes in ((10, 2), (20, 4), (STEPS, 1)):
        output = finish(launch(ground, folder, *options, "--max_train_steps", steps, processes=processes))
        assert "reading all that came before" not in output
    assert_equal_to_rounding(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--sharding", "zero3")], ids=["whole", "sharded"])
def test_processes_align_as_one(ground, options):
    align = ("--align_target", "colours:Colours", "--align_hidden", 8, "--max_train_steps", 10)
    one, two = ground / "align-one", ground / f"align-two-{len(options)}"
    finish(launch(ground, one, *align))
    finish(launch(ground, two, *align, *options, processes=2))
    assert_equal_to_rounding(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_resume_after_a_signal_to_two_processes(ground, name):
    """To the launcher (which hands SIGTERM on), or as Slurm sends SIGUSR1: to the training processes themselves."""
    folder, constant = ground / name, (*STOPPED, "--eval_every", 0)
    process = launch(ground, folder, *constant, "--checkpoint_every", 0, "--max_train_steps", 100_000, processes=2)
    await_step(process, folder, 5)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "train_ldm" in " ".join(p.cmdline())]
    targets = [p for p in workers if p.environ().get("RANK")] if name == "SIGUSR1" else [process]
    assert len(targets) == (2 if name == "SIGUSR1" else 1)
    signalled = max(row["step"] for row in log(folder))
    for target in targets:
        target.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert re.search(rf"stopped by ({name}|a signal to another process) at step", output)
    step = int(newest(folder).name[-8:])
    assert signalled <= step <= signalled + 50  # a step takes milliseconds, a signal's way through the launcher longer
    finish(launch(ground, folder, *constant, "--max_train_steps", step + 2, processes=2))
    undisturbed = ground / f"{name}-undisturbed"
    finish(launch(ground, undisturbed, *constant, "--max_train_steps", step + 2, processes=2))
    assert_equal_bit_for_bit(folder, undisturbed)


@pytest.mark.slow
def test_resume_after_a_signal_to_two_processes_in_an_evaluation(ground):
    """Both leave between two batches of it, save, and draw its samples after resumption."""
    options = ("--max_train_steps", 20, "--checkpoint_every", 0, "--kid_every", 10, "--kid_samples", 3200)
    undisturbed, folder = ground / "evaluated", ground / "evaluating"
    finish(launch(ground, undisturbed, *options, processes=2))
    process = launch(ground, folder, *options, processes=2)
    await_step(process, folder, 10)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert re.search("stopped by (SIGTERM|a signal to another process) at step 10, saved", output)
    assert not any("kid" in row for row in log(folder))
    finish(launch(ground, folder, *options, processes=2))
    assert_equal_bit_for_bit(folder, undisturbed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_resume_after_a_signal_that_reaches_the_workers_of_the_data_too(ground, name):
    """As Ctrl-C in a terminal, a launcher's end or Slurm send it: to every process of the group."""
    folder = ground / f"workers-{name}"
    options = ("--cache_latents", "false", "--num_workers", 2, "--eval_every", 0, "--checkpoint_every", 0)
    process = launch(ground, folder, *STOPPED, *options, "--max_train_steps", 100_000)
    await_step(process, folder, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the script and its workers
    for child in children:
        child.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert f"stopped by {name} at step" in output
    assert "killed by signal" not in output
    assert newest(folder)


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing_older(ground):
    """30 kills across training, saving, evaluating and drawing; then the run ends as if undisturbed."""
    often = ("--max_train_steps", 300, "--checkpoint_every", 1, "--eval_every", 5, "--preview_every", 7)
    undisturbed, folder = ground / "undisturbed", ground / "killed-often"
    finish(launch(ground, undisturbed, *often))
    random, kills = np.random.default_rng(0), 0
    while kills < 30:
        known = int(newest(folder).name[-8:]) if list(folder.glob("checkpoint-*")) else 0
        assert known < 300, f"the run ended after {kills} kills"
        process = launch(ground, folder, *often)
        await_step(process, folder, known + int(random.integers(1, 9)))
        time.sleep(float(random.uniform(0, 0.5)))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert int(newest(folder).name[-8:]) >= known
    assert "resumed from" in finish(launch(ground, folder, *often))
    assert_equal_bit_for_bit(folder, undisturbed)
    print(f"{kills} kills, the last one after step {known}")


def await_step(process, folder, step):
    """Until the log, which a resumed run cuts back to its checkpoint, has come to `step`."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and max((row["step"] for row in log(folder)), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run did not come to step {step}")


# --------------------------------------------------------------------------------------------------------------------
# Sharding: torch's fully_shard over gloo


@pytest.mark.parametrize(
    "form", ["zero3", pytest.param("zero2 --gradient_accumulation_steps 2", marks=pytest.mark.slow)]
)
def test_fsdp_on_two_processes_gives_the_run_of_one_and_its_checkpoint(ground, reference, form):
    """Gathered checkpoints are those of an unsharded run: one process reads one, and goes on from it."""
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
    """What users type: `accelerate launch --use_fsdp --fsdp_version 2`. It is --sharding zero3, on CPUs too."""
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
    assert "accelerate was asked for FSDP 1" in output
    assert "--fsdp_version 2" in output
    assert "--sharding zero3" in output
    assert not (ground / "refused").exists()
