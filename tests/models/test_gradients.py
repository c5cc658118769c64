"""Every preset's parameter gradients by the fast forms, against the plain formulas under autograd, in float64.

A preset's geometry decides which code runs: sizes of maps and windows, heads, patterns, strides. Each preset therefore
keeps its geometry. It is only narrower (4 channels per head at its narrowest stage) and shallower (one block per
stage).
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import references
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from iptv2_diffusion.kernels import fast_forms_in_use, use_fast_forms
from iptv2_diffusion.models.presets import PRESETS
from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

DENOISERS = [name for name, preset in PRESETS.items() if preset.model_class is IPTV2Transformer2DModel]
RESTORERS = [name for name, preset in PRESETS.items() if preset.model_class is IPTV2RestorationModel]


def small(name: str, **overrides):
    """A preset of the same geometry in float64, every parameter moved off its initial value."""
    preset = PRESETS[name]
    config = {**preset.config, "num_class_embeds": 5, **overrides}
    if preset.model_class is IPTV2RestorationModel:
        del config["num_class_embeds"]
    stages = len(config.get("layers_per_stage", (1,) * 5))
    heads = config.get("num_attention_heads", 4)
    heads = (heads,) * stages if isinstance(heads, int) else heads
    widths = [2 ** min(stage, stages - 1 - stage) for stage in range(stages)]  # widths of the stages, in units of C
    config["channels"] = math.lcm(2, *(4 * h // math.gcd(4 * h, width) for h, width in zip(heads, widths, strict=True)))
    config["layers_per_stage"] = (1,) * stages
    config["conditioning_dim"] = 8 if config.get("conditioning_dim", 8) else None
    torch.manual_seed(0)
    return references.randomize_(preset.model_class(**config).double(), 0.1)


def inputs(model, size: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, ...]:
    x = references.random_map(batch, model.config.in_channels, *size).double()
    if isinstance(model, IPTV2RestorationModel):
        sigma = None if model.config.sigma_conditioning is None else torch.tensor([15.0, 50.0], dtype=torch.float64)
        return x, sigma
    return x, torch.tensor([3.0, 900.0], dtype=torch.float64), torch.tensor([0, 4])


def gradients(model, given, call=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = (call or model)(*given).sample
    (out * references.random_map(*out.shape, seed=7).double()).sum().backward()
    # A map of one window leaves the shifted windows without a gradient.
    zero = torch.zeros_like
    return {n: zero(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(model, given, call=None) -> None:
    fast = gradients(model, given, call)
    with use_fast_forms(False):
        plain = gradients(model, given, call)
    largest = max(grad.abs().max() for grad in plain.values())
    for name, grad in plain.items():
        error = (fast[name] - grad).abs().max() / max(grad.abs().max(), 1e-6 * largest)
        assert error < 1e-9, f"{name} is off by {error:.1e} of its largest value"


def sizes(name: str) -> list[tuple[int, int]]:
    """A preset's own size (cut to 48 for images), and one that is odd in both directions."""
    size = min(PRESETS[name].config.get("sample_size") or 32, 48)
    return [(size, size), (size // 2 + 3, size - 5)]


@pytest.mark.parametrize("odd", [False, True], ids=["own size", "odd size"])
@pytest.mark.parametrize("name", DENOISERS + RESTORERS)
def test_every_preset(name, odd):
    model = small(name)
    assert_same_gradients(model, inputs(model, sizes(name)[odd]))


@pytest.mark.parametrize("pattern", [("grid", "grid"), ("focal", "focal"), ("grid", "focal"), ("focal",)], ids=str)
@pytest.mark.parametrize("name", ["emoji64-s", "restoration-xs"])
def test_every_attention_pattern(name, pattern):
    model = small(name, attention_pattern=pattern)
    assert_same_gradients(model, inputs(model, (16, 24)))


VARIANTS = {
    "grid of a fixed size": {"grid_stride": None, "grid_size": 3},
    "plain feed-forward": {"feed_forward": "plain"},
    "a vector a level": {"conditioning_dim": None},
    "odd window": {"window_size": 3},
    "no patches": {"patch_size": 1},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_a_denoiser(overrides):
    model = small("emoji64-s", **overrides)
    assert_same_gradients(model, inputs(model, (14, 17)))


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("conditioning", [None, "map", "vector"])
def test_norms_and_conditioning_of_a_restorer(conditioning, norm_bias):
    model = small("restoration-tiny", sigma_conditioning=conditioning, norm_bias=norm_bias)
    assert_same_gradients(model, inputs(model, (19, 22)))


@pytest.mark.parametrize("name", ["emoji64-s", "restoration-tiny"])
def test_with_gradient_checkpointing(name):
    model = small(name).train()
    given = inputs(model, (16, 16))
    expected = gradients(model, given)
    model.enable_gradient_checkpointing()
    assert_same_gradients(model, given)
    for grad, other in zip(gradients(model, given).values(), expected.values(), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def test_wrapped_by_ddp(tmp_path):
    model = small("emoji64-s").train()
    given = inputs(model, (16, 16))
    expected = gradients(model, given)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        assert_same_gradients(model, given, call=wrapped)
        actual = gradients(model, given, call=wrapped)
        del wrapped
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


class TestTheSwitch:
    def test_it_decides_which_form_runs(self):
        model = small("tiny")
        given = inputs(model, (8, 8))

        def functions() -> set[str]:
            seen, queue = set(), [model(*given).sample.grad_fn]
            while queue:
                node = queue.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    queue.extend(parent for parent, _ in node.next_functions)
            return {type(node).__name__ for node in seen}

        ours = {"ChannelAttentionBackward", "RotateNormalisedBackward", "Depthwise5x5Backward", "ScaleAddBackward"}
        assert ours <= functions()
        with use_fast_forms(False):
            assert not fast_forms_in_use()
            assert not ours & functions()
        with use_fast_forms(False, "grid_attention"):
            assert ours - functions() == {"RotateNormalisedBackward"}
            with use_fast_forms(True):
                assert ours <= functions()
        assert ours <= functions()

    def test_an_unknown_operator_is_named(self):
        with pytest.raises(ValueError, match=r"no operator is called focal; use one of .*focal_attention"):
            use_fast_forms(False, "focal").__enter__()

    def test_the_environment_variable_turns_all_forms_off(self):
        import os
        import subprocess
        import sys

        code = "from iptv2_diffusion.kernels import fast_forms_in_use; print(fast_forms_in_use())"
        run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run(env={**os.environ, "IPTV2_KERNELS": "off"}).stdout.strip() == "False"
        assert run(env={**os.environ, "IPTV2_KERNELS": "auto"}).stdout.strip() == "True"
