"""throughput.py as a user runs it: its last line is JSON with every figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_loading import load_script

from iptv2_diffusion import memory
from iptv2_diffusion.training.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, str(ROOT / "eval" / "throughput.py"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def rows_of(monkeypatch, capsys):
    """The script's rows, in this process. Its number of threads, environment and allocator are restored."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()

    def rows_of(*options):
        assert load_script("eval/throughput.py").main(list(options)) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]

    yield rows_of
    torch.set_num_threads(threads)


def test_last_line_holds_every_row():
    unet = "unet-s:block_out_channels=[32,32,32]"
    done = run("--models", f"tiny,{unet},dit-emoji64", "--rounds", "2", "--batch_size", "2", "--num_threads", "1")
    assert done.returncode == 0, done.stderr
    assert "plain formulas" not in done.stdout.splitlines()[0]
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["model"], row["what"], row["precision"]): row for row in result["rows"]}
    gmacs = {what: rows["tiny", what, "float32"]["gmacs"] for what in ("training", "inference")}
    assert gmacs["inference"] < gmacs["training"]  # the former is fused
    assert len(rows) == 3 * 2 * 2
    for row in rows.values():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["ratio"] == pytest.approx(1.0) or row["model"] != "dit-emoji64"


def test_every_form_memory_and_files(rows_of, tmp_path):
    rows = rows_of(
        *("--models", "tiny:layers_per_stage=[1]:grid_stride=1"),
        *("--modes", "inference", "--forms", "fused,unfused", "--precisions", "float32", "--latent_size", "8"),
        *("--batch_size", "1", "--rounds", "1", "--num_threads", "1", "--clock", "cpu", "--memory"),
        *("--output_dir", str(tmp_path)),
    )
    assert {row["form"] for row in rows} == {"fused", "unfused"}
    assert all(row["peak_mb"] > 0 and row["latent"] == 8 and row["of_matmul_rate"] > 0 for row in rows)
    fewer, more = (next(row["gmacs"] for row in rows if row["form"] == form) for form in ("fused", "unfused"))
    assert fewer < more
    assert len((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(rows)
    assert (tmp_path / "inference_memory_over_latent.png").stat().st_size > 1000


def test_restoration_whole_and_tiled(rows_of):
    rows = rows_of(
        *("--models", "restoration-nano", "--megapixels", "0.06", "--tiles", "none,128", "--rounds", "1"),
        *("--num_threads", "1"),
    )
    assert [row["tile"] for row in rows] == ["none", "128"]
    assert rows[0]["s_per_megapixel"] < rows[1]["s_per_megapixel"]  # tiles overlap


def test_plain_formulas_can_be_timed():
    words = ("--models", "tiny", "--modes", "training", "--rounds", "1", "--num_threads", "1")
    done = run(*words, "--precisions", "float32", "--kernels", "off")
    assert done.returncode == 0, done.stderr
    assert "plain formulas" in done.stdout.splitlines()[0]


def test_operators(rows_of):
    rows = rows_of("--operators", "--models", "tiny", "--rounds", "1", "--num_threads", "1", "--precisions", "float32")
    assert {"training", "inference"} == {row["what"] for row in rows}
    assert sum(row["tiny"] for row in rows if row["operators"] == "attention") > 0


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("forms", "fussed", "unfused"),
        ("modes", "train", "training"),
        ("tiles", "a", "none"),
        ("cuda_graphs", "true", "--device cuda"),
    ],
)
def test_a_wrong_word_is_one_line(option, value, known):
    done = run(f"--{option}", value)
    assert done.returncode != 0
    assert known in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_unknown_preset_is_one_line(rows_of):
    with pytest.raises(UserError, match="emoji64") as raised:
        rows_of("--models", "emojy64", "--num_threads", "1")
    assert len(str(raised.value).splitlines()) == 1


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
