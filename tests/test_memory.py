"""Freed memory stays with the process (counted in page faults, in separate processes); the peak of a process."""

import os
import subprocess
import sys

import pytest
import torch

from iptv2_diffusion.memory import peak_bytes

PROGRAM = """
import resource, torch
from iptv2_diffusion.memory import keep_freed_memory
kept = keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.zeros(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)  # the heap grows to what a round needs
print(kept, faults(8))
"""


def run(**variables):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**plain, **variables}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_are_not_faulted_in_again():
    kept, faults = run()
    if not kept:
        pytest.skip("the C library has no mallopt")
    left_alone, faults_before = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not left_alone
    assert faults < 1000 < faults_before


def test_peak_grows_by_what_is_held():
    before = peak_bytes()
    held = torch.ones(before // 4 + (64 << 20) // 4)  # more than the process ever held
    assert peak_bytes() - before >= 60 << 20
    assert held[-1] == 1


def test_peak_is_not_that_of_the_parent():
    """A child process inherits the parent's peak in ru_maxrss."""
    held = torch.ones(150 << 20)  # 600 MB
    program = "from iptv2_diffusion.memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes < peak_bytes()
