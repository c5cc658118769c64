"""The operators' written-out backwards against autograd's gradient of a plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iptv2_diffusion.models import operators

GROUPS, HEADS, TOKENS, DIM = 3, 2, 12, 8


def random(*shape: int, seed: int = 0, low: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if low is not None:
        return (torch.rand(*shape, generator=generator) + low).requires_grad_()
    return torch.randn(*shape, generator=generator).requires_grad_()


def assert_same_gradients(operator, plain, inputs: tuple[Tensor, ...], *constants: Tensor) -> None:
    """Equal values, and equal gradients for a random gradient of the output."""
    ours, theirs = operator(*inputs, *constants), plain(*inputs, *constants)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9)).to(ours.dtype)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def plain_channel_attention(q, k, v, affine, temperature):
    """As model.md §3 has it: normalise the vectors, then multiply."""
    q = torch.nn.functional.normalize(q * affine[..., None], dim=-2)
    k = torch.nn.functional.normalize(k * affine[..., None], dim=-2)
    logits = q.transpose(-2, -1) @ k * temperature[:, None, None]
    return v @ logits.softmax(dim=-1).transpose(-2, -1)


def plain_rotate_normalised(tokens, scale, cos, sin):
    q, k, v = tokens.unbind(2)

    def turn(x):
        even, odd = torch.nn.functional.normalize(x, dim=-1).unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)

    return turn(q) * scale[:, None], turn(k), v


def channel_attention_inputs() -> tuple[Tensor, ...]:
    q, k, v = (random(GROUPS, HEADS, TOKENS, DIM, seed=i) for i in range(3))
    return q, k, v, random(HEADS, TOKENS, low=0.5), random(HEADS, low=1.0)


class TestGradients:
    def test_channel_attention(self):
        assert_same_gradients(operators.channel_attention, plain_channel_attention, channel_attention_inputs())

    def test_channel_attention_with_an_affine_of_zero_and_an_empty_channel(self):
        """A position that takes no part, and a channel that is zero everywhere (as in padding)."""
        q, k, v, affine, temperature = channel_attention_inputs()
        with torch.no_grad():
            affine[0, 3] = 0
            q[..., 1] = 0
        grads = torch.autograd.grad(
            operators.channel_attention(q, k, v, affine, temperature).square().sum(), (q, k, v, affine, temperature)
        )
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[0][:, 0, 3].abs().max() == 0

    def test_rotate_normalised(self):
        angle = random(TOKENS, DIM // 2, seed=5).detach()
        inputs = random(GROUPS, TOKENS, 3, HEADS, DIM), random(HEADS, low=1.0)

        def joined(function):
            return lambda *given: torch.stack(function(*given))

        assert_same_gradients(
            joined(operators.rotate_normalised), joined(plain_rotate_normalised), inputs, angle.cos(), angle.sin()
        )

    @pytest.mark.parametrize("base_shape", [(2, 3, 1, 1), (2, 3, 4, 5)], ids=["shift", "residual"])
    def test_scale_add(self, base_shape):
        inputs = random(*base_shape, seed=1), random(2, 3, 1, 1, seed=2), random(2, 3, 4, 5, seed=3)
        assert_same_gradients(operators.scale_add, lambda base, scale, x: base + scale * x, inputs)

    @pytest.mark.parametrize("margins", [(None,), (None, 2), (None, 0)])
    def test_window_partition(self, margins):
        qkv = random(2, 8, 12, 3 * HEADS * DIM)

        def joined(function):
            return lambda x: torch.cat([part.flatten() for part in function(x)])

        def plain(x):
            parts = []
            for margin in margins:
                start, end = (0, 0) if margin is None else (margin, 4 - margin)
                x_cut = x[:, start : 8 - end, start : 12 - end]
                planes = x_cut.unflatten(-1, (3, HEADS, DIM)).unbind(3)
                for plane in planes:
                    windows = [rows.split(4, dim=2) for rows in plane.split(4, dim=1)]
                    stacked = torch.stack([torch.stack(row, dim=1) for row in windows], dim=1)  # (B, r, c, 4, 4, h, d)
                    parts.append(stacked.flatten(0, 2).flatten(1, 2).transpose(1, 2))
            return parts

        assert_same_gradients(joined(lambda x: operators.window_partition(x, 4, HEADS, margins)), joined(plain), (qkv,))


class TestForms:
    def test_the_real_rotation_that_compilers_get_is_the_complex_one(self, monkeypatch):
        x, angle = random(GROUPS, TOKENS, 2, HEADS, DIM).detach(), random(TOKENS, DIM // 2, seed=5).detach()
        eager = operators.rotate(x, angle.cos(), angle.sin())
        compiled = torch.compile(operators.rotate, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, angle.cos(), angle.sin()), eager, rtol=1e-6, atol=1e-6)

    def test_products_and_softmax_are_float32_under_autocast(self):
        """The map of channels does not take bfloat16's rounding: it equals the float32 one of the rounded inputs."""
        q, k, v, affine, temperature = (t.detach() for t in channel_attention_inputs())
        q, k = q.bfloat16(), k.bfloat16()
        exact = operators.channel_attention(q.float(), k.float(), v, affine, temperature)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = operators.channel_attention(q, k, v, affine, temperature)
        assert torch.equal(inside, exact)

    def test_half_precision_gradients_keep_their_dtype(self):
        inputs = tuple(t.detach().bfloat16().requires_grad_() for t in channel_attention_inputs()[:3])
        out = operators.channel_attention(*inputs, random(HEADS, TOKENS, low=0.5), random(HEADS, low=1.0))
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads)
