"""Training objectives: what the denoiser is asked to predict, and how far off it is.

With x0 the clean latents, n ~ N(0, I) and x_t = alpha_t x0 + sigma_t n (all tensors (B, C, H, W)):

=================  ============================  ==================================================  =============
prediction type    alpha_t, sigma_t              target                                              source
=================  ============================  ==================================================  =============
``epsilon``        sqrt(abar_t), sqrt(1-abar_t)  n                                                   Ho et al. 2020
``v_prediction``   sqrt(abar_t), sqrt(1-abar_t)  alpha_t n - sigma_t x0                              Salimans & Ho 2022
``flow``           1 - s, s with s in [0, 1]     n - x0                                              Liu et al. 2022
=================  ============================  ==================================================  =============

The loss is the mean squared error over C, H, W, one number per sample, always in float32. Options:

* ``learned_variance``: the hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672, eqs. 15 and 16), the recipe of ADM
  and DiT [model.md §8]. The model has 2C outputs; see :meth:`DiffusionObjective.variational_bound`.
* ``min_snr_gamma``: Hang et al. 2023 (arXiv 2303.09556): the squared error *of x0* is weighted with min(SNR, gamma).
* ``timestep_sampling="logit_normal"``: Esser et al. 2024 (arXiv 2403.03206, eq. 19): more samples at middle noise
  levels.
* ``timestep_shift``: the same paper's shift for resolution (eq. 23), t -> s t / (1 + (s - 1) t): at m pixels instead of
  n a latent keeps its blur only with more noise, by s = sqrt(m / n). It comes after the density above, whichever that
  is, and touches training alone; a flow scheduler's own ``shift`` moves sampling too. Shifts multiply.

Nothing here draws random numbers: noise and timesteps come from the caller, so that a run is a pure function of its
seed. The scheduler owns the noise schedule; the number of timesteps and the betas are read from it.
"""

import math
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSampling = Literal["uniform", "logit_normal"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")

# Weight of the variational bound, summed over all T steps, beside the mean squared error: lambda of Nichol & Dhariwal
# 2021, §3.1.
VLB_WEIGHT = 0.001


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian terms of the variational bound
# ---------------------------------------------------------------------------------------------------------------------


def gaussian_kl(mean_difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(N(m_q, v_q) || N(m_p, v_p)) of each element, in nats, with ``mean_difference`` = m_q - m_p.

    Ho et al. 2020, eq. 5, written out for diagonal Gaussians. All arguments broadcast; the result is non-negative.
    """
    ratio = torch.exp(log_variance_q - log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q - 1.0 + ratio + mean_difference.square() * torch.exp(-log_variance_p))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x) in nats of each element, x being cut into 256 bins of width 2/255 over [-1, 1], the outer ones open.

    Ho et al. 2020, eq. 13. Latents are not confined to [-1, 1]: values beyond fall in the open bins, exactly as in ADM
    and DiT, which use the pixel-space decoder term unchanged. The normal distribution function is exact here (ADM
    approximates it by tanh).
    """
    half_bin = 1.0 / 255.0
    inverse_std = torch.exp(-0.5 * log_variance)
    centred = x - mean
    upper = inverse_std * (centred + half_bin)
    lower = inverse_std * (centred - half_bin)
    # P(lower < z < upper) is taken in the left tail (z -> -z where both ends are positive): a difference of two
    # numbers near 1 would lose everything in float32.
    flip = lower > 0
    left, right = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    inside = torch.log((torch.special.ndtr(right) - torch.special.ndtr(left)).clamp(min=1e-12))
    log_likelihood = torch.where(
        x < -0.999,
        torch.special.log_ndtr(upper),
        torch.where(x > 0.999, torch.special.log_ndtr(-lower), inside),
    )
    return -log_likelihood


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionObjective:
    """The training loss that belongs to a diffusers scheduler.

    Args:
        scheduler: ``FlowMatchEulerDiscreteScheduler`` (flow matching), or a DDPM-family scheduler with
            ``alphas_cumprod``, ``add_noise`` and ``get_velocity`` whose ``prediction_type`` is "epsilon" or
            "v_prediction".
        learned_variance: hybrid loss; the model then predicts 2C channels. Needs ``variance_type="learned_range"``.
        timestep_sampling: density that :meth:`sample_timesteps` maps uniform numbers to.
        logit_mean, logit_std: of "logit_normal".
        timestep_shift: s, towards noise if above 1.
        min_snr_gamma: None for the plain mean squared error; 5 is the usual value otherwise.
    """

    __module__ = "iptv2_diffusion"  # the public name, wherever this file lives

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
            raise ValueError(f"timestep_sampling {timestep_sampling!r}: use one of {', '.join(TIMESTEP_SAMPLINGS)}")
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
        self._tables = {} if self.prediction_type == "flow" else _posterior_tables(scheduler.betas)
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
        """The scheduler to train with and to save in the pipeline. ``overrides`` go to its constructor.

        "epsilon" and "v_prediction": linear betas 1e-4 -> 0.02 over 1000 steps [model.md §8], no clipping, since
        latents are not confined to [-1, 1]. Sampling steps are spaced "trailing", so that few steps still start from
        pure noise (Lin et al. 2023, arXiv 2305.08891); with a learned variance "linspace" (Nichol & Dhariwal's),
        because DDPMScheduler leaves the noise out of the last step only where that is timestep 0.
        """
        if prediction_type == "flow":
            if learned_variance:
                raise ValueError(
                    "learned_variance goes with 'epsilon' or 'v_prediction'; flow matching has no variance"
                )
            return FlowMatchEulerDiscreteScheduler(**{"num_train_timesteps": 1000, "shift": 1.0, **overrides})
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")
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
        """Timesteps (B,) for uniform random numbers (B,) in [0, 1).

        DDPM family: int64 in [0, T-1]. Flow: float32 in [0, T], that is T times the noise level s, after
        ``timestep_shift`` and the scheduler's ``shift`` (so that training visits what sampling does). A pure function:
        stratifying or seeding the numbers is the caller's choice.
        """
        level = uniform.float()
        if self.timestep_sampling == "logit_normal":
            # ndtri, the inverse normal distribution function, is infinite at 0 and 1
            level = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(level.clamp(1e-7, 1 - 1e-7)))
        shift = self.timestep_shift * (self.scheduler.shift if self.prediction_type == "flow" else 1.0)
        level = shift * level / (1 + (shift - 1) * level)
        if self.prediction_type == "flow":
            return level * self.num_train_timesteps
        return (level * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    # --- the forward process and its inverse -------------------------------------------------------------------------

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t n, (B, C, H, W)."""
        if self.prediction_type != "flow":
            return self.scheduler.add_noise(latents, noise, timesteps)
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the first C channels of the model should be, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise - latents

    def predict_original(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The x0 that a prediction (B, C, H, W; without variance channels) stands for, given x_t."""
        alpha, sigma = self._alpha_sigma(timesteps)
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * noisy - sigma * prediction
        return noisy - sigma * prediction

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of x_t = alpha_t x0 + sigma_t n, each (B, 1, 1, 1) float32."""
        if self.prediction_type == "flow":
            sigma = (timesteps.float() / self.num_train_timesteps).view(-1, 1, 1, 1)
            return 1.0 - sigma, sigma
        alpha_bar = self._at("alpha_bar", timesteps)
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def _at(self, table: str, timesteps: Tensor) -> Tensor:
        """Entries of a per-timestep table, (B, 1, 1, 1), from a copy kept on the timesteps' device."""
        device = timesteps.device
        if device not in self._tables_on:
            self._tables_on[device] = {name: values.to(device) for name, values in self._tables.items()}
        return self._tables_on[device][table][timesteps].view(-1, 1, 1, 1)

    # --- losses ------------------------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample, (B,) float32: the mean over C, H, W, plus the bound where the variance is learned.

        Args:
            model: called as ``model(x_t, timestep=..., class_labels=..., return_dict=False)[0]``.
            latents: x0 in model units, (B, C, H, W).
            noise: standard normal, same shape.
            timesteps: (B,), as :meth:`sample_timesteps` gives them.
            class_labels: (B,) int64 with labels already dropped to the null label where wanted, or None.
        """
        latents, noise = latents.float(), noise.float()
        noisy = self.add_noise(latents, noise, timesteps)
        output = model(noisy, timestep=timesteps, class_labels=class_labels, return_dict=False)[0].float()
        channels = latents.shape[1]
        expected = channels * (2 if self.learned_variance else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the model gives {output.shape[1]} channels for latents of {channels}; with learned_variance="
                f"{self.learned_variance} it must give {expected}: set the model's out_channels to {expected}"
            )
        prediction = output[:, :channels]
        error = (prediction - self.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
        loss = self.snr_weight(timesteps) * error
        if self.learned_variance:
            # The bound trains the variance only: the detached mean keeps its noisy gradient off the prediction (§3.1)
            bound = self.variational_bound(prediction.detach(), output[:, channels:], latents, noisy, timesteps)
            # One random t stands for the sum over T steps: an unbiased estimate is T times the term.
            loss = loss + VLB_WEIGHT * self.num_train_timesteps * bound
        return loss

    def snr_weight(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weight of each sample's squared error, (B,) float32; ones without ``min_snr_gamma``.

        The error of x0 is sigma²/alpha², sigma² or s² times that of epsilon, v or the velocity; times
        min(alpha²/sigma², gamma) these become the expressions below, which stay finite at both ends of the schedule.
        """
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape[0], device=timesteps.device)
        alpha, sigma = self._alpha_sigma(timesteps)
        signal, noise = alpha.square().flatten(), self.min_snr_gamma * sigma.square().flatten()
        return (noise / signal).clamp(max=1.0) if self.prediction_type == "epsilon" else torch.minimum(signal, noise)

    def variational_bound(
        self, prediction: Tensor, variance_output: Tensor, latents: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> Tensor:
        """One term of the variational bound for each sample, (B,) float32, in bits per latent value.

        t > 0: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); t = 0: -log p(x0 | x_1) of the discretised Gaussian.
        p's log-variance interpolates between the posterior's and beta_t's by the model's v in [-1, 1] (eq. 15; (v+1)/2
        is the fraction, which the network may exceed):  log var = f log beta_t + (1 - f) log beta~_t.

        ``prediction`` and ``variance_output`` are the two halves of the model's output, each (B, C, H, W).
        """
        fraction = (variance_output + 1.0) / 2.0
        posterior_log_variance = self._at("posterior_log_variance", timesteps)
        log_variance = fraction * self._at("log_beta", timesteps) + (1.0 - fraction) * posterior_log_variance

        predicted = self.predict_original(prediction, noisy, timesteps)
        # Both means hold the same multiple of x_t, which cancels in their difference.
        mean_difference = self._at("posterior_x0", timesteps) * (latents - predicted)
        kl = gaussian_kl(mean_difference, posterior_log_variance, log_variance)

        first = (timesteps == 0).view(-1, 1, 1, 1)
        # At t = 0 p's mean is the predicted x0. Elsewhere the term is discarded; harmless inputs keep it finite.
        mean = torch.where(first, predicted, latents)
        nll = discretized_gaussian_nll(latents, mean, torch.where(first, log_variance, torch.zeros_like(log_variance)))
        return torch.where(first, nll, kl).mean(dim=(1, 2, 3)) / math.log(2.0)


def null_label(model: nn.Module) -> int | None:
    """The class index that means "no label" (also the number of classes); None for an unconditional model."""
    if "num_embeds_ada_norm" in model.config:
        return model.config.num_embeds_ada_norm
    return model.config.num_class_embeds


def _posterior_tables(betas: Tensor) -> dict[str, Tensor]:
    """Constants (T,) float32 of q(x_{t-1} | x_t, x0) at each t (Ho et al. 2020, eqs. 6, 7), worked out in float64."""
    beta = betas.detach().cpu().double()
    alpha_bar = torch.cumprod(1.0 - beta, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    # The posterior's variance at t = 0 is zero, whose logarithm is nothing to interpolate with: t = 1's stands in.
    variance = torch.cat([variance[1:2], variance[1:]])
    tables = {
        "alpha_bar": alpha_bar,
        "log_beta": beta.log(),
        "posterior_log_variance": variance.log(),
        "posterior_x0": previous.sqrt() * beta / (1.0 - alpha_bar),
    }
    return {name: values.float() for name, values in tables.items()}
