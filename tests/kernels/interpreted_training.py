"""200 training steps of a tiny denoiser with the Triton kernels under the interpreter, and with the plain formulas.

The slow test of `test_triton_training.py` runs it; see interpreted_fcsa.py.
"""

import dataclasses

import torch

from iptv2_diffusion import IPTV2Transformer2DModel
from iptv2_diffusion.kernels import registry, use_fast_forms

STEPS = 200
OPERATORS = ("focal_attention", "grid_attention")


def losses():
    """The losses of the steps: ε-prediction of noise on one fixed batch of latents."""
    torch.manual_seed(0)
    model = IPTV2Transformer2DModel(
        sample_size=8,
        num_class_embeds=2,
        channels=8,
        layers_per_stage=(1,),
        num_attention_heads=1,
        window_size=4,
        grid_stride=2,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    latents, generator = torch.randn(1, 4, 8, 8), torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        noise = torch.randn(latents.shape, generator=generator)
        time = torch.randint(1000, (1,), generator=generator)
        share = (time / 1000).view(-1, 1, 1, 1)
        predicted = model((1 - share) * latents + share * noise, time, class_labels=torch.tensor([1])).sample[:, :4]
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_the_loss_curve_is_the_same(monkeypatch):
    with use_fast_forms(False, *OPERATORS):
        expected = losses()
    calls = dict.fromkeys(OPERATORS, 0)
    for name in OPERATORS:
        (form,) = (f for f in registry._FORMS[name] if f.device == "cuda")

        def run(*args, name=name, form=form, **kwargs):
            calls[name] += 1
            return form.run(*args, **kwargs)

        monkeypatch.setitem(registry._FORMS, name, [dataclasses.replace(form, device="cpu", run=run)])
    found = losses()
    assert all(count == STEPS for count in calls.values()), calls
    assert expected[-20:].mean() < 0.8 * expected[:20].mean()  # it learns
    print("largest relative difference of a loss:", ((found - expected).abs() / expected).max().item())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
