"""AutoGuidance: a weaker model in place of the null label, checked against the equation."""

import json

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from test_pipeline_iptv2 import PointDenoiser, make_pipeline, make_transformer, seeds

from iptv2_diffusion import DiffusionObjective, IPTV2Pipeline
from iptv2_diffusion.models.saved import find_saved


def weak_model(**config):
    """A smaller denoiser of the same latents and classes."""
    model = make_transformer(layers_per_stage=(1,), grid_stride=1, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def output_of(pipe, label, scale, guider=None):
    """What guides the first step, and the latents that it is for."""
    seen = {}

    def keep(_, step, timestep, tensors):
        seen.setdefault("output", tensors["model_output"])
        seen.setdefault("timestep", timestep)
        return {}

    latents = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    pipe(
        label,
        num_inference_steps=2,
        guidance_scale=scale,
        guider=guider,
        latents=latents,
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["model_output"],
    )
    return seen["output"], latents, seen["timestep"].reshape(1)


@torch.no_grad()
def predicted(model, latents, timestep, label):
    labels = None if label is None else torch.tensor([label])
    return model(latents, timestep=timestep, class_labels=labels).sample


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_equation(scale):
    """w D(x, label) + (1 - w) D_weak(x, label), both with the label (arXiv 2406.02507, eq. 5)."""
    pipe = make_pipeline(guidance_model=weak_model())
    output, latents, timestep = output_of(pipe, 1, scale)
    strong, weak = (predicted(m, latents, timestep, 1) for m in (pipe.transformer, pipe.guidance_model))
    assert (strong - weak).abs().max() > 0.01
    torch.testing.assert_close(output, scale * strong + (1 - scale) * weak, rtol=1e-4, atol=1e-5)


def test_without_labels_and_with_an_unconditional_weak_model():
    pipe = make_pipeline(guidance_model=weak_model())
    output, latents, timestep = output_of(pipe, None, 2.0)  # the null label of both
    strong, weak = (predicted(m, latents, timestep, 3) for m in (pipe.transformer, pipe.guidance_model))
    torch.testing.assert_close(output, 2 * strong - weak, rtol=1e-4, atol=1e-5)

    pipe = make_pipeline(guidance_model=weak_model(num_class_embeds=None))
    output, latents, timestep = output_of(pipe, 1, 2.0)
    strong, weak = (
        predicted(pipe.transformer, latents, timestep, 1),
        predicted(pipe.guidance_model, latents, timestep, None),
    )
    torch.testing.assert_close(output, 2 * strong - weak, rtol=1e-4, atol=1e-5)

    without = {"num_class_embeds": None}
    pipe = make_pipeline(make_transformer(**without), guidance_model=weak_model(**without), id2label=None)
    output, latents, timestep = output_of(pipe, None, 2.0)
    strong, weak = (predicted(m, latents, timestep, None) for m in (pipe.transformer, pipe.guidance_model))
    torch.testing.assert_close(output, 2 * strong - weak, rtol=1e-4, atol=1e-5)


def test_interval_and_guiders_apply_to_it():
    pipe = make_pipeline(guidance_model=weak_model())
    expected, *_ = output_of(pipe, 1, 2.5)
    guided, *_ = output_of(pipe, 1, 1.0, guider=ClassifierFreeGuidance(guidance_scale=2.5))
    torch.testing.assert_close(guided, expected)
    calls = []
    handle = pipe.guidance_model.register_forward_hook(lambda *_: calls.append(1))
    pipe(1, num_inference_steps=4, guidance_interval=(0.5, 1.0))
    handle.remove()
    assert len(calls) == 2


def test_variance_channels_are_those_of_the_model():
    scheduler = DiffusionObjective.make_scheduler("epsilon", learned_variance=True)
    pipe = make_pipeline(PointDenoiser(out_channels=8), scheduler, guidance_model=PointDenoiser())
    assert pipe(1, num_inference_steps=3, output_type="latent").images.isfinite().all()


def test_it_is_a_component_that_is_saved_and_may_be_absent(tmp_path):
    pipe = make_pipeline(guidance_model=weak_model())
    pipe.save_pretrained(tmp_path / "with")
    loaded = IPTV2Pipeline.from_pretrained(tmp_path / "with")
    loaded.set_progress_bar_config(disable=True)
    expected, *_ = output_of(pipe, 1, 2.5)
    torch.testing.assert_close(output_of(loaded, 1, 2.5)[0], expected)
    assert find_saved(str(tmp_path / "with")).folder.name == "transformer"  # what a training starts from

    make_pipeline().save_pretrained(tmp_path / "without")
    index = json.loads((tmp_path / "without/model_index.json").read_text())
    del index["guidance_model"]  # a pipeline that was saved before it existed
    (tmp_path / "without/model_index.json").write_text(json.dumps(index))
    plain = IPTV2Pipeline.from_pretrained(tmp_path / "without")
    assert plain.guidance_model is None
    given = IPTV2Pipeline.from_pretrained(tmp_path / "without", guidance_model=weak_model())
    given.set_progress_bar_config(disable=True)
    torch.testing.assert_close(output_of(given, 1, 2.5)[0], expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_class_embeds": 5},
            "the guidance model has 5 classes, but the transformer 3; use one with the same classes",
        ),
        (
            {"in_channels": 8, "out_channels": 8},
            "the guidance model takes 8 channels, but the transformer 4; use one that",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(config, message):
    pipe = make_pipeline(guidance_model=weak_model(**config))
    with pytest.raises(ValueError, match=message):
        pipe(1, num_inference_steps=2)
