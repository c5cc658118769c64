"""Guidance of a denoising step: by the null label, or by a weaker model (AutoGuidance).

    classifier-free guidance   guided = D(x, null label) + w (D(x, label) - D(x, null label))     (Ho & Salimans 2022)
    AutoGuidance               guided = D_weak(x, label) + w (D(x, label) - D_weak(x, label))     (Karras et al. 2024)

D is the transformer's prediction. The weak model is smaller, or was trained for less time, with the same training
target and on the same data (arXiv 2406.02507, eq. 5). The equation there is for denoised images. At one noise level it
is the same for noise, v and the flow velocity, which depend linearly on them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import ModelMixin
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance

from iptv2_diffusion.models.presets import create_model, find_weights
from iptv2_diffusion.objectives import null_label, prediction_of

__all__ = ["GuidanceMixin", "check_guidance_model", "make_guider"]


if TYPE_CHECKING:  # a mixin of pipelines; at run time it must not precede DiffusionPipeline
    from diffusers import DiffusionPipeline as _Base
else:
    _Base = object


class GuidanceMixin(_Base):
    """Mixin for a pipeline with a `transformer` and an optional `guidance_model`."""

    def load_guidance_model(self, name: str) -> None:
        """Load a saved denoiser as the guidance model: the folder of a model or of its pipeline, or a name on the Hub.

        Raises:
            ValueError: the model does not exist, or differs from the transformer in latents, classes or target.
        """
        saved = find_weights(name)
        if saved is None:
            raise ValueError(
                f"guidance model {name!r} not found; give the folder of a saved model or pipeline, or its Hub name"
            )
        kind = getattr(diffusers, str(saved.scheduler_config.get("_class_name")), None)
        target = None if kind is None else prediction_of(kind.from_config(dict(saved.scheduler_config)))
        own = self.config.prediction_type
        if None not in (target, own) and target != own:
            raise ValueError(
                f"the guidance model predicts {target}, but the transformer {own}; use one with the same target"
            )
        model = create_model(name)
        check_guidance_model(model, self.transformer)
        self.register_modules(guidance_model=model.to(self.device, self.transformer.dtype).eval())

    def _prepare_guider(self, guider: BaseGuidance | None, *settings: Any, guidable: bool) -> BaseGuidance | None:
        """Return the guider of a call; None if there is neither a label to guide towards nor a model to guide by."""
        self._guidance_scale = getattr(guider, "guidance_scale", settings[0])
        if self.guidance_model is not None:
            check_guidance_model(self.guidance_model, self.transformer)
        return make_guider(guider, *settings) if guidable or self.guidance_model is not None else None


def make_guider(
    guider: BaseGuidance | None, scale: float, interval: tuple[float, float], rescale: float
) -> BaseGuidance:
    """Return the user's guider, or diffusers' classifier-free guidance with these settings.

    Raises:
        ValueError: the guider needs more than a pair of predictions.
    """
    if guider is not None:
        if guider._input_predictions != ["pred_cond", "pred_uncond"] or (
            type(guider).prepare_models is not BaseGuidance.prepare_models
        ):
            raise ValueError(
                f"{type(guider).__name__} needs more than a conditional and an unconditional prediction; use "
                "ClassifierFreeGuidance, AdaptiveProjectedGuidance or another guider that takes such a pair"
            )
        return guider
    start, stop = interval
    guider_log = logging.getLogger("diffusers.guiders.guider_utils")
    level = guider_log.level
    guider_log.setLevel(logging.ERROR)  # each new guider warns that guiders are experimental
    try:
        return ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale, start=start, stop=stop)
    finally:
        guider_log.setLevel(level)


def check_guidance_model(weak: ModelMixin, transformer: ModelMixin) -> None:
    """Raise a ValueError unless a model can guide another one: equal latents, and equal classes or none."""
    if weak.config.in_channels != transformer.config.in_channels:
        raise ValueError(
            f"the guidance model takes {weak.config.in_channels} channels, but the transformer "
            f"{transformer.config.in_channels}; use one that was trained on the same latents"
        )
    classes, own = null_label(weak), null_label(transformer)
    if classes is not None and classes != own:
        shown = "none" if own is None else own
        raise ValueError(
            f"the guidance model has {classes} classes, but the transformer {shown}; use one with the same classes or "
            "without classes"
        )
