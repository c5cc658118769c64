"""Signals and kills: real `accelerate launch` on CPU processes, with workers of the data loader."""

import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
from ldm_runs import (
    STOPPED,
    TIMEOUT,
    assert_equal_bit_for_bit,
    finish,
    launch,
    log,
    newest,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_resume_after_a_signal_to_two_processes(ground, name):
    """SIGTERM goes to the launcher, which passes it on; SIGUSR1 goes to the training processes, as Slurm sends it."""
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
    assert signalled <= step <= signalled + 50  # a step takes milliseconds; a signal takes longer through the launcher
    finish(launch(ground, folder, *constant, "--max_train_steps", step + 2, processes=2))
    undisturbed = ground / f"{name}-undisturbed"
    finish(launch(ground, undisturbed, *constant, "--max_train_steps", step + 2, processes=2))
    assert_equal_bit_for_bit(folder, undisturbed)


@pytest.mark.slow
def test_resume_after_a_signal_to_two_processes_in_an_evaluation(ground):
    """Both processes exit between two batches of the evaluation, save, and draw its samples after resumption."""
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
    """The signal goes to every process of the group, as from Ctrl-C in a terminal, a launcher's exit or Slurm."""
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
    """After 30 kills in training, saving, evaluation and sampling, the run ends like an uninterrupted one."""
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
    """Wait until the log, which a resumed run truncates to its checkpoint, reaches `step`."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and max((row["step"] for row in log(folder)), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run did not come to step {step}")
