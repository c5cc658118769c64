"""Freed memory stays with the process: counted in page faults, in processes of their own."""

import os
import subprocess
import sys

import pytest

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
