"""Terms of the variational bound of a Gaussian diffusion (Ho et al. 2020, arXiv 2006.11239)."""

import torch
from torch import Tensor

__all__ = ["discretized_gaussian_nll", "gaussian_kl", "posterior_tables"]


def gaussian_kl(mean_difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """Elementwise KL(N(m_q, v_q) || N(m_p, v_p)) in nats, with ``mean_difference`` = m_q - m_p.

    This is Ho et al. 2020, eq. 5, for diagonal Gaussians. All arguments broadcast; the result is non-negative.
    """
    ratio = torch.exp(log_variance_q - log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q - 1.0 + ratio + mean_difference.square() * torch.exp(-log_variance_p))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Elementwise -log p(x) in nats of a Gaussian discretised into 256 bins of width 2/255 over [-1, 1].

    This is Ho et al. 2020, eq. 13. The two outer bins are open. Latents can exceed [-1, 1] and then fall in the open
    bins. ADM and DiT also use this pixel-space term unchanged. The normal distribution function is exact; ADM
    approximates it by tanh.
    """
    half_bin = 1.0 / 255.0
    inverse_std = torch.exp(-0.5 * log_variance)
    centred = x - mean
    upper = inverse_std * (centred + half_bin)
    lower = inverse_std * (centred - half_bin)
    # If both ends are positive, z -> -z moves P(lower < z < upper) to the left tail: a difference of two float32
    # numbers near 1 would lose all digits.
    flip = lower > 0
    left, right = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    inside = torch.log((torch.special.ndtr(right) - torch.special.ndtr(left)).clamp(min=1e-12))
    log_likelihood = torch.where(
        x < -0.999,
        torch.special.log_ndtr(upper),
        torch.where(x > 0.999, torch.special.log_ndtr(-lower), inside),
    )
    return -log_likelihood


def posterior_tables(betas: Tensor) -> dict[str, Tensor]:
    """Compute constants (T,) float32 of q(x_{t-1} | x_t, x0) in float64 (Ho et al. 2020, eqs. 6 and 7)."""
    beta = betas.detach().cpu().double()
    alpha_bar = torch.cumprod(1.0 - beta, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    # The posterior's variance at t = 0 is zero and has no logarithm. The variance at t = 1 replaces it.
    variance = torch.cat([variance[1:2], variance[1:]])
    tables = {
        "alpha_bar": alpha_bar,
        "log_beta": beta.log(),
        "posterior_log_variance": variance.log(),
        "posterior_x0": previous.sqrt() * beta / (1.0 - alpha_bar),
    }
    return {name: values.float() for name, values in tables.items()}
