"""A disk that fills up during a save of the documented command: a one-line error, and older checkpoints are intact."""

import contextlib
import os
import resource
import shutil
import subprocess

import pytest
from ldm_runs import TIMEOUT, assert_equal_bit_for_bit, finish, launch, newest

from iptv2_diffusion.training.checkpoint import verify


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def small_disk(folder, room):
    """Mount a new disk of the given size at the folder; it becomes larger at the end of the inner block."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield
    subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)


@contextlib.contextmanager
def small_files(bytes_):
    """Set the operating system's limit on file sizes for processes that are started in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["limit", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_in_one_line_and_it_resumes_when_there_is_room(ground, reference, tmp_path, form):
    """Resume at step 20 of the uninterrupted run, without room for the checkpoint of step 30."""
    checkpoint = reference / "checkpoint-00000020"
    folder = tmp_path / "run"
    folder.mkdir()
    weights = (checkpoint / "model.safetensors").stat().st_size
    disk = small_disk(folder, size(checkpoint) + 2 * weights) if form == "disk" else contextlib.nullcontext()
    limit = small_files(2 * weights - 1000) if form == "limit" else contextlib.nullcontext()
    try:
        with disk:
            shutil.copytree(checkpoint, folder / checkpoint.name)
            shutil.copy(reference / "metrics.jsonl", folder)
            with limit:
                process = launch(ground, folder)
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 1
            # The disk fills in a safetensors file, the limit is met in torch's of the optimiser.
            reason = "No space left on device" if form == "disk" else "a file could not be written to its end"
            (line,) = [line for line in output.splitlines() if "error:" in line.lower()]
            assert f"error: cannot save checkpoint 30 in {folder}: {reason}" in line
            assert "older checkpoints are complete (checkpoint-00000020): make room" in line
            assert "Traceback" not in output
            assert verify(newest(folder))["step"] == 20
            assert not list(folder.glob(".tmp-*"))
        assert "resumed from" in finish(launch(ground, folder))
        assert_equal_bit_for_bit(folder, reference)
    finally:
        if form == "disk":
            subprocess.run(["umount", str(folder)], capture_output=True)
