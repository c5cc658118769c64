"""IPTV2Pipeline with real, tiny components, and with a denoiser whose right answer is known."""

import logging
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from kl_vae import make_kl_vae
from PIL import Image
from torch import nn

from iptv2_diffusion import DiffusionObjective, IPTV2Pipeline, IPTV2Transformer2DModel

NAMES = {0: "cat", 1: "dog, hound", 2: "red panda"}
SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
]


def make_vae() -> AutoencoderKL:
    """2 times smaller, 4 channels."""
    torch.manual_seed(0)
    return make_kl_vae(8, 16, norm_num_groups=4, sample_size=16)


def make_transformer(kind: str = "iptv2", **config) -> ModelMixin:
    """An untrained denoiser of 8 x 8 latents in which every part, including the label, affects the output."""
    torch.manual_seed(1)
    if kind == "dit":
        options = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
        }
        model = DiTTransformer2DModel(**{**options, "out_channels": 4, "num_embeds_ada_norm": 3, **config})
    else:
        options = {"channels": 8, "layers_per_stage": (1, 1, 1), "num_attention_heads": 1, "window_size": 4}
        options |= {"grid_stride": (2, 1), "conditioning_dim": 16, "sample_size": 8, "num_class_embeds": 3}
        model = IPTV2Transformer2DModel(**{**options, **config})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pipeline(transformer=None, scheduler=None, **config) -> IPTV2Pipeline:
    pipe = IPTV2Pipeline(
        transformer if transformer is not None else make_transformer(),
        make_vae(),
        # v-prediction: the latents of an untrained model stay of the size of noise
        scheduler if scheduler is not None else DiffusionObjective.make_scheduler("v_prediction"),
        **{"id2label": NAMES, **config},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


class PointDenoiser(ModelMixin, ConfigMixin):
    """The ideal denoiser of a data set with one point per class: every scheduler must arrive at the point.

    The null label has its own point, so that guidance w must arrive at null + w (point - null).
    """

    @register_to_config
    def __init__(self, prediction_type="epsilon", sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (num_class_embeds + 1, in_channels, sample_size, sample_size)
        self.points = nn.Parameter(torch.randn(shape, generator=generator))
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        x0 = self.points[class_labels]
        if self.config.prediction_type == "flow":
            return ((hidden_states - x0) / (timestep.view(-1, 1, 1, 1) / 1000),)
        alpha_bar = self.alphas_cumprod[timestep.round().long()].view(-1, 1, 1, 1)
        epsilon = (hidden_states - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        if self.config.prediction_type == "v_prediction":
            output = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
        else:
            output = epsilon
        if self.config.out_channels == 2 * self.config.in_channels:
            output = torch.cat([output, torch.full_like(output, -1)], dim=1)
        return (output,)


def sampled(pipe, *args, **kwargs) -> torch.Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


class TestSchedulers:
    @pytest.mark.parametrize("scheduler_class", SCHEDULERS)
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("learned", [False, True])
    def test_ideal_denoiser_arrives_at_its_point(self, scheduler_class, prediction_type, learned):
        model = PointDenoiser(prediction_type, out_channels=8 if learned else 4)
        trained_with = DiffusionObjective.make_scheduler(prediction_type, learned_variance=learned)
        pipe = make_pipeline(model, scheduler_class.from_config(trained_with.config))
        latents = sampled(pipe, [0, 2], num_inference_steps=10, guidance_scale=1.0, generator=seeds(0, 1))
        # "linspace", the spacing of a learned variance, ends at t = 0 and not at no noise at all
        atol = 0.05 if learned else 1e-3
        torch.testing.assert_close(latents, model.points[[0, 2]], rtol=0, atol=atol)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_flow_matching_arrives_at_its_point(self, shift):
        model = PointDenoiser("flow")
        pipe = make_pipeline(model, DiffusionObjective.make_scheduler("flow", shift=shift))
        latents = sampled(pipe, [1, 2], num_inference_steps=7, guidance_scale=1.0)
        torch.testing.assert_close(latents, model.points[[1, 2]], rtol=0, atol=1e-4)

    def test_ddpm_draws_noise_of_the_learned_variance(self):
        """The variance channels reach the scheduler: v = 1 (beta) adds more noise than v = -1 (posterior)."""

        def first_step(variance: float) -> torch.Tensor:
            class Constant(PointDenoiser):
                def forward(self, *args, **kwargs):
                    output = super().forward(*args, **kwargs)[0]
                    output[:, 4:] = variance
                    return (output,)

            pipe = make_pipeline(
                Constant(out_channels=8), DiffusionObjective.make_scheduler("epsilon", learned_variance=True)
            )
            steps = []
            sampled(
                pipe,
                0,
                num_inference_steps=50,
                generator=seeds(0),
                callback_on_step_end=lambda _, i, t, tensors: steps.append(tensors["latents"]) or {},
            )
            return steps[48]

        small, large = first_step(-1.0), first_step(1.0)
        points = PointDenoiser().points
        guided = points[3] + 4 * (points[0] - points[3])
        assert (large - guided).std() > 1.5 * (small - guided).std()

    def test_learned_range_without_variance_channels_is_refused(self):
        pipe = make_pipeline(scheduler=DiffusionObjective.make_scheduler("epsilon", learned_variance=True))
        with pytest.raises(ValueError, match=r"learned_range.*needs a transformer with 2 x 4 output channels"):
            pipe(0, num_inference_steps=2)

    def test_scheduler_of_the_other_kind_is_refused(self, tmp_path):
        """Otherwise the pipeline would run and draw noise."""
        flow, noise = (DiffusionObjective.make_scheduler(kind) for kind in ("flow", "epsilon"))
        pipe = make_pipeline(scheduler=flow)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(flow.config)
        with pytest.raises(
            ValueError, match=r"trained for flow matching, but DPMSolver.* use one such as FlowMatchEuler"
        ):
            pipe(0, num_inference_steps=2)
        pipe.save_pretrained(tmp_path)  # with that scheduler
        for options in ({}, {"scheduler": DDIMScheduler(clip_sample=False)}):
            with pytest.raises(ValueError, match="trained for flow matching"):
                IPTV2Pipeline.from_pretrained(tmp_path, **options)(0, num_inference_steps=2)
        pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        assert pipe(0, num_inference_steps=2, output_type="pt").images.isfinite().all()
        pipe = make_pipeline(scheduler=noise)
        pipe.scheduler = flow
        with pytest.raises(ValueError, match="trained for noise or v-prediction, but FlowMatchEuler"):
            pipe(0, num_inference_steps=2)

    def test_scheduler_that_clips_latents_is_reported(self, caplog):
        pipe = make_pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction"))
        with caplog.at_level(logging.WARNING):
            pipe(0, num_inference_steps=1)
        assert "clip_sample=True" in caplog.text

    def test_ddim_eta_is_passed_on(self):
        pipe = make_pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
        results = [sampled(pipe, 0, num_inference_steps=3, generator=seeds(0), eta=eta) for eta in (0.0, 0.0, 1.0)]
        assert results[0].equal(results[1])
        assert not results[0].equal(results[2])


class TestGuidance:
    def test_guides_all_channels_equally(self):
        model = PointDenoiser()
        pipe = make_pipeline(model, DDIMScheduler.from_config(DiffusionObjective.make_scheduler("epsilon").config))
        latents = sampled(pipe, 1, num_inference_steps=10, guidance_scale=2.5)
        point, null = model.points[1], model.points[3]
        torch.testing.assert_close(latents[0], null + 2.5 * (point - null), rtol=0, atol=2e-3)

    @pytest.mark.parametrize(
        ("options", "batches"),
        [
            ({"guidance_scale": 1.0}, [2, 2, 2, 2]),
            ({"guidance_scale": 3.0}, [4, 4, 4, 4]),
            ({"guidance_scale": 3.0, "guidance_interval": (0.25, 0.75)}, [2, 4, 4, 2]),
        ],
    )
    def test_pair_is_one_forward_and_only_where_guidance_acts(self, options, batches):
        pipe, seen = make_pipeline(), []
        pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        pipe(["cat", "dog"], num_inference_steps=4, **options)
        assert seen == batches

    def test_rescale_keeps_the_deviation_of_the_unguided_prediction(self):
        def outputs(**options):
            kept = []
            sampled(
                make_pipeline(),
                0,
                num_inference_steps=1,
                generator=seeds(0),
                callback_on_step_end=lambda _, i, t, tensors: kept.append(tensors["model_output"]) or {},
                callback_on_step_end_tensor_inputs=["model_output"],
                **options,
            )
            return kept[0]

        plain = outputs(guidance_scale=1.0)
        guided = outputs(guidance_scale=20.0)
        rescaled = outputs(guidance_scale=20.0, guidance_rescale=1.0)
        assert guided.std() > 1.05 * plain.std()
        torch.testing.assert_close(rescaled.std(), plain.std())
        torch.testing.assert_close(rescaled / rescaled.std(), guided / guided.std(), rtol=1e-3, atol=1e-4)

    def test_guider_replaces_the_arguments(self):
        pipe = make_pipeline()
        by_arguments = sampled(
            pipe, 0, num_inference_steps=3, generator=seeds(0), guidance_scale=2.0, guidance_interval=(0.0, 0.7)
        )
        guider = ClassifierFreeGuidance(guidance_scale=2.0, stop=0.7)
        assert sampled(pipe, 0, num_inference_steps=3, generator=seeds(0), guider=guider).equal(by_arguments)
        assert pipe.guidance_scale == 2.0
        projected = AdaptiveProjectedGuidance(guidance_scale=2.0)
        other = sampled(pipe, 0, num_inference_steps=3, generator=seeds(0), guider=projected)
        assert other.isfinite().all()
        assert not other.equal(by_arguments)

    def test_momentum_of_a_guider_acts_and_starts_anew_with_each_call(self):
        pipe, options = make_pipeline(), {"num_inference_steps": 3}
        without = sampled(pipe, 0, generator=seeds(0), guider=AdaptiveProjectedGuidance(guidance_scale=3.0), **options)
        guider = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5)
        first, second = (sampled(pipe, 0, generator=seeds(0), guider=guider, **options) for _ in range(2))
        assert not first.equal(without)
        assert first.equal(second)

    def test_guider_that_needs_more_is_refused(self):
        with pytest.raises(ValueError, match="SkipLayerGuidance needs more"):
            make_pipeline()(0, guider=SkipLayerGuidance(skip_layer_config=LayerSkipConfig(indices=[0], fqn="backbone")))

    def test_guiders_do_not_warn_on_every_call(self, caplog):
        with caplog.at_level(logging.WARNING):
            make_pipeline()(0, num_inference_steps=1)
        assert "experimental" not in caplog.text


class TestLabels:
    def test_names_synonyms_and_ids(self):
        pipe = make_pipeline()
        assert pipe.get_label_ids(["cat", "hound", "dog", "dog, hound", 2]) == [0, 1, 1, 1, 2]
        assert pipe.get_label_ids("red panda") == [2]
        assert pipe.get_label_ids(np.int64(1)) == [1]
        assert pipe.get_label_ids(torch.tensor([2, 0])) == [2, 0]
        assert pipe.get_label_ids(np.array([2, 0])) == [2, 0]
        assert pipe.get_label_ids(range(3)) == [0, 1, 2]

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown class name 'Red Pandas'; the nearest of 5 names: red panda"):
            make_pipeline()("Red Pandas")
        with pytest.raises(ValueError, match=r"unknown class name 'zzzzzz'.*cat"):
            make_pipeline()("zzzzzz")
        with pytest.raises(ValueError, match="no class names"):
            make_pipeline(id2label=None)("cat")

    @pytest.mark.parametrize("label", [-1, 3])
    def test_id_out_of_range_names_the_numbers(self, label):
        with pytest.raises(ValueError, match=f"class label {label} is out of range; the model has classes 0 to 2"):
            make_pipeline()(label)

    @pytest.mark.parametrize("label", [1.0, None, torch.tensor([1.0])], ids=repr)
    def test_labels_that_are_neither_names_nor_numbers(self, label):
        with pytest.raises(TypeError, match=r"class label (1\.0|None) is neither a class name nor a whole number"):
            make_pipeline().get_label_ids([0, label] if label is None else label)

    def test_images_of_a_label_follow_one_another(self):
        model = PointDenoiser()
        pipe = make_pipeline(model, DiffusionObjective.make_scheduler("epsilon"))
        latents = sampled(pipe, ["dog", "cat"], num_images_per_label=2, num_inference_steps=5, guidance_scale=1.0)
        torch.testing.assert_close(latents, model.points[[1, 1, 0, 0]], rtol=0, atol=1e-3)

    def test_without_a_label_the_null_label_is_drawn(self):
        model = PointDenoiser()
        pipe = make_pipeline(model, DiffusionObjective.make_scheduler("epsilon"))
        latents = sampled(pipe, num_images_per_label=2, num_inference_steps=5)
        torch.testing.assert_close(latents, model.points[[3, 3]], rtol=0, atol=1e-3)

    def test_empty_and_zero_are_refused(self):
        with pytest.raises(ValueError, match="class_labels is empty"):
            make_pipeline()([])
        with pytest.raises(ValueError, match="num_images_per_label is 0"):
            make_pipeline()(0, num_images_per_label=0)
        with pytest.raises(ValueError, match="num_inference_steps is 0"):
            make_pipeline()(0, num_inference_steps=0)

    def test_unconditional_model(self):
        pipe = make_pipeline(make_transformer(num_class_embeds=None), id2label=None)
        assert len(pipe(num_images_per_label=3, num_inference_steps=2).images) == 3
        with pytest.raises(ValueError, match="unconditional"):
            pipe(0)


class TestSeeds:
    @pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler])
    def test_a_seed_gives_its_image_in_any_batch(self, scheduler_class):
        pipe = make_pipeline(scheduler=scheduler_class.from_config(make_pipeline().scheduler.config))
        labels, numbers = [0, 1, 2, 1], [5, 6, 7, 8]
        options = {"num_inference_steps": 4, "output_type": "np"}
        together = pipe(labels, generator=seeds(*numbers), **options).images
        for i, (label, number) in enumerate(zip(labels, numbers, strict=True)):
            assert np.abs(pipe(label, generator=seeds(number), **options).images[0] - together[i]).max() <= 2 / 255
        swapped = pipe(labels[::-1], generator=seeds(*numbers[::-1]), **options).images
        assert np.abs(swapped[::-1] - together).max() <= 2 / 255
        assert np.abs(together[1] - together[3]).max() > 2 / 255

    def test_single_generator_repeats(self):
        pipe = make_pipeline()
        first, second, third = (
            sampled(pipe, [0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
        )
        assert first.equal(second)
        assert not first.equal(third)

    def test_given_latents_are_where_it_starts(self):
        pipe = make_pipeline(scheduler=EulerDiscreteScheduler.from_config(make_pipeline().scheduler.config))
        drawn = sampled(pipe, 0, num_inference_steps=2, generator=seeds(4))
        noise = torch.randn(1, 4, 8, 8, generator=seeds(4)[0])
        assert sampled(pipe, 0, num_inference_steps=2, latents=noise).equal(drawn)
        with pytest.raises(ValueError, match=r"latents are \(1, 4, 8, 8\); 2 images of this size need \(2, 4, 8, 8\)"):
            pipe([0, 1], latents=noise)

    def test_seeds_mean_the_same_noise_in_half_precision(self):
        full = sampled(make_pipeline(), 0, num_inference_steps=2, generator=seeds(0))
        pipe = make_pipeline()
        nn.Module.to(pipe.transformer, torch.bfloat16)
        half = sampled(pipe, 0, num_inference_steps=2, generator=seeds(0))
        assert half.dtype == torch.float32
        assert (half - full).std() < 0.05 * full.std()

    def test_wrong_number_of_generators(self):
        with pytest.raises(ValueError, match="2 generators for 3 images"):
            make_pipeline()([0, 1, 2], generator=seeds(0, 1))


class TestOutputs:
    def test_types_agree(self):
        pipe = make_pipeline()
        images = {
            kind: pipe([0, 1], num_inference_steps=2, generator=seeds(0, 1), output_type=kind).images
            for kind in ("pil", "np", "pt", "latent")
        }
        assert [image.size for image in images["pil"]] == [(16, 16)] * 2
        assert isinstance(images["pil"][0], Image.Image)
        assert images["np"].shape == (2, 16, 16, 3)
        assert images["pt"].shape == (2, 3, 16, 16)
        assert 0 <= images["np"].min() <= images["np"].max() <= 1
        np.testing.assert_allclose(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
        np.testing.assert_allclose(np.stack(images["pil"]) / 255, images["np"], atol=0.51 / 255)
        decoded = pipe.codec.decode(images["latent"])
        torch.testing.assert_close((decoded.detach() / 2 + 0.5).clamp(0, 1), images["pt"])

    def test_tuple(self):
        assert len(make_pipeline()(0, num_inference_steps=1, return_dict=False)[0]) == 1

    def test_unknown_type(self):
        with pytest.raises(ValueError, match="output_type is 'jpg'; use one of pil, np, pt, latent"):
            make_pipeline()(0, output_type="jpg")


class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(16, 24), (22, 10), (2, 34), (6, 6)])
    def test_any_size_the_vae_allows(self, height, width):
        image = make_pipeline()(0, height=height, width=width, num_inference_steps=1).images[0]
        assert image.size == (width, height)

    def test_size_that_it_does_not_allow(self):
        with pytest.raises(ValueError, match="height 25 is not a multiple of the VAE's 2; use 24 or 26"):
            make_pipeline()(0, height=25)

    def test_default_is_the_size_trained_at(self):
        pipe = make_pipeline(make_transformer(sample_size=(4, 6)))
        assert pipe(0, num_inference_steps=1).images[0].size == (12, 8)

    @torch.no_grad()
    def test_tiled_decoding(self):
        pipe = make_pipeline()
        pipe.enable_vae_tiling(16)
        assert pipe(0, height=40, width=20, num_inference_steps=1).images[0].size == (20, 40)
        assert pipe.codec._tile == 8
        pipe.disable_vae_tiling()
        assert pipe.codec._tile is None
        with pytest.raises(ValueError, match="tile_size 15"):
            pipe.enable_vae_tiling(15)


class TestCallbacks:
    def test_sees_every_step_and_what_it_returns_is_used(self):
        model = PointDenoiser()
        pipe = make_pipeline(model, DiffusionObjective.make_scheduler("epsilon"))
        steps = []

        def change(pipeline, step, timestep, tensors):
            assert pipeline is pipe
            assert set(tensors) == {"latents", "class_labels"}
            steps.append((step, int(timestep)))
            if step == 1:
                return {"class_labels": torch.full_like(tensors["class_labels"], 2)}
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

        options = {"num_inference_steps": 4, "guidance_scale": 1.0}
        names = ["latents", "class_labels"]
        last = sampled(pipe, 0, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names, **options)
        assert steps == [(0, 999), (1, 749), (2, 499), (3, 249)]
        assert last.eq(0).all()
        assert pipe.num_timesteps == 4

        relabel = lambda _, step, t, tensors: {"class_labels": torch.tensor([2])}  # noqa: E731
        torch.testing.assert_close(
            sampled(pipe, 0, callback_on_step_end=relabel, **options)[0], model.points[2], rtol=0, atol=1e-3
        )

    def test_interrupt_skips_the_rest(self):
        pipe, seen = make_pipeline(), []

        def stop(pipeline, step, timestep, tensors):
            seen.append(step)
            pipeline._interrupt = step == 1

        assert len(pipe(0, num_inference_steps=5, callback_on_step_end=stop).images) == 1
        assert seen == [0, 1]
        assert pipe.interrupt

    def test_unknown_tensor(self):
        with pytest.raises(ValueError, match="callbacks receive latents, class_labels, model_output, not"):
            make_pipeline()(0, callback_on_step_end_tensor_inputs=["prompt_embeds"])


class TestDiT:
    """The baseline shares the pipeline."""

    @pytest.mark.parametrize("out_channels", [4, 8])
    def test_samples_with_guidance(self, out_channels):
        scheduler = DiffusionObjective.make_scheduler("epsilon", learned_variance=out_channels == 8)
        pipe = make_pipeline(make_transformer("dit", out_channels=out_channels), scheduler)
        assert pipe.num_classes == 3
        assert len(pipe(["cat", 2], num_inference_steps=2).images) == 2

    def test_takes_square_latents_of_whole_patches(self):
        pipe = make_pipeline(make_transformer("dit"))
        assert pipe(0, height=24, width=24, num_inference_steps=1).images[0].size == (24, 24)
        for height, width in ((16, 24), (18, 18)):
            with pytest.raises(ValueError, match="multiples of its patch size 2"):
                pipe(0, height=height, width=width)


class TestComponents:
    def test_disagreeing_channels_are_named(self):
        with pytest.raises(ValueError, match="takes 3 channels, but the VAE's latents have 4"):
            make_pipeline(make_transformer(in_channels=3))
        with pytest.raises(ValueError, match="returns 5 channels for latents of 4"):
            make_pipeline(make_transformer(out_channels=5))
        with pytest.raises(ValueError, match="id2label names class 3, but the transformer has classes 0 to 2"):
            make_pipeline(id2label={3: "fox"})

    @pytest.mark.parametrize("vae_class", [AutoencoderKL, AutoencoderTiny, AutoencoderDC])
    def test_every_vae_that_the_codec_documents_is_an_expected_type(self, vae_class):
        assert vae_class in IPTV2Pipeline._get_signature_types()["vae"]  # otherwise from_pipe drops the VAE

    def test_from_pipe_shares_the_components_and_keeps_the_settings(self):
        pipe = make_pipeline()
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        same, other = IPTV2Pipeline.from_pipe(pipe), IPTV2Pipeline.from_pipe(pipe, scheduler=scheduler)
        assert (same.transformer, same.vae, same.scheduler) == (pipe.transformer, pipe.vae, pipe.scheduler)
        assert same.config.id2label == pipe.config.id2label
        assert same.config.prediction_type == other.config.prediction_type == "v_prediction"
        options = {"num_inference_steps": 2, "output_type": "pt"}
        expected = pipe("cat", generator=seeds(0), **options).images
        assert same("cat", generator=seeds(0), **options).images.equal(expected)
        assert other.scheduler is scheduler
        assert not other("cat", generator=seeds(0), **options).images.equal(expected)

    def test_without_a_vae_it_gives_latents(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        bare = IPTV2Pipeline.from_pretrained(tmp_path, vae=None)
        options = {"num_inference_steps": 2, "generator": seeds(0)[0]}
        latents = bare("cat", output_type="latent", **options).images
        options["generator"] = seeds(0)[0]
        assert latents.equal(pipe("cat", output_type="latent", **options).images)
        with pytest.raises(ValueError, match="this pipeline has no VAE for output_type 'pil'"):
            bare("cat", **options)
        with pytest.raises(ValueError, match="no VAE: use output_type='latent' and leave height and width out"):
            bare("cat", output_type="latent", height=32, **options)

    def test_offload_order_names_the_models(self):
        pipe = make_pipeline(guidance_model=make_transformer())
        assert set(pipe.model_cpu_offload_seq.split("->")) == {
            name for name, component in pipe.components.items() if isinstance(component, nn.Module)
        }

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves models to an accelerator")
    @pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
    def test_offloaded_models_give_the_same_image(self, offload):
        options = {"num_inference_steps": 3, "output_type": "np"}
        expected = make_pipeline()([0, 1], generator=seeds(0, 1), **options).images
        pipe = make_pipeline()
        getattr(pipe, offload)()
        assert np.abs(pipe([0, 1], generator=seeds(0, 1), **options).images - expected).max() <= 2 / 255


def test_the_example_of_the_documentation_runs(monkeypatch):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "diffusers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(root)
    names: dict = {}
    exec(page.split("```python")[1].split("```")[0], names)
    assert [image.size for image in names["images"]] == [(64, 64), (64, 64)]
    assert names["pipe"].interrupt


LOAD_IN_FRESH_PROCESS = """
import sys
import numpy as np, torch
folder = sys.argv[1]
from iptv2_diffusion import IPTV2Pipeline
def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("hound", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
np.save(folder + "/ours.npy", images(IPTV2Pipeline.from_pretrained(folder)))
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe) is IPTV2Pipeline, type(pipe)
np.save(folder + "/plain.npy", images(pipe))
"""


class TestSaving:
    @pytest.mark.parametrize("kind", ["iptv2", "dit"])
    def test_round_trip_is_exact(self, tmp_path, kind):
        pipe = make_pipeline(make_transformer(kind))
        pipe.save_pretrained(tmp_path)
        loaded = IPTV2Pipeline.from_pretrained(tmp_path)
        assert loaded.config.id2label == NAMES
        assert type(loaded.scheduler) is type(pipe.scheduler)
        for name in ("transformer", "vae"):
            before, after = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
            assert before.keys() == after.keys()
            assert all(after[key].equal(value) for key, value in before.items())
        options = {"num_inference_steps": 2, "output_type": "pt"}
        assert loaded(0, generator=seeds(0), **options).images.equal(pipe(0, generator=seeds(0), **options).images)

    def test_variant_in_shards_is_exact(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
        assert len(list(tmp_path.glob("transformer/*.fp16-*.safetensors"))) > 1
        loaded = IPTV2Pipeline.from_pretrained(tmp_path, variant="fp16")
        before, after = pipe.transformer.state_dict(), loaded.transformer.state_dict()
        assert all(after[key].equal(value) for key, value in before.items())

    def test_fresh_process_gives_the_same_images(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        expected = pipe("hound", num_inference_steps=2, generator=seeds(0)[0], output_type="np").images
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", LOAD_IN_FRESH_PROCESS, str(tmp_path)], check=True, cwd=root)
        assert np.array_equal(np.load(tmp_path / "ours.npy"), expected)
        assert np.array_equal(np.load(tmp_path / "plain.npy"), expected)

    def test_index_names_the_package_and_not_the_file(self, tmp_path):
        make_pipeline().save_pretrained(tmp_path)
        index = IPTV2Pipeline.load_config(tmp_path)
        assert index["transformer"] == ["iptv2_diffusion", "IPTV2Transformer2DModel"]
        assert index["_class_name"] == "IPTV2Pipeline"

    def test_loads_in_half_precision_and_with_other_components(self, tmp_path, caplog):
        make_pipeline().save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            pipe = IPTV2Pipeline.from_pretrained(
                tmp_path, dtype=torch.bfloat16, scheduler=EulerDiscreteScheduler(prediction_type="v_prediction")
            )
        assert pipe.vae.dtype == torch.bfloat16
        assert np.isfinite(pipe(0, num_inference_steps=2, output_type="np").images).all()
        assert "Expected types" not in caplog.text

    @pytest.mark.parametrize("fused", [False, True])
    def test_saved_in_half_precision_loads_in_float32(self, tmp_path, fused):
        """Like the shipped pipelines; on a CPU it then runs in float32, with the rounded weights."""
        transformer = make_transformer().half()
        pipe = make_pipeline(transformer.fuse() if fused else transformer)
        pipe.save_pretrained(tmp_path)
        loaded = IPTV2Pipeline.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {torch.float32}
        pipe.transformer.float()
        options = {"num_inference_steps": 2, "output_type": "pt"}
        assert loaded(0, generator=seeds(0), **options).images.equal(pipe(0, generator=seeds(0), **options).images)

    def test_plain_diffusion_pipeline_finds_the_class(self):
        assert diffusers.IPTV2Pipeline is IPTV2Pipeline
        assert issubclass(IPTV2Pipeline, DiffusionPipeline)
