"""Averages of the weights by a power function of time, and reconstruction of other averages after training.

Karras et al. 2024 (arXiv 2312.02696, §3.1, §3.2, appendix C). At step t the average of exponent gamma is

    shadow(t) = (gamma + 1) / t^(gamma + 1)  ∫ tau^gamma weights(tau) dtau  over [0, t]                         (eq. 2)
    shadow   <- b shadow + (1 - b) weights,   b(t) = (1 - 1/t)^(gamma + 1)                                      (eq. 4)

so it covers the same fraction of the run at every t. The standard deviation of the profile, relative to t, measures
this fraction:           sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-1/2.                         (eq. 3)

Snapshots of two such averages during the run are enough to reconstruct averages of other lengths. The profile of any
sigma_rel is their linear combination in the least-squares sense, and the weights approximately so (§3.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iptv2_diffusion.files import atomic

SIGMA_REL_LIMIT = 12**-0.5  # relative width of the plain mean over all steps, gamma = 0
_METADATA = "power_average"
_TEMPORARY = ".tmp-"


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma > 0 of a relative width in (0, 12^-1/2 = 0.289). Raises a ValueError outside.

    This inverts eq. 3 (appendix C) by bisection. The width falls with gamma, from 12^-1/2 at 0, and is below
    1 / (gamma + 2), so gamma is between 0 and 1 / sigma_rel.
    """
    if not 0 < sigma_rel < SIGMA_REL_LIMIT:
        raise ValueError(f"sigma_rel is {sigma_rel:g}; it must be in (0, {SIGMA_REL_LIMIT:.3f}), usually 0.05 to 0.15")
    low, high = 0.0, 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:  # until float64 has no number between them
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return high


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of an exponent: the standard deviation of p(tau) divided by t (eq. 3)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


class PowerEMA(EMAModel):
    """diffusers' `EMAModel` with the decay of eq. 4. The first step replaces the initial weights."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sigma_rel: float) -> None:
        super().__init__(parameters, foreach=True)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """Return b(t) of eq. 4 at step t, counted from 1, with which the recursion reproduces the integral of eq. 2."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


@dataclass(frozen=True)
class Snapshot:
    """A power-function average on disk.

    Attributes:
        path: safetensors file with the averages by the names of the parameters.
        steps: t, the number of steps in the average.
        sigma_rel: relative width.
    """

    path: Path
    steps: int
    sigma_rel: float


def write_snapshot(folder: Path, steps: int, sigma_rel: float, tensors: dict[str, Tensor]) -> None:
    """Write a snapshot completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{steps:08d}-{sigma_rel:.4f}.safetensors"
    metadata = {_METADATA: json.dumps({"steps": steps, "sigma_rel": sigma_rel})}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def find_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots of a folder in the order of their steps. Raises a ValueError for a file of another kind."""
    found = []
    for path in _snapshots(folder):
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get(_METADATA, "null"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is not a complete snapshot of power-function averages; remove it") from error
        if not isinstance(described, dict) or set(described) != {"steps", "sigma_rel"}:
            raise ValueError(f"{path} is not a snapshot of power-function averages; remove it")
        found.append(Snapshot(path, **described))
    return found


def forget_snapshots_after(folder: Path, steps: int) -> None:
    """Remove snapshots that are newer than the checkpoint of a resumption, and incomplete files of a killed run."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink()
    for path in _snapshots(folder):
        if int(path.name.split("-")[0]) > steps:
            path.unlink()


def _snapshots(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(_TEMPORARY))


def coefficients(profiles: Sequence[tuple[int, float]], steps: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """Return the coefficients of the profiles whose sum is nearest to the profile of `sigma_rel` at `steps`.

    Appendix C synthesises a profile p from the stored ones p_i. The x that minimise the integral of
    (p - sum_i x_i p_i)^2 over time solve the normal equations  sum_j <p_i, p_j> x_j = <p_i, p>.

    Args:
        profiles: (steps, sigma_rel) of each stored profile.
        steps, sigma_rel: those of the requested profile.

    Returns:
        The coefficients, and the relative error: the norm of the difference of the profiles divided by the norm of the
        requested one.
    """
    target = [(steps, sigma_rel)]
    wanted = _inner(target, target)[0, 0]  # <p, p>
    gram, right = _inner(profiles, profiles), _inner(profiles, target)[:, 0]  # <p_i, p_j> and <p_i, p>
    # Solved by least squares, because neighbouring snapshots are so similar that the equations are nearly singular.
    factors = np.linalg.lstsq(gram, right, rcond=None)[0]
    missed = wanted - 2 * factors @ right + factors @ gram @ factors  # the minimum of the integral
    return factors, math.sqrt(max(0.0, missed) / wanted)


def _inner(rows: Sequence[tuple[int, float]], columns: Sequence[tuple[int, float]]) -> np.ndarray:
    """Return the inner products <p_a, p_b>, integrals of p_a p_b over time, of all rows and columns (appendix C).

    With p(tau) = (g + 1) tau^g / t^(g + 1) up to t and 0 after it (eq. 2), the product ends at m = min(t_a, t_b):

        <p_a, p_b> = (g_a + 1) (g_b + 1) / (t_a^(g_a + 1) t_b^(g_b + 1)) * m^(g_a + g_b + 1) / (g_a + g_b + 1)
    """
    ta, tb = (np.array([float(steps) for steps, _ in profiles]) for profiles in (rows, columns))
    ga, gb = (np.array([gamma_of(sigma_rel) for _, sigma_rel in profiles]) for profiles in (rows, columns))
    ta, ga = ta[:, None], ga[:, None]
    m = np.minimum(ta, tb)
    # Powers of ratios, because powers of the steps themselves would overflow float64.
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (m / ta) ** ga * (m / tb) ** gb * m / (ta * tb)


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, steps: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """Reconstruct the average of relative width `sigma_rel` at `steps` (the last step if None) from earlier snapshots.

    Returns float32 tensors by name, and the relative error of the profile (see `coefficients`). Below 0.01 the result
    cannot be distinguished from an average that was kept during training. More snapshots lower the error.
    """
    if not snapshots:
        raise ValueError("there are no snapshots; train with --ema power")
    steps = steps or max(s.steps for s in snapshots)
    used = [s for s in snapshots if s.steps <= steps]
    if not used:
        raise ValueError(f"there is no snapshot up to step {steps}; the first is of step {snapshots[0].steps}")
    factors, error = coefficients([(s.steps, s.sigma_rel) for s in used], steps, sigma_rel)
    # Eq. 2 is linear in the profile, so the coefficients of the profiles are also those of the averages (§3.2).
    total: dict[str, Tensor] = {}
    for snapshot, factor in zip(used, factors, strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_tensor(name).double() * factor
                total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}, error
