"""Many processes: real `accelerate launch` on CPU processes over gloo."""

import os
import signal
import time

import pytest
from ldm_runs import (
    STEPS,
    STOPPED,
    TIMEOUT,
    assert_equal_bit_for_bit,
    assert_equal_to_rounding,
    finish,
    launch,
    log,
    newest,
)


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
    """The losses are equal up to rounding at every step: exactly one process has each sample, noise and label drop."""
    folder = ground / "two"
    output = finish(launch(ground, folder, processes=2))
    assert output.count("What to try next") == 1
    assert "Grad strides do not match" not in output  # torch's warning about a slow path
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
    """Two processes, then four, then one, give the losses and the averages of a single process."""
    options = (*STOPPED, "--streaming", "--num_workers", 1, "--shuffle_block", 8)
    whole, folder = ground / "stream", ground / "stream-shared"
    finish(launch(ground, whole, *options))
    for steps, processes in ((10, 2), (20, 4), (STEPS, 1)):
        output = finish(launch(ground, folder, *options, "--max_train_steps", steps, processes=processes))
        assert "reading it from the beginning" not in output
    assert_equal_to_rounding(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--sharding", "zero3")], ids=["whole", "sharded"])
def test_processes_align_as_one(ground, options):
    align = ("--align_target", "colours:Colours", "--align_hidden", 8, "--max_train_steps", 10)
    one, two = ground / "align-one", ground / f"align-two-{len(options)}"
    finish(launch(ground, one, *align))
    finish(launch(ground, two, *align, *options, processes=2))
    assert_equal_to_rounding(two, one)
