"""Check that a scheduler fits a denoiser: it must use the denoiser's prediction type and noise schedule.

A scheduler that does not fit gives noise or blurred images without an error, so `IPTV2Pipeline` checks it before every
call. tests/pipelines/test_scheduler_fit.py tests this with every scheduler class of diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin

from iptv2_diffusion.objectives import FLOW, SCHEDULE_FIELDS, is_of_flow, noise_schedule_of

__all__ = ["check_scheduler", "sampling_timesteps"]

# Classes that sample noise, v- or sample prediction on a DDPM's noise schedule
NOISE_CLASSES = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# Classes that sample flow matching, by themselves or with prediction_type="flow_prediction" and use_flow_sigmas
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
FLOW_SIGMA_CLASSES = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
WITHOUT_SAMPLE = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)
CLIPPING = ("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler")  # default of the class


def check_scheduler(scheduler: SchedulerMixin, prediction: str | None, schedule: Mapping[str, Any] | None) -> None:
    """Raise a ValueError, which shows the right call, unless the scheduler fits the denoiser.

    Args:
        scheduler: scheduler for sampling.
        prediction: prediction type of the denoiser, as from `prediction_of`; None if unknown.
        schedule: noise schedule of its training, as from `noise_schedule_of`; None if unknown.
    """
    name, flow = type(scheduler).__name__, is_of_flow(scheduler)
    if prediction is None:
        return
    if flow != (prediction == FLOW):
        trained = "flow matching" if prediction == FLOW else "noise or v-prediction"
        kin = FLOW_CLASSES[0] if prediction == FLOW else "DPMSolverMultistepScheduler"
        raise ValueError(
            f"the transformer was trained for {trained}, but {name} is of the other kind; use one such as {kin}"
        )
    known = _class_of(scheduler)
    if known is None and type(scheduler).__module__.startswith("diffusers."):
        fitting = (*FLOW_CLASSES, *FLOW_SIGMA_CLASSES) if flow else NOISE_CLASSES
        raise ValueError(
            f"{name} does not fit this model, which predicts {_said(prediction)}; use one of {', '.join(fitting)}"
        )
    problem = _flow_problem(scheduler, known) if flow else _noise_problem(scheduler, prediction)
    if problem:
        raise ValueError(f"{problem}; use {_right_call(name, prediction, schedule)}")
    _check_schedule(scheduler, prediction, schedule)


def _class_of(scheduler: SchedulerMixin) -> str | None:
    """Return the first of a scheduler's classes that is known to sample such models; subclasses count too."""
    fitting = (*FLOW_CLASSES, *FLOW_SIGMA_CLASSES) if is_of_flow(scheduler) else NOISE_CLASSES
    for kind in type(scheduler).__mro__:
        if kind.__module__.startswith("diffusers."):
            return kind.__name__ if kind.__name__ in fitting else None
    return None


def _flow_problem(scheduler: SchedulerMixin, known: str | None) -> str | None:
    config, name = scheduler.config, type(scheduler).__name__
    if known in FLOW_SIGMA_CLASSES and not config.get("use_flow_sigmas"):
        without = "has prediction_type='flow_prediction' without use_flow_sigmas=True"
        return f"{name} {without}: its noise levels are not a flow's"
    if config.get("invert_sigmas"):
        return f"{name} has invert_sigmas=True: it goes from the image to the noise"
    if config.get("use_dynamic_shifting") and known in FLOW_CLASSES:
        return f"{name} has use_dynamic_shifting=True, which needs a shift (mu) that this pipeline does not compute"
    return None


def _noise_problem(scheduler: SchedulerMixin, prediction: str) -> str | None:
    config, name = scheduler.config, type(scheduler).__name__
    sampled = config.get("prediction_type", "epsilon")
    if sampled != prediction:
        return f"the transformer predicts {_said(prediction)}, and {name} has prediction_type={sampled!r}"
    if prediction == "sample" and type(scheduler).__name__ in WITHOUT_SAMPLE:
        return f"{name} does not sample models that predict the clean latents"
    if config.get("use_flow_sigmas"):
        return f"{name} has use_flow_sigmas=True, which are the noise levels of flow matching"
    if config.get("timestep_type") == "continuous":
        return f"{name} has timestep_type='continuous', and the transformer takes the timesteps of its training"
    return None


def _check_schedule(scheduler: SchedulerMixin, prediction: str, schedule: Mapping[str, Any] | None) -> None:
    """Check that the noise at each training timestep is that of the training."""
    own, name = noise_schedule_of(scheduler), type(scheduler).__name__
    if not schedule or not own:
        return
    if prediction == FLOW:
        differing = ["num_train_timesteps"] if own != dict(schedule) else []
    else:
        theirs, ours = _signal(schedule), _signal(own)
        same = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-6)
        differing = [] if same else [f for f in SCHEDULE_FIELDS if schedule.get(f) != own.get(f)]
    if differing:
        fields = ", ".join(f"{field} {own.get(field)!r} instead of {schedule.get(field)!r}" for field in differing)
        raise ValueError(
            f"{name} has a noise schedule that differs from the transformer's training ({fields}); use "
            f"{_right_call(name, prediction, schedule)}"
        )


def _signal(schedule: Mapping[str, Any]) -> torch.Tensor:
    """Return ᾱ at every training timestep, (T,)."""
    return DDPMScheduler(**schedule).alphas_cumprod


def _said(prediction: str) -> str:
    words = {
        "epsilon": "the noise (epsilon)",
        "v_prediction": "v (v_prediction)",
        "sample": "the clean latents (sample)",
    }
    return words.get(prediction, prediction)


def _right_call(name: str, prediction: str, schedule: Mapping[str, Any] | None) -> str:
    """Return a call that makes a fitting scheduler, of this class if possible."""
    if prediction == "sample" and name in WITHOUT_SAMPLE:
        name = "DDIMScheduler"
    if name in FLOW_CLASSES:
        return f"{name}({_arguments(schedule)})"
    options: dict[str, Any] = {**(schedule or {})}
    options = {key: value for key, value in options.items() if value not in (None, False)}
    options["prediction_type"] = "flow_prediction" if prediction == FLOW else prediction
    if prediction == FLOW:
        options["use_flow_sigmas"] = True
    if name in CLIPPING:
        options["clip_sample"] = False
    return f"{name}({_arguments(options)})"


def _arguments(options: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in (options or {}).items())


def sampling_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Set a scheduler's timesteps, from their number or from given timesteps or noise levels, and return them.

    Raises:
        ValueError: both are given, they do not fall, or the scheduler does not take them.
    """
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        falling = values is None or all(high > low for high, low in pairwise(values))
        if values is not None and (len(values) == 0 or not falling):
            raise ValueError(f"{name} is {list(values)[:5]}; give numbers that fall, from noise to image")
        if values is not None and name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; leave them out, or use another scheduler")
    if timesteps is None and sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
        _check_finite(scheduler)
        return scheduler.timesteps
    # late: that module imports text encoders, which takes a second
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

    return retrieve_timesteps(scheduler, device=device, timesteps=timesteps, sigmas=sigmas)[0]


def _check_finite(scheduler: SchedulerMixin) -> None:
    """Raise a ValueError if the scheduler's settings make its timesteps or noise levels NaN or infinite."""
    values = (scheduler.timesteps, getattr(scheduler, "sigmas", None))
    if not all(torch.as_tensor(value).isfinite().all() for value in values if value is not None):
        shift = scheduler.config.get("shift")
        setting = "" if shift is None else f" with shift={shift}"
        raise ValueError(
            f"{type(scheduler).__name__}{setting} gives timesteps that are NaN or infinite; use the settings that the "
            "pipeline was saved with"
        )
