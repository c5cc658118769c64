"""throughput.py as a user runs it: its last line is JSON with every figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, str(ROOT / "eval" / "throughput.py"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_last_line_holds_every_row():
    done = run("--models", "tiny,dit-emoji64", "--rounds", "2", "--batch_size", "2", "--num_threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["costs"]["tiny"]["gmacs_fused"] < result["costs"]["tiny"]["gmacs_training"]
    rows = {(row["model"], row["what"], row["precision"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * 2
    for row in rows.values():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["ratio"] == pytest.approx(1.0) or row["model"] == "tiny"


def test_unknown_preset_is_one_line():
    done = run("--models", "emojy64", "--num_threads", "1")
    assert done.returncode == 1
    assert "emoji64" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_quick_prints_the_ratios():
    done = run("--quick", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {
        "inference_ratio_to_dit",
        "training_ratio_to_dit",
        "fused_speedup",
        "fraction_of_matmul_rate",
    }
    assert all(value > 0 for value in result.values())
    assert result["fraction_of_matmul_rate"] < 1.05
