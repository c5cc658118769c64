"""Rep-LeFFN against its loop-written reference, and its exact, explicit fusion."""

from __future__ import annotations

import copy

import pytest
import references
import torch
import torch.nn.functional as F

from iptv2_diffusion.models.feed_forward import RepLeFFN


def rep_leffn(channels=6, scale=0.3, **kwargs) -> RepLeFFN:
    torch.manual_seed(0)
    return references.randomize_(RepLeFFN(channels, **kwargs), scale)


class TestAgainstReference:
    @pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 11), (2, 2), (1, 1), (1, 6)], ids=str)
    def test_any_size(self, size):
        """Biases of the first pair meet the zero padding *after* the GELU, so the border is where fusions go wrong."""
        module, x = rep_leffn(), references.random_map(2, 6, *size)
        with torch.no_grad():
            expected = references.rep_leffn(module, x)
            torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(module.fuse()(x).double(), expected, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize(("ratio", "bias"), [(1.0, True), (4.0, True), (2.0, False)])
    def test_any_ratio_with_and_without_bias(self, ratio, bias):
        module, x = rep_leffn(ratio=ratio, bias=bias), references.random_map(1, 6, 6, 5)
        with torch.no_grad():
            torch.testing.assert_close(module(x).double(), references.rep_leffn(module, x), rtol=1e-4, atol=2e-5)
        if not bias:
            assert all(not name.endswith("bias") for name, _ in module.named_parameters())

    def test_widths_are_those_of_the_specification(self):
        module = RepLeFFN(6, ratio=2.0)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert shapes["expand_in.weight"][:2] == (6, 6)  # C → rC/2
        assert shapes["expand_out.weight"][:2] == (12, 6)  # rC/2 → rC
        assert shapes["project_in.weight"][:2] == (6, 12)  # rC → rC/2
        assert shapes["project_out.weight"][:2] == (6, 6)  # rC/2 → C
        for size in (5, 3, 1):
            assert shapes[f"depthwise_{size}x{size}.weight"] == (12, 1, size, size)


class TestFusion:
    @pytest.mark.parametrize("bias", [True, False])
    def test_fused_equals_unfused(self, bias):
        module, x = rep_leffn(16, bias=bias, scale=0.1), references.random_map(2, 16, 13, 10)
        with torch.no_grad():
            torch.testing.assert_close(module.fuse()(x), module(x), rtol=1e-5, atol=1e-5)

    def test_fusing_does_not_depend_on_train_or_eval(self):
        module = rep_leffn()
        states = [module.train().fuse().state_dict(), module.eval().fuse().state_dict()]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_source_is_not_mutated_and_shares_no_memory(self):
        module = rep_leffn()
        before = copy.deepcopy(module.state_dict())
        fused = module.fuse()
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.fill_(7.0)
        after = module.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(parameter.requires_grad for parameter in module.parameters())

    def test_fusing_twice_changes_nothing(self):
        once = rep_leffn().fuse()
        twice = once.fuse()
        assert once.state_dict().keys() == twice.state_dict().keys()
        assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in once.state_dict().items())

    def test_fused_state_loads_into_a_module_built_fused(self):
        fused, x = rep_leffn().fuse(), references.random_map(1, 6, 7, 7)
        built = RepLeFFN(6, fused=True)
        built.load_state_dict(fused.state_dict())
        with torch.no_grad():
            assert torch.equal(built(x), fused(x))
        names = {name.split(".")[0] for name, _ in built.named_parameters()}
        assert names == {"expand", "depthwise", "project"}
        assert sum(p.numel() for p in built.parameters()) < sum(p.numel() for p in rep_leffn().parameters())

    def test_fusing_keeps_dtype(self):
        fused = rep_leffn().to(torch.bfloat16).fuse()
        assert all(parameter.dtype == torch.bfloat16 for parameter in fused.parameters())


class TestTraining:
    def test_every_branch_gets_its_own_gradient(self):
        """The training forward may merge the kernels on the fly; the gradients must be those of the branches."""
        module, x = rep_leffn(), references.random_map(1, 6, 6, 7)
        target = references.random_map(1, 6, 6, 7, seed=1)
        (module(x) * target).sum().backward()

        plain = copy.deepcopy(module)
        plain.zero_grad()
        hidden = F.gelu(plain.expand_out(plain.expand_in(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        convolutions = (plain.depthwise_5x5, plain.depthwise_3x3, plain.depthwise_1x1)
        hidden = hidden + sum(
            F.conv2d(hidden, c.weight, c.bias, padding=c.weight.shape[-1] // 2, groups=12) for c in convolutions
        )
        out = plain.project_out(plain.project_in(hidden.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        (out * target).sum().backward()
        expected = dict(plain.named_parameters())
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite(self, dtype):
        module, x = rep_leffn(16, scale=0.1), references.random_map(1, 16, 9, 8)
        for layer in (module.to(dtype), module.fuse()):
            with torch.no_grad():
                out = layer(x.to(dtype))
            assert out.dtype == dtype
            assert out.isfinite().all()

    def test_samples_of_a_batch_are_independent(self):
        module, x = rep_leffn(), references.random_map(3, 6, 5, 4)
        with torch.no_grad():
            torch.testing.assert_close(
                module(x), torch.cat([module(sample[None]) for sample in x]), rtol=1e-4, atol=1e-5
            )
