"""Loading by diffusers' own classes in a new process: what works, and what diffusers says without our import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_IMPORT = """
import {first}, {second}
from diffusers import AutoModel, DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("assets/iptv2-emoji64")
restorer = DiffusionPipeline.from_pretrained("assets/iptv2-denoise-color")
print(type(pipeline).__name__, type(pipeline.vae).__name__, type(restorer).__name__)
for folder, subfolder in (
    ("assets/iptv2-emoji64", "transformer"),
    ("assets/iptv2-emoji64/transformer", None),
    ("assets/iptv2-denoise-color", "model"),
    ("assets/iptv2-denoise-color/model", None),
    ("assets/vae-emoji64", None),
):
    print(type(AutoModel.from_pretrained(folder, subfolder=subfolder)).__name__)
"""
WITHOUT_IMPORT = """
from diffusers import AutoModel, DiffusionPipeline
for call in (
    lambda: DiffusionPipeline.from_pretrained("assets/iptv2-emoji64"),
    lambda: AutoModel.from_pretrained("assets/iptv2-emoji64", subfolder="transformer"),
    lambda: AutoModel.from_pretrained("assets/iptv2-emoji64/transformer"),
):
    try:
        call()
    except Exception as error:
        print(error)
"""


def lines_of(program):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_diffusers_loads_everything_after_our_import():
    expected = ["IPTV2Pipeline AutoencoderKL IPTV2RestorationPipeline"]
    expected += ["IPTV2Transformer2DModel"] * 2 + ["IPTV2RestorationModel"] * 2 + ["AutoencoderKL"]
    assert lines_of(WITH_IMPORT.format(first="diffusers", second="iptv2_diffusion")) == expected


def test_the_page_names_what_diffusers_says_without_it():
    page = (ROOT / "docs/hub.md").read_text(encoding="utf-8")
    told = lines_of(WITHOUT_IMPORT)
    assert len(told) == 3
    for message, documented in zip(
        told,
        (
            "module diffusers has no attribute IPTV2Pipeline",
            "iptv2_diffusion is not one of the libraries Diffusers can load components from",
            "`diffusers` has no class `IPTV2Transformer2DModel`",
        ),
        strict=True,
    ):
        assert documented in message
        assert documented in page
