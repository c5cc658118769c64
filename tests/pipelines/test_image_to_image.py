"""Image-to-image and inpainting: with the shipped pipeline and real pictures, and with a denoiser that is known."""

import io

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from test_pipeline_iptv2 import PointDenoiser, make_pipeline, seeds

from iptv2_diffusion import DiffusionObjective, IPTV2Img2ImgPipeline, IPTV2InpaintPipeline, IPTV2Pipeline

ASSET = "assets/iptv2-emoji64"
STEPS = 8


@pytest.fixture(scope="module")
def pictures():
    """Two held-out emoji of different classes, 64 x 64."""
    table = pyarrow.parquet.read_table("data/emoji64/heldout.parquet").slice(0, 400).to_pylist()
    rows = [table[0], next(row for row in table if row["label"] != table[0]["label"])]
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


@pytest.fixture(scope="module")
def shipped():
    pipe = IPTV2Pipeline.from_pretrained(ASSET)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def img2img(shipped):
    pipe = IPTV2Img2ImgPipeline.from_pipe(shipped)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inpaint(shipped):
    pipe = IPTV2InpaintPipeline.from_pipe(shipped)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


def known(prediction, scheduler=None, kind=IPTV2Pipeline, base=None):
    """A pipeline around the ideal denoiser of one point a class, or with the components of `base`."""
    trained = DiffusionObjective.make_scheduler(prediction)
    scheduler = trained if scheduler is None else scheduler.from_config(trained.config)
    base = make_pipeline(PointDenoiser(prediction), scheduler) if base is None else base
    pipe = kind(**base.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestImageToImage:
    def test_from_pipe_shares_the_weights(self, shipped, img2img, inpaint):
        for pipe in (img2img, inpaint):
            assert pipe.transformer is shipped.transformer
            assert pipe.vae is shipped.vae
            assert pipe.id2label == shipped.id2label
            assert pipe.config.prediction_type == "flow"
        assert type(IPTV2Pipeline.from_pipe(img2img)) is IPTV2Pipeline

    def test_strength_zero_is_the_round_trip_of_the_vae(self, img2img, pictures):
        shown = img2img("flags", pictures, strength=0, num_inference_steps=STEPS, output_type="pt").images
        x = torch.from_numpy(pixels(pictures) / 127.5 - 1).float().permute(0, 3, 1, 2)
        decoded = img2img.codec.decode(img2img.codec.encode(x, sample_posterior=False))
        torch.testing.assert_close(shown, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)

    def test_strength_moves_away_from_the_picture(self, img2img, pictures):
        distances = []
        for strength in (0, 0.3, 0.6, 0.9):
            changed = img2img(
                "flags", pictures, strength=strength, num_inference_steps=10, generator=seeds(0, 1), guidance_scale=1
            ).images
            distances.append(((pixels(changed) - pixels(pictures)) ** 2).mean(axis=(1, 2, 3)))
        assert (np.diff(distances, axis=0) > 0).all(), distances

    def test_strength_one_of_a_flow_is_a_picture_from_noise(self, shipped, img2img, pictures):
        options = {"num_inference_steps": STEPS, "output_type": "latent"}
        drawn = shipped("flags", generator=seeds(3), **options).images
        changed = img2img("flags", pictures[0], strength=1, generator=seeds(3), **options).images
        torch.testing.assert_close(changed, drawn, rtol=0, atol=1e-4)

    def test_labels_images_and_numbers(self, img2img, pictures):
        options = {"num_inference_steps": 2, "strength": 0.5, "output_type": "latent", "guidance_scale": 1}
        both = img2img(["flags", "symbols"], pictures, num_images_per_label=2, generator=seeds(0, 1, 2, 3), **options)
        alone = img2img("symbols", pictures[1], generator=seeds(3), **options)
        torch.testing.assert_close(both.images[3:], alone.images, rtol=0, atol=1e-4)
        one_picture = img2img(["flags", "symbols"], pictures[1], generator=seeds(9, 3), **options)
        torch.testing.assert_close(one_picture.images[1:], alone.images, rtol=0, atol=1e-4)
        one_label = img2img("symbols", pictures, generator=seeds(9, 3), **options)
        torch.testing.assert_close(one_label.images[1:], alone.images, rtol=0, atol=1e-4)
        unlabelled = img2img(None, pictures, generator=seeds(0, 1), **options)
        assert len(unlabelled.images) == 2
        clean = img2img.codec.encode(
            torch.from_numpy(pixels(pictures[1:]) / 127.5 - 1).float().permute(0, 3, 1, 2), sample_posterior=False
        )
        from_latents = img2img("symbols", clean, generator=seeds(3), **options)
        torch.testing.assert_close(from_latents.images, alone.images, rtol=0, atol=1e-4)

    def test_sizes(self, img2img, pictures):
        wide = img2img("flags", pictures[0], strength=0.3, num_inference_steps=4, height=32, width=48).images[0]
        assert wide.size == (48, 32)
        wide = img2img("flags", pictures[0].resize((96, 64)), strength=0.3, num_inference_steps=4).images[0]
        assert wide.size == (96, 64)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
    def test_noise_is_that_of_the_training(self, prediction):
        """The latents before the first step are those of the objective, for every kind of model."""
        pipe = known(prediction, kind=IPTV2Img2ImgPipeline)
        clean, seen = pipe.transformer.points[1:2].detach(), {}

        def hook(module, arguments, options):
            seen.setdefault("latents", arguments[0].clone())
            seen.setdefault("timestep", options["timestep"].clone())

        handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
        options = {"num_inference_steps": 10, "guidance_scale": 1, "output_type": "latent"}
        result = pipe(1, clean, strength=0.4, generator=seeds(0), **options).images
        handle.remove()
        noise = torch.randn(clean.shape, generator=seeds(0)[0])
        objective = DiffusionObjective(DiffusionObjective.make_scheduler(prediction))
        torch.testing.assert_close(seen["latents"], objective.add_noise(clean, noise, seen["timestep"]))
        assert 250 < seen["timestep"].item() < 450
        torch.testing.assert_close(result, clean, rtol=0, atol=2e-3)  # its own point

    @pytest.mark.parametrize(
        ("prediction", "scheduler"),
        [
            ("epsilon", DDIMScheduler),
            ("epsilon", DDPMScheduler),
            ("epsilon", DPMSolverMultistepScheduler),
            ("v_prediction", EulerDiscreteScheduler),
            ("v_prediction", HeunDiscreteScheduler),
            ("v_prediction", UniPCMultistepScheduler),
            ("flow", FlowMatchHeunDiscreteScheduler),
        ],
    )
    def test_every_scheduler_arrives_and_keeps_what_is_known(self, prediction, scheduler):
        base = known(prediction, scheduler)
        options = {"num_inference_steps": 10, "guidance_scale": 1, "output_type": "latent", "generator": seeds(0)}
        start = torch.randn(1, 4, 8, 8, generator=seeds(5)[0])
        changed = known(prediction, kind=IPTV2Img2ImgPipeline, base=base)(2, start, strength=0.7, **options).images
        point = base.transformer.points[2:3]
        torch.testing.assert_close(changed, point, rtol=0, atol=0.05)
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8] = 1
        pipe = known(prediction, kind=IPTV2InpaintPipeline, base=base)
        changed = pipe(2, start, mask, strength=0.7, **options).images
        assert torch.equal(changed[..., 4:], start[..., 4:])
        torch.testing.assert_close(changed[..., :4], point[..., :4], rtol=0, atol=0.05)
        assert base(2, **options).images.isfinite().all()  # the shared scheduler begins at its first step again

    def test_callbacks_see_the_steps_that_are_done(self, img2img, pictures):
        steps = []
        img2img(
            "flags",
            pictures[0],
            strength=0.5,
            num_inference_steps=6,
            callback_on_step_end=lambda pipe, step, t, tensors: steps.append((step, float(t))) or {},
        )
        assert [step for step, _ in steps] == [0, 1, 2]
        assert img2img.num_timesteps == 3
        assert steps[0][1] < 600

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strength": 1.5}, r"strength is 1.5; it must be in \[0, 1\]"),
            ({"image": None}, "image is missing; give a PIL image"),
            ({"image": []}, "image is missing"),
            ({"image": "cat.png"}, "incorrect format"),
            ({"image": torch.zeros(1, 2, 64, 64)}, r"image has the shape \(1, 2, 64, 64\); give colour images"),
            ({"image": Image.new("RGB", (66, 64))}, r"width 66 is not a multiple of the VAE's 4; use 64 or 68"),
            ({"image": [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64))]}, r"different sizes \(32x64, 64x64\)"),
            ({"class_labels": ["flags"] * 3, "image": [Image.new("RGB", (64, 64))] * 2}, "3 labels for 2 images"),
            ({"generator": seeds(0, 1)}, "2 generators for 1 images"),
            ({"sigmas": [0.2, 0.9]}, r"sigmas is \[0.2, 0.9\]; give numbers that fall"),
        ],
    )
    def test_wrong_input_is_one_line(self, img2img, pictures, options, message):
        with pytest.raises(ValueError, match=message) as error:
            img2img(**{"class_labels": "flags", "image": pictures[0], "num_inference_steps": 2, **options})
        assert "\n" not in str(error.value)


class TestInpainting:
    def test_the_known_part_is_kept_exactly(self, inpaint, pictures):
        mask = np.zeros((64, 64), np.uint8)
        mask[10:41, 21:50] = 255  # not a multiple of the VAE's factor
        changed = inpaint(
            "flags", pictures, Image.fromarray(mask), num_inference_steps=STEPS, generator=seeds(0, 1)
        ).images
        new, old = pixels(changed), pixels(pictures)
        assert (new[:, mask == 0] == old[:, mask == 0]).all()
        assert (abs(new - old)[:, mask > 0].mean(axis=(1, 2)) > 5).all()

    def test_what_is_drawn_continues_what_is_known(self, inpaint, pictures):
        """The seam: next to the mask the drawn pixels are nearer to the original than in its middle."""
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 16:48] = 255
        options = {"num_inference_steps": 12, "num_images_per_label": 4, "generator": seeds(*range(4))}
        old = pixels(pictures[:1])
        new = pixels(inpaint(None, pictures[0], Image.fromarray(mask), **options).images)
        errors = abs(new - old).mean(axis=(0, 3))
        rim = np.concatenate([errors[16, 16:48], errors[47, 16:48], errors[16:48, 16], errors[16:48, 47]])
        assert rim.mean() < errors[24:40, 24:40].mean()

    def test_masks_of_any_kind(self, inpaint, pictures):
        options = {"num_inference_steps": 2, "output_type": "np"}
        array = np.zeros((64, 64), np.float32)
        array[:32] = 1
        kinds = (array, torch.from_numpy(array)[None, None], Image.fromarray((array * 255).astype(np.uint8)))
        drawn = [inpaint("flags", pictures[0], mask, generator=seeds(0), **options).images for mask in kinds]
        assert all(np.array_equal(one, drawn[0]) for one in drawn[1:])
        two = np.stack([array, 1 - array])
        both = inpaint("flags", pictures[0], two, generator=seeds(0, 1), **options).images
        assert len(both) == 2
        old = np.asarray(pictures[0]) / 255
        assert np.allclose(both[0, 32:], old[32:], atol=1e-6)
        assert np.allclose(both[1, :32], old[:32], atol=1e-6)
        empty = inpaint("flags", pictures[0], np.zeros_like(array), **options).images
        assert np.allclose(empty[0], old, atol=1e-6)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (None, "mask_image is missing; give an image that is white where"),
            (torch.zeros(1, 3, 64, 64), r"mask_image has shape \(1, 3, 64, 64\); give one channel"),
            (torch.zeros(3, 1, 64, 64), "3 masks for 2 images; give one, or one per image"),
        ],
    )
    def test_wrong_masks_are_one_line(self, inpaint, pictures, mask, message):
        with pytest.raises(ValueError, match=message) as error:
            inpaint("flags", pictures, mask, num_inference_steps=2)
        assert "\n" not in str(error.value)

    def test_it_is_saved_and_loaded(self, tmp_path):
        IPTV2InpaintPipeline.from_pipe(make_pipeline()).save_pretrained(tmp_path)
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is IPTV2InpaintPipeline
        assert type(IPTV2Pipeline.from_pretrained(tmp_path)) is IPTV2Pipeline


def test_auto_pipelines_know_only_those_of_diffusers(shipped):
    """As the page says; `from_pipe` of our classes takes their place."""
    with pytest.raises(ValueError, match="can't find a pipeline linked to IPTV2Pipeline"):
        AutoPipelineForImage2Image.from_pipe(shipped)


class TestOwnSteps:
    def test_sigmas_of_a_flow(self):
        pipe = known("flow")
        seen = []
        options = {"guidance_scale": 1, "output_type": "latent", "generator": seeds(0)}
        pipe(1, sigmas=[1.0, 0.6, 0.1], callback_on_step_end=lambda _, i, t, x: seen.append(float(t)) or {}, **options)
        assert seen == pytest.approx([1000, 600, 100])
        by_number = pipe(1, num_inference_steps=4, **options).images
        by_sigmas = pipe(1, sigmas=[1.0, 0.75, 0.5, 0.25], **options).images
        assert pipe.num_timesteps == 4
        assert by_number.shape == by_sigmas.shape

    def test_timesteps_of_noise_prediction(self):
        pipe = known("epsilon", DPMSolverMultistepScheduler)
        seen = []
        pipe(1, timesteps=[999, 500, 20], callback_on_step_end=lambda _, i, t, x: seen.append(int(t)) or {})
        assert seen == [999, 500, 20]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sigmas": []}, "sigmas is .*; give numbers that fall"),
            ({"timesteps": [10, 500]}, r"timesteps is \[10, 500\]; give numbers that fall, from noise to image"),
            ({"sigmas": [3.0, 1.0]}, "DDIMScheduler takes no sigmas; leave them out, or use another scheduler"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, options, message):
        with pytest.raises(ValueError, match=message) as error:
            known("epsilon", DDIMScheduler)(1, **options)
        assert "\n" not in str(error.value)

    def test_not_both(self):
        with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas` can be passed"):
            known("v_prediction", EulerDiscreteScheduler)(1, sigmas=[3.0, 1.0], timesteps=[9, 1])
