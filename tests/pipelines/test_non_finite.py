"""NaN is an error that names the image, the step and the precision, and never a black image."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from tiny_pipelines import save_pipeline

from iptv2_diffusion import IPTV2Pipeline, IPTV2RestorationPipeline, create_model
from iptv2_diffusion.data.latent_encoding import Encoding, check_finite
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.pipelines.restore_cli import main


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    pipe = IPTV2Pipeline.from_pretrained(save_pipeline(tmp_path_factory.mktemp("pipe")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def restorer(scale=1.0):
    torch.manual_seed(0)
    model = create_model("restoration-tiny", sigma_conditioning="map").eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    model.head.weight.data *= scale
    pipe = IPTV2RestorationPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestGeneration:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale", "eta"])
    def test_arguments(self, generator, name, value):
        with pytest.raises(ValueError, match=f"{name} is -?(nan|inf)"):
            generator(0, num_inference_steps=2, **{name: value})
        with pytest.raises(ValueError, match="guidance_interval is"):
            generator(0, num_inference_steps=2, guidance_interval=(value, 1.0))

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
    def test_the_image_the_step_and_the_precision_are_named_and_other_images_kept(self, generator, output_type):
        def spoil(pipe, step, timestep, tensors):
            if step == 1:
                tensors["latents"][2, 0, 0, 0] = torch.nan
            return tensors

        options = {"num_inference_steps": 3, "output_type": output_type}
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        with pytest.raises(NonFiniteImageError, match=r"^image 3 of 4, step 2 of 3: .* float32; weights") as caught:
            generator([0, 1, 2, 0], generator=seeds, callback_on_step_end=spoil, **options)
        assert caught.value.indices == [2]
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        sound = generator([0, 1, 2, 0], generator=seeds, **options).images
        assert np.array_equal(np.asarray(caught.value.images[3]), np.asarray(sound[3]))

    def test_a_vae_that_overflows(self, generator, monkeypatch):
        weight = generator.vae.decoder.conv_out.weight
        monkeypatch.setattr(weight, "data", weight.data * float("inf"))
        with pytest.raises(NonFiniteImageError, match="image 1 of 1, decoding by the VAE"):
            generator(0, num_inference_steps=1)

    def test_a_huge_guidance_scale(self, generator):
        with pytest.raises(NonFiniteImageError, match=r"step \d of 2"):
            generator(0, num_inference_steps=2, guidance_scale=3e38)


class TestRestoration:
    def test_broken_weights(self):
        with pytest.raises(NonFiniteImageError, match=r"image 1 of 2, tile 1 of 1: .* NaN or infinity in float32"):
            restorer(float("nan"))([np.zeros((16, 16, 3), np.uint8)] * 2, sigma=5)

    def test_an_overflow_in_half_precision_suggests_others(self):
        pipe = restorer(1e6)
        with pytest.raises(NonFiniteImageError, match=r"in float16; float16 may overflow: use float32 or bfloat16"):
            pipe.to(torch.float16)(np.zeros((32, 32, 3), np.uint8), sigma=5)

    def test_the_tile_is_named(self, monkeypatch):
        pipe = restorer()
        forward, calls = pipe.model.forward, []

        def broken(image, *args, **kwargs):
            calls.append(1)
            (result,) = forward(image, *args, **kwargs)
            return (result * torch.nan if len(calls) == 4 else result,)

        monkeypatch.setattr(pipe.model, "forward", broken)
        with pytest.raises(NonFiniteImageError, match="tile 4 of 6"):
            pipe(np.zeros((90, 128, 3), np.uint8), sigma=5, tile=64, overlap=16)

    def test_the_command_line_writes_nothing_black_and_continues(self, tmp_path, capsys):
        restorer(float("nan")).save_pretrained(tmp_path / "model")
        for name in ("a.png", "b.jpg"):
            Image.new("RGB", (16, 16), "red").save(tmp_path / name)
        inputs = [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
        command = [*inputs, "-o", str(tmp_path / "out"), "--sigma", "5", "--model", str(tmp_path / "model")]
        assert main(command) == 1
        told = capsys.readouterr().err
        assert told.count("the model returns NaN or infinity in float32") == 2
        assert "a.png failed" in told
        assert "2 of 2 failed" in told
        assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".png", ".jpg")]


def test_latents_that_are_not_finite_are_not_cached():
    good, items = torch.zeros(2, 4, 8, 8), torch.tensor([7, 9])
    check_finite(good, good, items, Encoding())
    with pytest.raises(ValueError, match=r"latents of images 7 to 9 .* float16; use --encode_precision float32"):
        check_finite((good + 1e6).half(), good, items, Encoding())
