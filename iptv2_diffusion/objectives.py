"""Training objectives: prediction target and loss of the denoiser.

With clean latents x0, noise n ~ N(0, I) and noisy latents x_t = alpha_t x0 + sigma_t n, all (B, C, H, W):

=================  ============================  ==================================================  =============
prediction type    alpha_t, sigma_t              target                                              source
=================  ============================  ==================================================  =============
``epsilon``        sqrt(abar_t), sqrt(1-abar_t)  n                                                   Ho et al. 2020
``v_prediction``   sqrt(abar_t), sqrt(1-abar_t)  alpha_t n - sigma_t x0                              Salimans & Ho 2022
``flow``           1 - s, s with s in [0, 1]     n - x0                                              Liu et al. 2022
=================  ============================  ==================================================  =============

The loss is the mean squared error over C, H, W: one float32 number per sample. Options:

* ``learned_variance``: hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672, eqs. 15 and 16), the recipe of ADM
  and DiT [model.md §8]. The model has 2C outputs; see :meth:`DiffusionObjective.variational_bound`.
* ``min_snr_gamma``: loss weight of Hang et al. 2023 (arXiv 2303.09556). The squared error *of x0* has the weight
  min(SNR, gamma).
* ``timestep_sampling="logit_normal"``: density of Esser et al. 2024 (arXiv 2403.03206, eq. 19), which has more samples
  at middle noise levels.
* ``timestep_shift``: the same paper's resolution shift (eq. 23), t -> s t / (1 + (s - 1) t). With m pixels instead of
  n, the same uncertainty about the image needs more noise, by s = sqrt(m / n). The shift follows the density above and
  affects only training. A flow scheduler's own ``shift`` also affects sampling, and the two shifts multiply.

The functions here draw no random numbers. Noise and timesteps are arguments, so that a run is a pure function of its
seed. The scheduler defines the noise schedule: the number of timesteps and the betas come from it.
"""

import math
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from torch import Tensor, nn

from iptv2_diffusion.variational_bound import discretized_gaussian_nll, gaussian_kl, posterior_tables

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSampling = Literal["uniform", "logit_normal"]

FLOW = "flow"
PREDICTION_TYPES = ("epsilon", "v_prediction", FLOW)
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")

# Weight of the variational bound, summed over all T steps, relative to the mean squared error: lambda of Nichol &
# Dhariwal 2021, §3.1.
VLB_WEIGHT = 0.001


# ---------------------------------------------------------------------------------------------------------------------
# Properties of a scheduler
# ---------------------------------------------------------------------------------------------------------------------

# Config fields that define a DDPM's noise schedule
SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def is_of_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler is for flow matching, rather than for noise or v-prediction."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def prediction_of(scheduler: SchedulerMixin) -> str:
    """Return the prediction type of a scheduler's denoiser: "flow", "epsilon", "v_prediction" or "sample"."""
    return FLOW if is_of_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")


def noise_schedule_of(scheduler: SchedulerMixin) -> dict[str, Any] | None:
    """Return the config fields that define the noise at each training timestep, as plain values; None without any."""
    known = {name: scheduler.config[name] for name in SCHEDULE_FIELDS if name in scheduler.config}
    if is_of_flow(scheduler):
        return {"num_train_timesteps": known["num_train_timesteps"]} if "num_train_timesteps" in known else None
    if known.get("trained_betas") is not None:
        known["trained_betas"] = [float(beta) for beta in known["trained_betas"]]
    return known if "beta_schedule" in known else None


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionObjective:
    """Training loss for a diffusers scheduler.

    Args:
        scheduler: ``FlowMatchEulerDiscreteScheduler`` (flow matching), or a DDPM-family scheduler with
            ``alphas_cumprod``, ``add_noise`` and ``get_velocity`` whose ``prediction_type`` is "epsilon" or
            "v_prediction".
        learned_variance: whether to use the hybrid loss. The model then predicts 2C channels, and the scheduler needs
            ``variance_type="learned_range"``.
        timestep_sampling: density that :meth:`sample_timesteps` maps uniform numbers to.
        logit_mean: mean of the normal distribution of "logit_normal".
        logit_std: standard deviation of the normal distribution of "logit_normal", positive.
        timestep_shift: shift s, positive. Values above 1 shift towards noise.
        min_snr_gamma: gamma of the min-SNR weight, usually 5; None for the plain mean squared error.

    Raises:
        ValueError: an argument is out of range, or the scheduler does not fit.
    """

    __module__ = "iptv2_diffusion"  # the public name, so that the file can move

    def __init__(
        self,
        scheduler: SchedulerMixin,
        *,
        learned_variance: bool = False,
        timestep_sampling: TimestepSampling = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_shift: float = 1.0,
        min_snr_gamma: float | None = None,
    ):
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            self.prediction_type: str = "flow"
        else:
            self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {self.prediction_type!r} of {type(scheduler).__name__} has no training objective "
                f"here; use one of {', '.join(PREDICTION_TYPES)}"
            )
        if timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"timestep_sampling is {timestep_sampling!r}; use one of {', '.join(TIMESTEP_SAMPLINGS)}")
        if logit_std <= 0:
            raise ValueError(f"logit_std is {logit_std}; it must be above 0")
        if timestep_shift <= 0:
            raise ValueError(f"timestep_shift is {timestep_shift}; it must be above 0, and 1 shifts nothing")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}; it must be above 0, or None for no weighting")
        if learned_variance:
            variance_type = getattr(scheduler.config, "variance_type", None)
            if self.prediction_type == "flow" or variance_type != "learned_range":
                raise ValueError(
                    "learned_variance needs a DDPM scheduler with variance_type 'learned_range', not "
                    f"{type(scheduler).__name__} with {variance_type!r}; make it with "
                    "make_scheduler('epsilon', learned_variance=True)"
                )
        self.scheduler = scheduler
        self.learned_variance = learned_variance
        self.timestep_sampling = timestep_sampling
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.timestep_shift = timestep_shift
        self.min_snr_gamma = min_snr_gamma
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self._tables = {} if self.prediction_type == "flow" else posterior_tables(scheduler.betas)
        self._tables_on: dict[torch.device, dict[str, Tensor]] = {}

    def __repr__(self) -> str:
        extra = f", min_snr_gamma={self.min_snr_gamma}" if self.min_snr_gamma is not None else ""
        return (
            f"{type(self).__name__}({self.prediction_type}, learned_variance={self.learned_variance}, "
            f"timestep_sampling={self.timestep_sampling}{extra})"
        )

    @staticmethod
    def make_scheduler(
        prediction_type: PredictionType, *, learned_variance: bool = False, **overrides: Any
    ) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
        """Create the scheduler for training and for the saved pipeline.

        "epsilon" and "v_prediction" use linear betas 1e-4 -> 0.02 over 1000 steps [model.md §8]. Samples are not
        clipped, because latents can exceed [-1, 1]. The spacing of sampling steps is "trailing", so that even a few
        steps start from pure noise (Lin et al. 2023, arXiv 2305.08891). With a learned variance it is "linspace"
        (Nichol & Dhariwal 2021), because DDPMScheduler omits the noise of the last step only at timestep 0.

        Args:
            prediction_type: "epsilon", "v_prediction" or "flow".
            learned_variance: whether the model predicts the variance.
            **overrides: arguments of the scheduler's constructor.

        Raises:
            ValueError: `prediction_type` is unknown, or `learned_variance` is used with flow matching.
        """
        if prediction_type == "flow":
            if learned_variance:
                raise ValueError("learned_variance needs 'epsilon' or 'v_prediction'; flow matching has no variance")
            return FlowMatchEulerDiscreteScheduler(**{"num_train_timesteps": 1000, "shift": 1.0, **overrides})
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}")
        variance_type = overrides.pop("variance_type", "learned_range" if learned_variance else "fixed_small")
        settings = {
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction_type": prediction_type,
            "variance_type": variance_type,
            "clip_sample": False,
            "timestep_spacing": "trailing" if variance_type == "fixed_small" else "linspace",
        }
        return DDPMScheduler(**{**settings, **overrides})

    # --- timesteps ---------------------------------------------------------------------------------------------------

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform random numbers (B,) in [0, 1) to timesteps (B,).

        Timesteps are int64 in [0, T-1] for the DDPM family. For flow matching they are float32 in [0, T]: T times the
        noise level s after ``timestep_shift`` and the scheduler's ``shift``, so that training visits the levels that
        sampling visits. The function is pure: the caller seeds or stratifies the numbers.
        """
        level = uniform.float()
        if self.timestep_sampling == "logit_normal":
            # ndtri is the inverse normal distribution function, which is infinite at 0 and 1.
            level = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(level.clamp(1e-7, 1 - 1e-7)))
        shift = self.timestep_shift * (self.scheduler.shift if self.prediction_type == "flow" else 1.0)
        level = shift * level / (1 + (shift - 1) * level)
        if self.prediction_type == "flow":
            return level * self.num_train_timesteps
        return (level * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    # --- the forward process and its inverse -------------------------------------------------------------------------

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents x_t = alpha_t x0 + sigma_t n, (B, C, H, W)."""
        if self.prediction_type != "flow":
            return self.scheduler.add_noise(latents, noise, timesteps)
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the model's first C channels, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise - latents

    def predict_original(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x0 that a prediction implies for x_t, both (B, C, H, W) without variance channels."""
        alpha, sigma = self._alpha_sigma(timesteps)
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * noisy - sigma * prediction
        return noisy - sigma * prediction

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t of x_t = alpha_t x0 + sigma_t n, each (B, 1, 1, 1) float32."""
        if self.prediction_type == "flow":
            sigma = (timesteps.float() / self.num_train_timesteps).view(-1, 1, 1, 1)
            return 1.0 - sigma, sigma
        alpha_bar = self._at("alpha_bar", timesteps)
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def _at(self, table: str, timesteps: Tensor) -> Tensor:
        """Look up a per-timestep table at the timesteps, (B, 1, 1, 1), on the timesteps' device."""
        device = timesteps.device
        if device not in self._tables_on:
            self._tables_on[device] = {name: values.to(device) for name, values in self._tables.items()}
        return self._tables_on[device][table][timesteps].view(-1, 1, 1, 1)

    # --- losses ------------------------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of each sample, (B,) float32: the mean over C, H, W, plus the bound for a learned variance.

        Args:
            model: denoiser, called as ``model(x_t, timestep=..., class_labels=..., return_dict=False)[0]``.
            latents: clean latents x0 in model units, (B, C, H, W).
            noise: standard normal noise n, (B, C, H, W).
            timesteps: timesteps from :meth:`sample_timesteps`, (B,).
            class_labels: class labels, (B,) int64, or None. The caller has replaced dropped labels by the null label.

        Raises:
            ValueError: the model's output does not have C (or, with a learned variance, 2C) channels.
        """
        latents, noise = latents.float(), noise.float()
        noisy = self.add_noise(latents, noise, timesteps)
        output = model(noisy, timestep=timesteps, class_labels=class_labels, return_dict=False)[0].float()
        channels = latents.shape[1]
        expected = channels * (2 if self.learned_variance else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the model returns {output.shape[1]} channels for latents of {channels}; with learned_variance="
                f"{self.learned_variance} it must return {expected}: set the model's out_channels to {expected}"
            )
        prediction = output[:, :channels]
        error = (prediction - self.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
        loss = self.snr_weight(timesteps) * error
        if self.learned_variance:
            # The bound trains only the variance: its noisy gradient must not reach the prediction (§3.1).
            bound = self.variational_bound(prediction.detach(), output[:, channels:], latents, noisy, timesteps)
            # T times the term of one random t is an unbiased estimate of the sum over T steps.
            loss = loss + VLB_WEIGHT * self.num_train_timesteps * bound
        return loss

    def snr_weight(self, timesteps: Tensor) -> Tensor:
        """Return the min-SNR weight of each sample's squared error, (B,) float32; ones without ``min_snr_gamma``.

        The squared error of x0 is sigma²/alpha², sigma² or s² times that of epsilon, v or the flow velocity. The
        product of this factor and min(alpha²/sigma², gamma) gives the expressions below, which stay finite at both
        ends of the schedule.
        """
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape[0], device=timesteps.device)
        alpha, sigma = self._alpha_sigma(timesteps)
        signal, noise = alpha.square().flatten(), self.min_snr_gamma * sigma.square().flatten()
        return (noise / signal).clamp(max=1.0) if self.prediction_type == "epsilon" else torch.minimum(signal, noise)

    def variational_bound(
        self, prediction: Tensor, variance_output: Tensor, latents: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Compute one term of the variational bound for each sample, (B,) float32, in bits per latent value.

            t > 0:  KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))
            t = 0:  -log p(x0 | x_1) of the discretised Gaussian

        The log-variance of p interpolates between those of the posterior and of beta_t (Nichol & Dhariwal 2021,
        eq. 15): log var = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2. The model's output v is meant for
        [-1, 1] but is not clipped.

        Args:
            prediction: first half of the model's output, (B, C, H, W).
            variance_output: second half of the model's output, v, (B, C, H, W).
            latents: clean latents x0, (B, C, H, W).
            noisy: noisy latents x_t, (B, C, H, W).
            timesteps: (B,) int64.
        """
        fraction = (variance_output + 1.0) / 2.0
        posterior_log_variance = self._at("posterior_log_variance", timesteps)
        log_variance = fraction * self._at("log_beta", timesteps) + (1.0 - fraction) * posterior_log_variance

        predicted = self.predict_original(prediction, noisy, timesteps)
        # Both means contain the same multiple of x_t, which cancels in their difference.
        mean_difference = self._at("posterior_x0", timesteps) * (latents - predicted)
        kl = gaussian_kl(mean_difference, posterior_log_variance, log_variance)

        first = (timesteps == 0).view(-1, 1, 1, 1)
        # At t = 0 the mean of p is the predicted x0. At other t the term is not used, and x0 itself keeps it finite.
        mean = torch.where(first, predicted, latents)
        nll = discretized_gaussian_nll(latents, mean, torch.where(first, log_variance, torch.zeros_like(log_variance)))
        return torch.where(first, nll, kl).mean(dim=(1, 2, 3)) / math.log(2.0)


def null_label(model: ModelMixin) -> int | None:
    """Return the index of the null label, which equals the number of classes; None for an unconditional model."""
    if "num_embeds_ada_norm" in model.config:
        return model.config.num_embeds_ada_norm
    return model.config.num_class_embeds
