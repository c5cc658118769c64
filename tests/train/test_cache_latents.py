"""cache_latents.py: any number of processes makes one cache, and train_ldm.py reads it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from ldm_runs import CACHE_SCRIPT, TIMEOUT, environment, finish, launch, words


def files(folder):
    """Contents by relative path. index.json names no machine or time, so all files must agree."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_make_the_cache_that_training_reads(ground, tmp_path):
    cache = tmp_path / "cache"
    output = finish(launch(ground, tmp_path, "--cache_dir", cache, processes=2, script=CACHE_SCRIPT))
    assert output.count("views/s") == 2  # training and held-out images, each reported once
    made = files(cache)
    assert len(made) == 4
    output = finish(launch(ground, tmp_path / "run", "--cache_dir", cache, "--max_train_steps", 1))
    assert "views/s" not in output
    assert files(cache) == made


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_any_number_makes_the_same_cache(ground, tmp_path, processes):
    """Six shards, so that each process makes its own."""
    options = ("--crops", 2, "--heldout_fraction", 0, "--cache_shard_images", 4)
    for count in (1, processes):
        cache = ("--cache_dir", tmp_path / str(count))
        finish(launch(ground, tmp_path, *options, *cache, processes=count, script=CACHE_SCRIPT))
    assert files(tmp_path / "1") == files(tmp_path / str(processes))
    assert len(files(tmp_path / "1")) == 7


@pytest.mark.slow
def test_kill_of_two_processes_costs_only_the_shards_in_progress(ground, tmp_path):
    options = ("--heldout_fraction", 0, "--cache_shard_images", 1)
    finish(launch(ground, tmp_path, *options, "--cache_dir", tmp_path / "whole", script=CACHE_SCRIPT))
    command = (*options, "--cache_dir", tmp_path / "killed")
    process = launch(ground, tmp_path, *command, processes=2, script=CACHE_SCRIPT)
    while not (made := list((tmp_path / "killed").rglob("shard-*"))):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("shard-*")}
    assert 0 < len(made) < 24
    finish(launch(ground, tmp_path, *command, processes=2, script=CACHE_SCRIPT))
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def listen_to_ctrl_c():
    """In the child: undo that a shell in the background makes its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_twice_while_encoding_keeps_whole_shards(ground, tmp_path):
    options = (
        "--heldout_fraction",
        0,
        "--cache_shard_images",
        1,
        "--resolution",
        512,
        "--cache_dir",
        tmp_path / "cache",
    )
    command = [sys.executable, str(CACHE_SCRIPT), *words(ground, tmp_path, *options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    process = subprocess.Popen(command, preexec_fn=listen_to_ctrl_c, **pipes)
    deadline = time.monotonic() + TIMEOUT
    while not (made := list((tmp_path / "cache").rglob("shard-*"))) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "of 24 shards of latents in" in output
    made = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("shard-*")}
    assert 0 < len(made) < 24
    done = subprocess.run(command, timeout=TIMEOUT, **pipes)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "cache").rglob("shard-*"))) == 24
    assert {path: path.read_bytes() for path in made} == made
