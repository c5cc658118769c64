"""cache_latents.py: any number of processes makes one cache, and train_ldm.py reads it."""

import pytest
from ldm_runs import CACHE_SCRIPT, finish, launch


def files(folder):
    """Contents by relative path; index.json names no machine or time, so all must agree."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_make_the_cache_that_training_reads(ground, tmp_path):
    cache = tmp_path / "cache"
    output = finish(launch(ground, tmp_path, "--cache_dir", cache, processes=2, script=CACHE_SCRIPT))
    assert output.count("views/s") == 2  # training and held-out images, each told once
    made = files(cache)
    assert len(made) == 4
    output = finish(launch(ground, tmp_path / "run", "--cache_dir", cache, "--max_train_steps", 1))
    assert "views/s" not in output
    assert files(cache) == made


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_any_number_makes_the_same_cache(ground, tmp_path, processes):
    options = ("--crops", 2, "--heldout_fraction", 0)
    for count in (1, processes):
        cache = ("--cache_dir", tmp_path / str(count))
        finish(launch(ground, tmp_path, *options, *cache, processes=count, script=CACHE_SCRIPT))
    assert files(tmp_path / "1") == files(tmp_path / str(processes))
