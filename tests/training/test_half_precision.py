"""bfloat16 and float16 autocast: the parts that must stay in float32 do, and 500 steps stay finite."""

import math

import pytest
import torch
from accelerate import Accelerator

from iptv2_diffusion import DiffusionObjective, create_model
from iptv2_diffusion.data.draws import DataOrder, draw_step
from iptv2_diffusion.training.optimisation import make_optimizer
from iptv2_diffusion.training.options import TrainingConfig

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def tiny():
    torch.manual_seed(0)
    return create_model("tiny", sample_size=8, num_class_embeds=3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_is_float32_and_near_that_of_full_precision(precision):
    """Latents of 100 times the usual size: their squares leave float16's range, the loss must not."""
    model, objective = tiny(), DiffusionObjective(DiffusionObjective.make_scheduler("flow"))
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    draws = draw_step(DataOrder(100, 0), 0, 8, (4, 8, 8))
    arguments = (100 * draws.posterior_noise, draws.noise, objective.sample_timesteps(draws.timesteps), draws.items % 3)
    full = objective.loss(model, *arguments)
    with torch.autocast("cpu", PRECISIONS[precision]):
        half = objective.loss(model, *arguments)
    assert half.dtype == torch.float32
    assert full.max() > 5_000
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_half_precision_stays_finite_for_500_steps(precision, prediction):
    config = TrainingConfig(learning_rate=1e-3, mixed_precision=precision)
    objective = DiffusionObjective(DiffusionObjective.make_scheduler(prediction))
    accelerator, model = Accelerator(mixed_precision=precision), tiny()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config, fused=precision == "bf16"))
    order, losses = DataOrder(64, 0), []
    for step in range(500):
        draws = draw_step(order, step, 8, (4, 8, 8))
        latents = (draws.items.view(-1, 1, 1, 1) / 32 - 1).expand(-1, 4, 8, 8)
        timesteps = objective.sample_timesteps(draws.timesteps)
        loss = objective.loss(model, latents, draws.noise, timesteps, draws.items % 3).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    print(f"{precision} {prediction}: loss {losses[0]:.3f} -> {sum(losses[-50:]) / 50:.3f}")
