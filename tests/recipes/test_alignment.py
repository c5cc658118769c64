"""Alignment: the loss against a loop, the stage's tokens, which parameters get gradients, and no effect without it."""

import pytest
import torch
import torch.nn.functional as F

from iptv2_diffusion import DiffusionObjective, create_model
from iptv2_diffusion.data.draws import DataOrder, draw_step
from iptv2_diffusion.recipes.latent_diffusion.alignment import (
    Alignment,
    attach_alignment,
    load_target,
    without_alignment,
)
from iptv2_diffusion.training.errors import ConfigError


def tiny():
    torch.manual_seed(0)
    return create_model("tiny", sample_size=8, num_class_embeds=3)


def forward(model, batch=2, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, *size, generator=generator)
    return model(latents, timestep=torch.full((batch,), 500), class_labels=torch.zeros(batch, dtype=torch.long))[0]


def test_the_loss_is_minus_the_mean_cosine_of_the_tokens():
    alignment = Alignment(6, 5, hidden=7)
    tokens, features = torch.randn(2, 6, 3, 4), torch.randn(2, 5, 3, 4)
    alignment.capture(alignment, (tokens,))
    expected = torch.zeros(2)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                projected = alignment.projection(tokens[b, :, y, x])
                norms = projected.norm() * features[b, :, y, x].norm()
                expected[b] -= projected @ features[b, :, y, x] / norms / 12
    torch.testing.assert_close(alignment.loss(features), expected)


def test_features_of_another_size_are_resized_to_the_tokens():
    alignment = Alignment(6, 5, hidden=7)
    tokens, features = torch.randn(2, 6, 2, 2), torch.randn(2, 5, 4, 4)
    alignment.capture(alignment, (tokens,))
    fine = alignment.loss(features)
    alignment.capture(alignment, (tokens,))
    resized = F.interpolate(features, (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(fine, alignment.loss(resized))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_tokens_are_those_that_leave_the_stage(stage):
    """Against a hook on the stage's last block, with the map size of its level."""
    model = tiny()
    backbone, seen = model.backbone, []
    blocks = [*backbone.encoder, backbone.bottleneck, *backbone.decoder][stage]
    blocks[-1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    alignment = attach_alignment(model, stage, dim=5, hidden=7)
    forward(model)
    expected = alignment.projection(seen[0].permute(0, 2, 3, 1))
    torch.testing.assert_close(alignment._projected, expected)
    side = (8, 4, 8)[stage]
    assert alignment._projected.shape == (2, side, side, 5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_projection_and_the_stages_up_to_there(checkpointing):
    model = tiny()
    for norm in (m for m in model.modules() if type(m).__name__ == "AdaLayerNormZero2d"):
        torch.nn.init.normal_(norm.linear.weight, std=0.05)  # otherwise every block is the identity
    if checkpointing:
        model.enable_gradient_checkpointing()
    alignment = attach_alignment(model, 0, dim=5, hidden=7)
    forward(model)
    alignment.loss(torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(2))).sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"stem.weight", "alignment.projection.0.weight", "alignment.projection.4.bias"} <= touched
    assert any(name.startswith("backbone.encoder.0") for name in touched)
    assert not any(name.startswith(("backbone.bottleneck", "backbone.decoder", "head", "proj_out")) for name in touched)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        alignment = attach_alignment(model, 1, dim=5, hidden=7)
        output = forward(model)
        loss = alignment.loss(torch.ones(2, 5, 4, 4)).sum() + (output - 1).square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)


def test_without_alignment_there_is_no_hook_or_parameter_and_evaluation_projects_nothing():
    plain, model = tiny(), tiny()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    alignment = attach_alignment(model, 1, dim=5, hidden=7)
    assert without_alignment(model.state_dict()).keys() == plain.state_dict().keys() < model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(forward(model), forward(plain))
    forward(model.eval())
    assert alignment._projected is None


def test_training_aligns_the_tokens():
    model, objective = tiny(), DiffusionObjective(DiffusionObjective.make_scheduler("flow"))
    alignment = attach_alignment(model, 1, dim=4, hidden=32)
    optimizer, order, losses = torch.optim.AdamW(model.parameters(), 3e-3), DataOrder(64, 0), []
    for step in range(40):
        draws = draw_step(order, step, 8, (4, 8, 8))
        latents = draws.posterior_noise
        objective.loss(model, latents, draws.noise, objective.sample_timesteps(draws.timesteps), draws.items % 3)
        loss = alignment.loss(F.avg_pool2d(latents, 2).tanh() + 1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < -0.7 < sum(losses[:2]) / 2


def test_impossible_alignments_are_reported():
    with pytest.raises(ConfigError, match=r"align_stage is 9; this model has stages 0 to 2, and 1 is the bottleneck"):
        attach_alignment(tiny(), 9, dim=5)
    with pytest.raises(ConfigError, match="needs an IPT-V2 model"):
        attach_alignment(torch.nn.Linear(2, 2), 0, dim=5)
    for name in ("no.such:thing", "torch:nothing_of_the_kind", "torch"):
        with pytest.raises(ConfigError, match=r"no such module:function"):
            load_target(name, None)
