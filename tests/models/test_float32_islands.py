"""Parts that must stay in float32 under bf16 and fp16 autocast, tested on inputs where half precision fails.

Each part is compared with a float64 reference on the same half-precision inputs, within the rounding of its output.
Each test also shows that the same formula fails or overflows in half precision; otherwise it would prove nothing.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iptv2_diffusion import DiffusionObjective, create_model
from iptv2_diffusion.kernels.cpu_attention import attend_tokens, channel_attention, rotate_normalised
from iptv2_diffusion.kernels.geometry import rotary_embedding
from iptv2_diffusion.models.layers import LayerNorm2d

HALF = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])


def normal(*shape, std=1.0, seed=0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(value, reference):
    """Largest difference, relative to the reference's largest value; infinite if anything is not finite."""
    difference = (value.double() - reference.double()).abs().max() / reference.abs().max()
    return difference.item() if torch.isfinite(value).all() else math.inf


def assert_island(value, reference, naive, dtype):
    """Check that `value` is right up to its own rounding and that `naive`, the formula in half precision, is not."""
    rounding = torch.finfo(dtype).eps
    assert error(value, reference) <= 2 * rounding
    assert error(naive, reference) > 4 * rounding


def under_autocast(function, *inputs, dtype, gradient):
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(gradient):
        return function(*inputs)


@pytest.mark.parametrize("gradient", [False, True])
def test_norms(dtype, gradient):
    """Channels of 300 and more: squares leave float16, and sums of 512 of them lose bfloat16's eight bits."""
    x = (normal(2, 512, 4, 4) + 300 * normal(2, 1, 4, 4, seed=1)).to(dtype).requires_grad_(gradient)
    made = under_autocast(LayerNorm2d(512), x, dtype=dtype, gradient=gradient)
    reference = F.layer_norm(x.detach().double().permute(0, 2, 3, 1), (512,), eps=1e-6).permute(0, 3, 1, 2)
    x = x.detach()
    variance = x.square().mean(1, keepdim=True) - x.mean(1, keepdim=True).square()
    assert_island(made.detach(), reference, (x - x.mean(1, keepdim=True)) * (variance + 1e-6).rsqrt(), dtype)


@pytest.mark.parametrize("gradient", [False, True])
def test_normalisation_of_q_and_k_and_softmax_of_channel_attention(dtype, gradient):
    """FCSA: norms whose squares leave float16, and logits about 55 that bfloat16 cannot tell apart."""
    common = normal(3, 2, 64, 1, std=400)
    q, k = (common + normal(3, 2, 64, 8, std=120, seed=i) for i in (1, 2))
    q, k, v = (x.to(dtype).requires_grad_(gradient) for x in (q, k, normal(3, 2, 64, 8, seed=3)))
    affine, temperature = 1 + 0.1 * normal(2, 64, seed=4), torch.tensor([30.0, 60.0])
    made = under_autocast(channel_attention, q, k, v, affine, temperature, dtype=dtype, gradient=gradient).detach()

    def formula(kind):
        a, t = affine.to(kind)[..., None], temperature.to(kind)[:, None, None]
        qs, ks = q.detach().to(kind) * a, k.detach().to(kind) * a
        qs = qs * qs.square().sum(-2, keepdim=True).rsqrt()
        ks = ks * ks.square().sum(-2, keepdim=True).rsqrt()
        return (t * (qs.transpose(-2, -1) @ ks)).softmax(-1)

    values = v.detach()
    assert made.dtype == dtype
    reference = values.double() @ formula(torch.float64).transpose(-2, -1)
    # A is rounded to the values' dtype before it weighs them, hence twice the rounding
    assert_island(made, reference, values @ formula(dtype).transpose(-2, -1), dtype)


@pytest.mark.parametrize("gradient", [False, True])
def test_normalisation_of_q_and_k_of_grid_attention(dtype, gradient):
    """GGSA: tokens of norm 3000 (whose square leaves float16) rotated by their position."""
    x = normal(2, 64, 3, 2, 32, std=500).to(dtype).requires_grad_(gradient)
    scale = torch.tensor([10.0, 90.0])
    cos, sin = rotary_embedding(8, 8, 32, torch.device("cpu"))
    *made, v = under_autocast(rotate_normalised, x, scale, cos, sin, dtype=dtype, gradient=gradient)
    made = torch.stack(made, dim=2).detach()
    assert torch.equal(v, x[:, :, 2])

    def formula(kind):
        s = torch.stack((scale, torch.ones(2)))[..., None].to(kind)
        y, c, n = x.detach()[:, :, :2].to(kind), cos.to(kind)[:, None, None], sin.to(kind)[:, None, None]
        y = y * y.square().sum(-1, keepdim=True).rsqrt() * s
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * c - odd * n, even * n + odd * c), dim=-1).flatten(-2)

    assert made.dtype == dtype
    # q is ten to ninety times as large as k: each by itself
    for part in (0, 1):
        reference, naive = (formula(kind)[:, :, part] for kind in (torch.float64, dtype))
        assert error(made[:, :, part], reference) <= 2 * torch.finfo(dtype).eps
        assert error(naive, reference) > error(made[:, :, part], reference)
    assert made.isfinite().all()
    if dtype == torch.float16:
        assert not formula(dtype).abs().max() > 1  # the squares overflow: the tokens become nothing


def test_softmax_of_grid_attention(dtype):
    """With a gradient, the CPU uses explicit products: logits and softmax of 4096 keys are float32."""
    q, k, v = (normal(1, 1, n, 4, seed=i).to(dtype) for i, n in enumerate((4, 4096, 4096)))
    q *= 4  # logits to 30, of which bfloat16 keeps an eighth
    recorder = Recorder()
    with torch.autocast("cpu", dtype), recorder:
        made = attend_tokens(q.requires_grad_(), k, v, None).detach()
    assert recorder.dtypes("_softmax") == {torch.float32}
    reference = (q.detach().double() @ k.double().transpose(-2, -1)).softmax(-1) @ v.double()
    naive = (q.detach() @ k.transpose(-2, -1)).double().softmax(-1) @ v.double()
    assert error(made, reference) <= 2 * torch.finfo(dtype).eps
    assert error(naive, reference) > error(made, reference)


def test_timestep_embedding(dtype):
    """The sinusoid's angles reach 1000, where half precision cannot tell one timestep from the next."""
    model = create_model("tiny", sample_size=8, num_class_embeds=3)
    timestep, seen = torch.tensor([997.3, 998.0, 999.0]), []
    model.embedders[0].timestep_proj.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.autocast("cpu", dtype), torch.no_grad():
        model(normal(3, 4, 8, 8), timestep=timestep, class_labels=torch.arange(3))

    def formula(kind):
        frequency = (-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128).exp()
        angle = timestep.to(kind)[:, None] * frequency.to(kind)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    assert seen[0].dtype == torch.float32
    assert error(seen[0], formula(torch.float64)) < 2e-4  # float32's own: 1000 times its rounding
    assert error(formula(dtype), formula(torch.float64)) > 0.1


class Recorder(TorchDispatchMode):
    """Records the dtypes of the floating-point tensors that each operation receives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.dtype for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.is_floating_point()}
        self.calls.append((func.overloadpacket.__name__, given))
        return func(*args, **(kwargs or {}))

    def dtypes(self, *names):
        return set().union(*(given for name, given in self.calls if not names or name in names))


@pytest.mark.parametrize("learned_variance", [False, True])
def test_loss(dtype, learned_variance):
    """The only operation that receives half precision is the cast of the model's output."""
    scheduler = DiffusionObjective.make_scheduler("epsilon", learned_variance=learned_variance)
    objective = DiffusionObjective(scheduler, learned_variance=learned_variance, min_snr_gamma=5)
    channels = 8 if learned_variance else 4
    output = normal(2, channels, 8, 8, std=400, seed=3).to(dtype)  # its squares leave float16
    latents, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    recorder = Recorder()
    with torch.autocast("cpu", dtype), recorder:
        loss = objective.loss(lambda *a, **k: (output,), latents, noise, torch.tensor([0, 700]))
    assert loss.dtype == torch.float32
    assert loss.isfinite().all() or learned_variance  # a variance of e^400 is beyond float32 as well
    assert {name for name, given in recorder.calls if given & set(HALF)} <= {"_to_copy"}


def test_softmax_and_norms_of_the_whole_model_never_receive_half_precision(dtype):
    """With gradients, as in training: every softmax, and the square roots of all norms, in float32."""
    model = create_model("tiny", sample_size=8, num_class_embeds=3)
    recorder = Recorder()
    with torch.autocast("cpu", dtype), recorder:
        model(normal(2, 4, 8, 8), timestep=torch.tensor([1, 999]), class_labels=torch.arange(2))
    assert recorder.dtypes("_softmax", "rsqrt", "linalg_vector_norm", "sin", "cos", "view_as_complex") == {
        torch.float32
    }
    assert dtype in recorder.dtypes("addmm", "mm", "linear", "bmm")  # autocast was on
