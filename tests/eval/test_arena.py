"""arena.py and arena_report.py: equal MACs, the grid, full runs, scores, and a second start that trains nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from kl_vae import make_kl_vae
from PIL import Image
from script_loading import load_script

ROOT = Path(__file__).parents[2]
TINY = {"model": "tiny"}
DIT = {"model": "dit-emoji64", "num_attention_heads": 1, "num_layers": 4, "patch_size": 2, "attention_head_dim": 64}


def run(script, *words, check=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "eval" / script), *map(str, words)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """66 training and 66 held-out pictures of two classes, a random VAE, a recipe and an arena of two models."""
    folder = tmp_path_factory.mktemp("arena")
    random = np.random.default_rng(0)
    for split in ("train", "heldout"):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(44 if name == "red" else 22):
                noise = random.integers(0, 55, (16, 16, 3))
                picture = Image.fromarray((np.array(colour) + noise).astype(np.uint8))
                picture.save(folder / "images" / split / name / f"{number}.png")
    torch.manual_seed(0)
    make_kl_vae(4, 4).save_pretrained(folder / "vae")
    recipe = {
        "data": str(folder / "images"),
        "heldout_split": "heldout",
        "resolution": 16,
        "vae": str(folder / "vae"),
        "cache_dir": str(folder / "cache"),
        "objective": "flow",
        "batch_size": 8,
        "eval_every": 4,
        "preview_every": 0,
        "log_every": 1,
        "sample_steps": 1,
        "preview_per_class": 1,
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arena = {
        "size": "tiny",
        "recipe": [str(folder / "recipe.yaml")],
        "max_train_steps": 12,
        "grid_steps": 8,
        "learning_rates": [1e-5, 2e-3],
        "seeds": [0],
        "models": {"iptv2": {"only": TINY}, "dit": {"patch2": {**DIT, "sample_size": 8}}},
        "num_samples": 66,
        "num_inference_steps": 2,
        "variant_column": None,
        "encoder_size": 32,
        "output_dir": str(folder / "runs"),
        "results": str(folder / "results" / "arena.json"),
    }
    (folder / "arena.yaml").write_text(yaml.safe_dump(arena))
    return folder


def test_unequal_macs_are_refused_with_both_figures(ground):
    models = {"iptv2": {"only": TINY}, "dit": {"wide": {**DIT, "num_layers": 9}}}
    words = ("--config", ground / "arena.yaml", "--models", json.dumps(models), "--stop_after", "count")
    result = run("arena.py", *words, check=False)
    assert result.returncode != 0
    assert "dit/wide has" in result.stderr
    assert "% apart, but at most 3 % is allowed" in result.stderr


def test_a_known_rate_needs_no_grid(ground):
    arena = load_script("eval/arena.py")
    known = {"patch2": {**DIT, "learning_rate": 3e-3}}
    config = arena.parse_config(
        arena.ArenaConfig, ["--config", str(ground / "arena.yaml"), "--models", json.dumps({"dit": known})]
    )
    grid, best = arena.run_grid(config, "dit")
    assert not grid
    assert best.learning_rate == 3e-3
    assert arena.count_costs(config)["dit", "patch2"]["parameters"] > 0


@pytest.mark.slow
def test_an_arena_from_training_to_plots(ground):
    pytest.importorskip("efficientnet_lite_pytorch")
    command = ("arena.py", "--config", ground / "arena.yaml", "--tolerance", 10)
    output = run(*command).stdout
    rows = json.loads((ground / "results" / "arena.json").read_text())
    chosen = {row["model"]: row for row in rows if row["chosen"]}
    grid = [row for row in rows if not row["chosen"]]
    assert set(chosen) == {"iptv2", "dit"}
    assert len(grid) == 4
    for name, row in chosen.items():
        own = [r for r in grid if r["model"] == name]
        best = min(own, key=lambda r: r["held_out_loss"])
        assert row["learning_rate"] == best["learning_rate"]  # the grid chooses it
        assert (row["steps"], best["steps"]) == (12, 8)
        assert [step for step, _ in row["held_out_curve"]] == [4, 8, 12]
        for figure in ("kid", "fd_pca64", "fd_train", "held_out_loss", "macs_fused", "macs_train", "parameters"):
            assert np.isfinite(row[figure])
    about = json.loads((ground / "results" / "arena-about.json").read_text())
    reference = about["tiny dit iptv2"]["reference"]
    assert (reference["train_images"], reference["heldout_images"]) == (66, 66)
    assert "training" in output

    again = run(*command).stdout
    assert not [line for line in again.splitlines() if line.startswith("training")]  # finished runs are skipped
    assert json.loads((ground / "results" / "arena.json").read_text()) == rows

    # a grid alone adds its rows to those of other shapes
    other = json.dumps({"dit": {"again": {**DIT, "sample_size": 8}}})
    run(*command, "--models", other, "--stop_after", "grid")
    more = json.loads((ground / "results" / "arena.json").read_text())
    assert more[:-2] == rows
    assert [(row["shape"], row["chosen"], row["kid"]) for row in more[-2:]] == [("again", False, None)] * 2

    report = run("arena_report.py", "--results", ground / "results" / "arena.json", "--runs", ground / "runs").stdout
    assert "| tiny | iptv2 (only" in report
    assert "held-out loss after" in report
    for name in ("arena-curves.png", "arena-samples-tiny.png"):
        Image.open(ground / "results" / name).verify()
