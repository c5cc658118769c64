"""The whole path over a real pretrained VAE: cache, train, sample, decode, score.

IPTV2_TAESD names a folder with TAESD as diffusers saves it, such as a download of madebyollin/taesd.
"""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderTiny
from ldm_runs import ROOT, SCRIPT, log, words
from photographs import photograph
from PIL import Image
from script_loading import load_script

from iptv2_diffusion import IPTV2Pipeline, LatentCodec
from iptv2_diffusion.data.images import load_image_dataset
from iptv2_diffusion.data.latent_cache import LatentCache

TAESD = os.environ.get("IPTV2_TAESD", "")
needs_taesd = pytest.mark.skipif(not TAESD, reason="IPTV2_TAESD names no folder with TAESD (madebyollin/taesd)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of six pieces of photographs, enlarged to 512 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(12):
        label = folder / ("even", "odd")[index % 2]
        label.mkdir(exist_ok=True)
        Image.fromarray(photograph(index, 150, 150)).resize((512, 512)).save(label / f"{index}.png")
    return folder


@pytest.mark.slow
@needs_taesd
@pytest.mark.parametrize("size", [256, 512])
def test_a_pretrained_vae_from_photographs_to_scored_samples(folder, ground, tmp_path, monkeypatch, size):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = ("--data", folder, "--vae", TAESD, "--resolution", size, "--cache_dir", tmp_path / "cache")
    run = ("--max_train_steps", 2, "--batch_size", 2, "--eval_every", 2, "--kid_samples", 4, "--kid_every", 2)
    try:
        assert load_script(SCRIPT).main(words(ground, tmp_path / "run", *options, *run)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    caches = [LatentCache(path.parent) for path in (tmp_path / "cache").glob("*/index.json")]
    assert len(caches) == 2
    for cache in caches:
        assert cache.latent_shape == (4, size // 8, size // 8)
        assert not cache.has_spread  # no posterior
        assert 0.5 < cache.deviation() < 1.5
    rows = {name: value for row in log(tmp_path / "run") for name, value in row.items()}
    assert {"heldout_loss", "kid", "kid_error"} <= rows.keys()

    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(pipeline.vae, AutoencoderTiny)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("odd", num_inference_steps=2).images[0].size == (size, size)

    codec = LatentCodec(pipeline.vae)
    image = load_image_dataset(folder)[0]["image"]["path"]
    pixels = torch.frombuffer(bytearray(Image.open(image).resize((size, size)).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, size, size, 3).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = codec.decode(codec.encode(pixels)).clamp(-1, 1)
    assert 10 * torch.log10(4 / (decoded - pixels).square().mean()) > 18  # dB
