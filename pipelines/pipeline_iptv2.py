"""IPTV2Pipeline: generate images from class labels by denoising latents with an IPT-V2 (or a DiT) transformer.

One step, for all labels in one batch:

    (cond, uncond) = transformer([x_t, x_t], t, [label, null label])     one forward for the pair
    guided         = uncond + guidance_scale * (cond - uncond)           on all latent channels; see guidance.py
    x_{t-1}        = scheduler.step(guided, t, x_t)

The latents and the scheduler's arithmetic stay in float32 for every precision of the transformer. The scheduler owns
the noise schedule. The LatentCodec owns the size and the units of the latents.
"""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.models.loading import align_weights, check_complete
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.objectives import is_of_flow, noise_schedule_of, null_label, prediction_of

from .class_labels import ClassLabelsMixin, Label
from .guidance import GuidanceMixin
from .lora_loading import IPTV2LoraLoaderMixin
from .scheduler_fit import check_scheduler, sampling_timesteps
from .starts import Start

logger = logging.getLogger(__name__)

MOST_STEPS = 100_000  # of a call; more would only fill the memory with timesteps
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED_VARIANCES = ("learned", "learned_range")
# Schedulers that use a variance predicted by the model
VARIANCE_SCHEDULERS = (DDPMScheduler, DDPMParallelScheduler)


class IPTV2Pipeline(DiffusionPipeline, ClassLabelsMixin, GuidanceMixin, IPTV2LoraLoaderMixin):
    """Pipeline for class-conditional or unconditional image generation.

    Args:
        transformer: ``IPTV2Transformer2DModel``, or a ``DiTTransformer2DModel`` as a baseline.
        vae: VAE that a ``LatentCodec`` supports. A pipeline without one (``vae=None``) gives latents.
        scheduler: diffusers scheduler that fits the transformer's training target: DDPM, DDIM, DPM-Solver++, Euler and
            similar ones for noise and v-prediction, FlowMatchEuler for flow matching. Replace it by another of the same
            kind with ``pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)``.
        id2label: class names by id. A name can list synonyms, separated by commas.
        flow_matching: whether the transformer was trained for flow matching; None to follow the scheduler. This and the
            next two arguments are saved, so that a scheduler that does not fit is an error, whether it is passed to
            ``from_pretrained`` or set later.
        prediction_type: prediction of the transformer: "flow", "epsilon", "v_prediction" or "sample"; None for that of
            the scheduler.
        noise_schedule: fields of the scheduler's config that determine the noise at each training timestep
            (num_train_timesteps, beta_start ...); None for those of the scheduler.
        guidance_model: weaker denoiser that replaces the null label in the guidance (AutoGuidance, arXiv 2406.02507):
            a smaller model, or one that was trained for less time, with the same target and on the same latents.

    Raises:
        ValueError: the components do not fit each other, a class id is below 0, or weights are missing.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move
    model_cpu_offload_seq = "transformer->guidance_model->vae"
    _optional_components = ["guidance_model"]
    _callback_tensor_inputs = ["latents", "class_labels", "model_output"]

    def __init__(
        self,
        transformer: Union[IPTV2Transformer2DModel, DiTTransformer2DModel],  # noqa: UP007 - see id2label
        # `from_pipe` passes on a model whose exact class is named here. ModelMixin admits the other VAEs to the call.
        vae: Union[AutoencoderKL, AutoencoderTiny, AutoencoderDC, ModelMixin],  # noqa: UP007
        scheduler: SchedulerMixin,
        id2label: Optional[dict] = None,  # noqa: UP045 - diffusers before 0.37 reads no `dict | None`
        flow_matching: Optional[bool] = None,  # noqa: UP045
        prediction_type: Optional[str] = None,  # noqa: UP045
        noise_schedule: Optional[dict] = None,  # noqa: UP045
        guidance_model: Union[IPTV2Transformer2DModel, DiTTransformer2DModel, None] = None,  # noqa: UP007
    ):
        super().__init__()
        for component in (transformer, vae, guidance_model):
            if component is not None:
                check_complete(component)  # diffusers' own classes leave missing weights uninitialised
                align_weights(component)  # they do not align weights either; a saved pipeline must give the same image
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, guidance_model=guidance_model)
        # JSON turns integer keys into strings
        id2label = {int(key): str(name) for key, name in id2label.items()} if id2label else None
        if scheduler is not None:
            flow_matching = is_of_flow(scheduler) if flow_matching is None else flow_matching
            if is_of_flow(scheduler) == flow_matching:  # otherwise it does not describe this model
                noise_schedule = noise_schedule_of(scheduler) if prediction_type is None else noise_schedule
                prediction_type = prediction_of(scheduler) if prediction_type is None else prediction_type
        if prediction_type is None and flow_matching is not None:
            prediction_type = "flow" if flow_matching else None
        self.register_to_config(
            id2label=id2label,
            flow_matching=flow_matching,
            prediction_type=prediction_type,
            noise_schedule=noise_schedule,
        )
        self._vae_tiling: tuple[int, float] | None = None
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        if transformer is not None and vae is not None:
            self._check_channels()
        self.vae_scale_factor = self.codec.compression if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _check_channels(self) -> None:
        config, channels = self.transformer.config, self.codec.latent_channels
        out_channels = config.out_channels or config.in_channels
        if config.in_channels != channels:
            raise ValueError(
                f"the transformer takes {config.in_channels} channels, but the VAE's latents have {channels}; "
                "use the VAE that the transformer was trained with"
            )
        if out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"the transformer returns {out_channels} channels for latents of {channels}; it must return "
                f"{channels}, or {2 * channels} with a learned variance"
            )
        if self.id2label and min(self.id2label) < 0:
            raise ValueError(f"id2label names class {min(self.id2label)}; classes are numbered from 0")
        if self.id2label and self.num_classes is not None and max(self.id2label) >= self.num_classes:
            raise ValueError(
                f"id2label names class {max(self.id2label)}, but the transformer has classes 0 to "
                f"{self.num_classes - 1}"
            )

    # --- components of the pipeline ----------------------------------------------------------------------------------

    @property
    def codec(self) -> LatentCodec:
        """The codec of the VAE, with this pipeline's tiling."""
        if self.vae is None:
            raise ValueError("this pipeline has no VAE: use output_type='latent' and leave height and width out")
        codec = LatentCodec(self.vae)
        if self._vae_tiling is not None:
            codec.enable_tiling(*self._vae_tiling)
        return codec

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining steps. A step callback can set ``pipe._interrupt = True``."""
        return self._interrupt

    def enable_vae_tiling(self, tile_size: int = 512, overlap: float = 0.25) -> None:
        """Decode large images in tiles; see ``LatentCodec.enable_tiling``."""
        self.codec.enable_tiling(tile_size, overlap)  # raises at once for an invalid size
        self._vae_tiling = (tile_size, overlap)

    def disable_vae_tiling(self) -> None:
        self._vae_tiling = None

    # --- inputs ------------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        num_images_per_label: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ValueError for an argument of `__call__` that is out of range."""
        if not 1 <= num_inference_steps <= MOST_STEPS:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must lie in [1, {MOST_STEPS}]")
        if not math.isfinite(guidance_scale):
            raise ValueError(
                f"guidance_scale is {guidance_scale}; it must be a finite number, such as 4 (1: no guidance)"
            )
        start, stop = guidance_interval
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"guidance_interval is ({start}, {stop}); give increasing numbers in [0, 1]")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; it must be in [0, 1]")
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label is {num_images_per_label}; it must be at least 1")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta is {eta}; it must be finite and not negative")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"this pipeline has no VAE for output_type {output_type!r}; use output_type='latent'")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks receive {', '.join(self._callback_tensor_inputs)}, not {unknown}")

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the latents that the transformer was trained on."""
        size = self.transformer.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def prepare_latents(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Return the initial noise (B, C, h, w) float32 of unit variance, drawn or checked."""
        size = self.sample_size if latents is None or latents.ndim != 4 else tuple(latents.shape[-2:])
        if height is not None or width is not None:
            default_height, default_width = self.codec.image_size(*size)
            size = self.codec.latent_size(
                default_height if height is None else height, default_width if width is None else width
            )
        if isinstance(self.transformer, DiTTransformer2DModel):
            patch = self.transformer.config.patch_size
            if size[0] != size[1] or size[0] % patch:
                raise ValueError(
                    f"a DiT takes square latents in multiples of its patch size {patch}, not {size[0]} x {size[1]}; "
                    f"choose equal height and width in multiples of {patch * self.vae_scale_factor}"
                )
        shape = (batch, self.transformer.config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images; give one for each, or a single one")
        if latents is None:
            # float32 before any cast, so that a seed gives the same noise in every precision
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; {batch} images of this size need {shape}")
        return latents.to(device=device, dtype=torch.float32)

    def _prepare_scheduler(self) -> SchedulerMixin:
        """Check that the scheduler fits the transformer's outputs, and return the scheduler for the steps."""
        scheduler, config = self.scheduler, self.scheduler.config
        check_scheduler(scheduler, self.config.prediction_type, self.config.noise_schedule)
        variance_type = config.get("variance_type")
        if variance_type in LEARNED_VARIANCES:
            if not isinstance(scheduler, VARIANCE_SCHEDULERS):
                # Other schedulers inherit this setting from a DDPM's config but do not use it, and DPM-Solvers then cut
                # the model's output to 3 channels. They receive only the mean.
                return type(scheduler).from_config(config, variance_type=None)
            if not self._learns_variance:
                raise ValueError(
                    f"variance_type {variance_type!r} of the scheduler needs a transformer with 2 x "
                    f"{self.transformer.config.in_channels} output channels; set it to 'fixed_small'"
                )
        if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)) and config.clip_sample:
            logger.warning(
                f"{type(scheduler).__name__} has clip_sample=True: latents cut to ±{config.clip_sample_range} make "
                "dull images; create the scheduler by from_config from the saved one's config, or set clip_sample=False"
            )
        return scheduler

    @property
    def _learns_variance(self) -> bool:
        return self.transformer.config.out_channels == 2 * self.transformer.config.in_channels

    # --- one step ----------------------------------------------------------------------------------------------------

    def _denoise(self, model: ModelMixin, latents: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return the output of a denoiser (B, C or 2C, h, w) in float32."""
        timestep = timestep.to(latents.device).expand(latents.shape[0])
        class_labels = None if null_label(model) is None else class_labels
        latents = latents.to(model.dtype)
        return model(latents, timestep=timestep, class_labels=class_labels, return_dict=False)[0].float()

    def _predict(
        self, latents: Tensor, timestep: Tensor, class_labels: Tensor | None, guider: BaseGuidance | None
    ) -> tuple[Tensor, Tensor]:
        """Return the guided prediction (B, C, h, w) and the unguided variance channels (B, C or 0, h, w)."""
        channels = latents.shape[1]
        if guider is None:
            output = self._denoise(self.transformer, latents, timestep, class_labels)
            return output[:, :channels], output[:, channels:]
        weak, other_labels = self.guidance_model, class_labels
        if weak is None:
            assert class_labels is not None  # guidance without classes needs a second model
            assert self.num_classes is not None
            other_labels = torch.full_like(class_labels, self.num_classes)
        # One batch or two, as guidance acts at this step or not; some guiders also reset here what they keep over steps
        batches = guider.prepare_inputs({"class_labels": (class_labels, other_labels)})
        if weak is None:
            labels = torch.cat([batch.class_labels for batch in batches])
            repeated = torch.cat([latents] * len(batches))
            outputs = self._denoise(self.transformer, repeated, timestep, labels).chunk(len(batches))
        else:
            models = (self.transformer, weak)[: len(batches)]
            outputs = tuple(self._denoise(model, latents, timestep, class_labels) for model in models)
        for batch, output in zip(batches, outputs, strict=True):
            batch.noise_pred = output[:, :channels]
        return guider(batches).pred, outputs[0][:, channels:]

    # --- all steps ---------------------------------------------------------------------------------------------------

    def _sample(
        self,
        latents: Tensor,
        class_labels: Tensor | None,
        guider: BaseGuidance | None,
        scheduler: SchedulerMixin,
        timesteps: Tensor,
        start: Start,
        step_options: dict[str, Any],
        callback: Callable[..., dict] | None,
        callback_tensor_inputs: Sequence[str],
    ) -> Tensor:
        """Denoise the latents of the first timestep to latents (B, C, h, w). The scheduler filters `step_options`."""
        # flow-matching schedulers do not have this method
        scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        takes = inspect.signature(scheduler.step).parameters
        step_options = {name: value for name, value in step_options.items() if name in takes}
        step_takes_variance = (
            isinstance(scheduler, VARIANCE_SCHEDULERS) and scheduler.config.variance_type in LEARNED_VARIANCES
        )

        self._num_timesteps = len(timesteps)
        self._interrupt = False
        # The first step after which an image was not finite, read at the end: a look at every step waits for the device
        self._spoilt = torch.full((len(latents),), -1, device=latents.device)
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                if guider is not None:
                    guider.set_state(step=step, num_inference_steps=self._num_timesteps, timestep=timestep)
                scaled = scale_input(latents, timestep)
                model_output, variance = self._predict(scaled, timestep, class_labels, guider)
                if step_takes_variance:
                    model_output = torch.cat([model_output, variance], dim=1)
                latents = scheduler.step(model_output, timestep, latents, **step_options, return_dict=False)[0]
                latents = start.after_step(latents, step)

                if callback is not None:
                    known = {"latents": latents, "class_labels": class_labels, "model_output": model_output}
                    given = {name: known[name] for name in callback_tensor_inputs}
                    returned = callback(self, step, timestep, given) or {}
                    latents = returned.get("latents", latents)
                    class_labels = returned.get("class_labels", class_labels)
                broken = ~latents.isfinite().flatten(1).all(dim=1) & (self._spoilt < 0)
                self._spoilt = torch.where(broken, step, self._spoilt)
                progress.update()
        return latents

    def _decode(
        self, latents: Tensor, output_type: str, generator: torch.Generator | list[torch.Generator] | None, start: Start
    ) -> Any:
        """Decode latents to images of the output type."""
        if output_type == "latent":
            result = latents
        else:
            result = self.codec.decode(latents, generator if isinstance(generator, torch.Generator) else None)
            result = start.finish(result)
        spoilt = (~result.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if output_type != "latent":
            result = self.image_processor.postprocess(result.nan_to_num(0.0) if spoilt else result, output_type)
        if spoilt:
            self._refuse_non_finite(spoilt, result)
        return result

    def _refuse_non_finite(self, indices: list[int], images: Any) -> None:
        """Raise an error that names the images, the step and the precision, instead of giving black images."""
        count, step = len(self._spoilt), int(self._spoilt[indices[0]])
        shown = ", ".join(str(index + 1) for index in indices[:5]) + (", …" if len(indices) > 5 else "")
        where = f"step {step + 1} of {self._num_timesteps}" if step >= 0 else "decoding by the VAE"
        dtype = self.transformer.dtype if step >= 0 else self.vae.dtype
        raise NonFiniteImageError(
            f"image{'s' * (len(indices) > 1)} {shown} of {count}, {where}", dtype, indices, images
        )

    # --- the call ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor | np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guider: BaseGuidance | None = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one or more classes, by name or id. None for an unconditional model, or for the null label of
                a conditional model (an image of any class, without guidance).
            height, width: size in pixels, multiples of the VAE's compression factor; by default the training size.
            num_inference_steps: number of denoising steps.
            timesteps: timesteps to sample instead, from noise to image, for a scheduler that takes them.
            sigmas: noise levels to sample instead, from noise to image, for a scheduler that takes them.
            guidance_scale: guidance scale w: uncond + w (cond - uncond), where uncond is the prediction for the null
                label, or that of the guidance model. 1 turns guidance off and halves the time.
            guidance_interval: (start, stop), the part of the sampling with guidance, as fractions of the steps.
            guidance_rescale: 0 to 1, how strongly the guided prediction is rescaled to the standard deviation of the
                conditional one (Lin et al. 2023, arXiv 2305.08891, §3.4).
            guider: diffusers guider that replaces the three arguments above.
            num_images_per_label: number of images for each label. Images of one label are consecutive.
            eta: eta of DDIM: 0 is deterministic, 1 is as random as DDPM.
            generator: one generator for all images, or a list with one per image, which then depends on its seed only.
            latents: initial noise (B, C, h, w) of unit variance, instead of drawing it.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; "latent", in model units.
            return_dict: whether to return an ``ImagePipelineOutput`` instead of a tuple.
            callback_on_step_end: function that is called as ``callback(pipe, step, timestep, tensors)`` after each
                step. "latents" and "class_labels" in the dict that it returns replace the current values.
            callback_on_step_end_tensor_inputs: tensors for the callback: "latents", "class_labels", "model_output".

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or a tuple with the images.

        Raises:
            ValueError: an argument is out of range, or the scheduler does not fit the transformer.
            NonFiniteImageError: a ValueError; an image has NaN or infinity. Its ``images`` are the valid images.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers import FlowMatchHeunDiscreteScheduler
            >>> from iptv2_diffusion import IPTV2Pipeline

            >>> pipe = IPTV2Pipeline.from_pretrained("assets/iptv2-emoji64")
            >>> pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
            >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]  # one per image
            >>> images = pipe(["food_drink", "flags"], num_images_per_label=4, generator=seeds).images
            ```
        """
        options = dict(locals())
        del options["self"]
        return self._generate(Start(), **options)

    def _generate(
        self,
        start: Start,
        *,
        class_labels: Any,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        guider: BaseGuidance | None,
        num_images_per_label: int,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images from a start; see `__call__` for the other arguments."""
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            num_images_per_label,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        guidable = class_labels is not None
        class_labels = self._prepare_labels(class_labels, num_images_per_label, device, start.count)
        batch = start.count * num_images_per_label if class_labels is None else len(class_labels)
        noise = self.prepare_latents(batch, height, width, generator, latents, device)
        guidance = (guidance_scale, guidance_interval, guidance_rescale)
        scheduler = self._prepare_scheduler()
        steps = sampling_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
        steps = start.timesteps(scheduler, steps)
        latents = self._sample(
            start.latents(scheduler, noise, steps),
            class_labels,
            self._prepare_guider(guider, *guidance, guidable=guidable),
            scheduler,
            steps,
            start,
            {"generator": generator, "eta": eta},
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images = self._decode(latents, output_type, generator, start)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
