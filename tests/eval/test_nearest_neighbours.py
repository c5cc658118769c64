"""nearest_neighbours.py on a tiny pipeline and a folder of images; its distances: tests/evaluation/."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from kl_vae import make_kl_vae
from PIL import Image
from script_loading import load_script

from iptv2_diffusion import IPTV2Pipeline, create_model
from iptv2_diffusion.training.errors import UserError

SCRIPT = Path(__file__).parents[2] / "eval" / "nearest_neighbours.py"


@pytest.fixture(scope="module")
def script():
    return load_script("eval/nearest_neighbours.py")


def test_the_script_writes_its_figures_and_picture(script, tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for name in ("train/cat/0", "train/cat/1", "train/dog/2", "heldout/cat/3", "heldout/dog/4"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    vae = make_kl_vae(4, 4)
    pipelines = {"labelled": {"num_class_embeds": 2}, "plain": {"num_class_embeds": None}}
    for name, options in pipelines.items():
        model = create_model("tiny", sample_size=8, in_channels=4, out_channels=4, **options).eval()
        names = {0: "cat", 1: "dog"} if name == "labelled" else None
        scheduler = FlowMatchEulerDiscreteScheduler()
        IPTV2Pipeline(model, vae, scheduler, id2label=names).save_pretrained(tmp_path / name)

    def run(name):
        words = ["--pipeline", tmp_path / name, "--data", tmp_path / "images", "--output_dir", tmp_path / "out"]
        words += ["--resolution", 16, "--per_class", 3, "--num_inference_steps", 1]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        return script.main()

    assert run("labelled") == 0
    result = json.loads((tmp_path / "out" / "neighbours.json").read_text())
    assert result["samples"] == 6
    assert 0 < result["heldout_to_train"]["min"] <= result["heldout_to_train"]["median"]
    assert Image.open(tmp_path / "out" / "neighbours.png").height > 4 * 16
    assert "neighbours.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="is unconditional"):
        run("plain")
