"""Every scheduler of diffusers with every kind of denoiser: the right images, or an error with the right call."""

import inspect
import re

import diffusers.schedulers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from kl_vae import make_kl_vae
from torch import nn

from iptv2_diffusion import DiffusionObjective, IPTV2Pipeline

STEPS, MEAN, DEVIATION = 40, 1.5, 0.5
CLASSES = sorted(
    name
    for name in dir(diffusers.schedulers)
    if inspect.isclass(kind := getattr(diffusers.schedulers, name, None))
    and issubclass(kind, SchedulerMixin)
    and kind is not SchedulerMixin
)


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The ideal denoiser of latents that are N(MEAN, DEVIATION²): samples must have these moments.

    Timesteps between those of training are interpolated, because schedulers with Karras' spacing need them.
    """

    @register_to_config
    def __init__(self, prediction_type="epsilon", sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        time = timestep.float().view(-1, 1, 1, 1)
        if self.config.prediction_type == "flow":
            noise = time / 1000
            signal = 1 - noise
        else:
            below = time.floor().long().clamp(0, 999)
            above, share = (below + 1).clamp(max=999), time - below
            log_ratio = ((1 - self.alphas_cumprod) / self.alphas_cumprod).log()
            level = (log_ratio[below] * (1 - share) + log_ratio[above] * share).exp().sqrt()
            signal = (1 + level**2).rsqrt()
            noise = level * signal
        variance = (signal * DEVIATION) ** 2 + noise**2
        x0 = MEAN + signal * DEVIATION**2 / variance * (hidden_states - signal * MEAN)
        epsilon = noise / variance * (hidden_states - signal * MEAN)
        outputs = {
            "flow": epsilon - x0,
            "epsilon": epsilon,
            "v_prediction": signal * epsilon - noise * x0,
            "sample": x0,
        }
        return (outputs[self.config.prediction_type],)


def trained_scheduler(prediction):
    if prediction == "sample":
        return DDPMScheduler(prediction_type="sample", clip_sample=False)
    return DiffusionObjective.make_scheduler(prediction)


def pipeline_of(prediction):
    pipe = IPTV2Pipeline(GaussianDenoiser(prediction), make_kl_vae(4), trained_scheduler(prediction))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moments(pipe, steps=STEPS):
    torch.manual_seed(0)  # a few schedulers draw from torch's own generator
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "num_images_per_label": 16, "guidance_scale": 1.0}
    latents = pipe(0, generator=generator, output_type="latent", **options).images
    return latents.mean().item(), latents.std().item()


def made_for(pipe, cls):
    """A scheduler from the config of the saved one, as in diffusers' docs; None if diffusers itself refuses."""
    try:
        scheduler = cls.from_config(pipe.scheduler.config)
    except (ImportError, TypeError, ValueError, NotImplementedError):
        return None
    return scheduler if hasattr(scheduler, "config") else None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_right_pictures_or_a_refusal(name, prediction):
    """from_config alone, and the call that its error names."""
    cls = getattr(diffusers.schedulers, name)
    pipe = pipeline_of(prediction)
    scheduler = made_for(pipe, cls)
    if scheduler is None:
        pytest.skip(f"diffusers itself does not make a {name} of this config")
    pipe.scheduler = scheduler
    told = None
    try:
        mean, deviation = moments(pipe)
    except ValueError as refusal:
        told = str(refusal)
    if told is not None:
        assert "; use " in told
        assert "\n" not in told
        call = re.search(r"; use (\w+Scheduler\(.*\))$", told)
        if call is None:  # another kind: the error names other classes
            assert "Scheduler" in told
            return
        pipe.scheduler = eval(call[1], {n: getattr(diffusers.schedulers, n) for n in CLASSES})  # as a user would paste
        mean, deviation = moments(pipe)
    assert abs(mean - MEAN) < 0.06
    assert abs(deviation - DEVIATION) < 0.12


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_refusals_leave_enough(prediction):
    """Refusing every class would pass the test above; these classes must draw."""
    pipe, drawn = pipeline_of(prediction), set()
    for name in CLASSES:
        scheduler = made_for(pipe, getattr(diffusers.schedulers, name))
        if scheduler is not None:
            pipe2 = pipeline_of(prediction)
            pipe2.scheduler = scheduler
            try:
                pipe2._prepare_scheduler()
            except ValueError:
                continue
            drawn.add(name)
    if prediction == "flow":
        assert drawn >= {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
    else:
        assert drawn >= {"DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"}
        assert drawn >= {"UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler"}


class TestRefusals:
    def test_flow_without_flow_sigmas_names_the_right_call(self):
        pipe = pipeline_of("flow")
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, prediction_type="flow_prediction"
        )
        arguments = "num_train_timesteps=1000, prediction_type='flow_prediction', use_flow_sigmas=True"
        right = rf"DPMSolverMultistepScheduler\({arguments}\)"
        with pytest.raises(ValueError, match=f"without use_flow_sigmas=True: .*; use {right}"):
            pipe(0, num_inference_steps=2)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        assert moments(pipe)[0] == pytest.approx(MEAN, abs=0.06)

    @pytest.mark.parametrize(
        ("prediction", "scheduler", "message"),
        [
            ("epsilon", DDIMScheduler(prediction_type="v_prediction"), "predicts the noise .* prediction_type='v_pred"),
            ("v_prediction", EulerDiscreteScheduler(), "predicts v .* has prediction_type='epsilon'"),
            (
                "epsilon",
                DDIMScheduler(beta_schedule="scaled_linear"),
                "has a noise schedule that differs .*beta_schedule 'scaled",
            ),
            ("epsilon", DDIMScheduler(num_train_timesteps=500), "num_train_timesteps 500 instead of 1000"),
            ("epsilon", DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
            ("epsilon", DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True, which are"),
            ("epsilon", EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous'"),
            ("flow", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "needs a shift"),
            ("flow", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "from the image to the noise"),
            (
                "flow",
                FlowMatchHeunDiscreteScheduler(num_train_timesteps=500),
                "num_train_timesteps 500 instead of 1000",
            ),
        ],
    )
    def test_one_setting_that_does_not_fit(self, prediction, scheduler, message):
        pipe = pipeline_of(prediction)
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=message) as caught:
            pipe(0, num_inference_steps=2)
        assert "; use " in str(caught.value)

    @pytest.mark.parametrize("shift", [0, float("nan")])
    def test_a_shift_without_timesteps(self, shift):
        pipe = pipeline_of("flow")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        with pytest.raises(ValueError, match=f"with shift={shift} gives timesteps that are NaN or infinite; use"):
            pipe(0, num_inference_steps=2)

    @pytest.mark.parametrize("steps", [0, -5, 10**9, 10**30])
    def test_numbers_of_steps_that_no_memory_holds(self, steps):
        with pytest.raises(ValueError, match=rf"num_inference_steps is {steps}; it must lie in \[1, 100000\]"):
            pipeline_of("flow")(0, num_inference_steps=steps)

    def test_a_saved_pipeline_remembers(self, tmp_path):
        from iptv2_diffusion import create_model

        pipe = pipeline_of("epsilon")
        model = create_model("tiny", sample_size=8, in_channels=4, out_channels=4, num_class_embeds=None)
        IPTV2Pipeline(model, pipe.vae, pipe.scheduler).save_pretrained(tmp_path)
        for scheduler in (DDIMScheduler(prediction_type="v_prediction"), DDIMScheduler(beta_end=0.03)):
            with pytest.raises(ValueError, match="; use DDIMScheduler"):
                IPTV2Pipeline.from_pretrained(tmp_path, scheduler=scheduler)(num_inference_steps=2)

    def test_a_subclass_of_yours_counts_as_its_parent(self):
        class MyEuler(EulerDiscreteScheduler):
            pass

        pipe = pipeline_of("epsilon")
        pipe.scheduler = MyEuler.from_config(pipe.scheduler.config)
        assert moments(pipe)[0] == pytest.approx(MEAN, abs=0.06)
