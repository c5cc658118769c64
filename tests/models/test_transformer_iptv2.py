"""The denoiser as a diffusers model: its call, conditioning, fusion, saving, precision, compilation and adapters."""

from __future__ import annotations

import copy

import pytest
import references
import torch

from iptv2_diffusion.models.backbone import IPTV2Backbone
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

TINY = {
    "sample_size": 16,
    "num_class_embeds": 5,
    "channels": 8,
    "layers_per_stage": (1, 1, 1),
    "num_attention_heads": 2,
    "window_size": 4,
    "grid_stride": (2, 1),
    "conditioning_dim": 16,
}
VARIANTS = {
    "default": {},
    "unconditional": {"num_class_embeds": None},
    "vector per level": {"conditioning_dim": None, "layers_per_stage": (1, 1, 1, 1, 1), "grid_stride": 2},
    "grid only": {"attention_pattern": ("grid", "grid"), "grid_stride": None, "grid_size": 3},
    "patches, learned variance": {"patch_size": 2, "out_channels": 8, "sample_size": (16, 12)},
}


def denoiser(randomize=True, **kwargs) -> IPTV2Transformer2DModel:
    torch.manual_seed(0)
    model = IPTV2Transformer2DModel(**{**TINY, **kwargs}).eval()
    return references.randomize_(model, 0.1) if randomize else model


def inputs(batch=2, size=(16, 16)) -> dict:
    return {
        "hidden_states": references.random_map(batch, 4, *size),
        "timestep": torch.tensor([3, 701, 250, 999])[:batch],
        "class_labels": torch.tensor([1, 4, 5, 0])[:batch],
    }


def sample(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).sample


variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


class TestAgainstReference:
    @pytest.mark.parametrize("num_classes", [5, None])
    def test_whole_denoiser(self, num_classes):
        model, given = denoiser(num_class_embeds=num_classes), inputs(size=(8, 10))
        labels = [1, 4] if num_classes is not None else None
        expected = references.denoiser(model, given["hidden_states"], [3, 701], labels)
        torch.testing.assert_close(sample(model, **given).double(), expected.detach(), rtol=1e-3, atol=2e-4)


class TestCall:
    @variants
    @pytest.mark.parametrize("size", [(16, 16), (7, 13), (1, 1), (2, 19)], ids=str)
    def test_any_size(self, variant, size):
        model = denoiser(**variant)
        out = sample(model, **inputs(size=size))
        assert out.shape == (2, variant.get("out_channels", 4), *size)
        assert out.isfinite().all()

    def test_output_as_an_object_or_a_tuple(self):
        model = denoiser()
        (out,) = model(**inputs(), return_dict=False)
        assert torch.equal(out, model(**inputs()).sample)

    @pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7.0, 7.0])], ids=repr)
    def test_timestep_as_a_number_a_scalar_or_a_batch(self, timestep):
        model = denoiser()
        expected = sample(model, **{**inputs(), "timestep": torch.tensor([7, 7])})
        torch.testing.assert_close(sample(model, **{**inputs(), "timestep": timestep}), expected)

    def test_fractional_timesteps_are_not_rounded(self):
        """Flow matching gives s·1000 with s in [0, 1]."""
        model = denoiser()
        outs = [sample(model, **{**inputs(), "timestep": torch.tensor([t, t])}) for t in (2.0, 2.5, 3.0)]
        assert (outs[0] - outs[1]).abs().max() > 1e-4
        assert (outs[1] - outs[2]).abs().max() > 1e-4

    def test_inputs_are_not_changed(self):
        model, given = denoiser(), inputs()
        before = copy.deepcopy(given)
        sample(model, **given)
        assert all(torch.equal(given[name], before[name]) for name in given)


class TestConditioning:
    def test_a_fresh_model_predicts_zero(self):
        assert not sample(denoiser(randomize=False), **inputs()).any()

    def test_a_fresh_models_blocks_are_the_identity(self):
        """A new U is therefore only its stem, resampling and skips, for every timestep and class."""
        model = denoiser(randomize=False)
        x = references.random_map(2, 8, 16, 16)
        vectors = references.random_map(2, 16), references.random_map(2, 16, seed=1)
        with torch.no_grad():
            assert torch.equal(model.backbone(x, vectors[0]), model.backbone(x, vectors[1]))

    def test_timestep_and_class_matter_per_sample(self):
        """Different timesteps and classes in one batch: each sample follows its own."""
        model, given = denoiser(), inputs()
        reference = sample(model, **given)
        for name, value in (("timestep", torch.tensor([3, 20])), ("class_labels", torch.tensor([1, 0]))):
            changed = sample(model, **{**given, name: value})
            torch.testing.assert_close(changed[0], reference[0], rtol=1e-4, atol=1e-5)
            assert (changed[1] - reference[1]).abs().max() > 1e-3

    def test_no_label_is_the_null_label(self):
        model, given = denoiser(), inputs()
        null = torch.full((2,), model.config.num_class_embeds)
        outs = [sample(model, **{**given, "class_labels": labels}) for labels in (None, null)]
        assert torch.equal(*outs)

    def test_labels_are_never_dropped_in_the_model(self):
        """model.md §6: labels are dropped once per sample, by the training loop."""
        model = denoiser().train()
        assert torch.equal(model(**inputs()).sample, model(**inputs()).sample)

    def test_samples_of_a_batch_are_independent(self):
        model, given = denoiser(), inputs(batch=4, size=(9, 10))
        alone = torch.cat([sample(model, **{name: v[i : i + 1] for name, v in given.items()}) for i in range(4)])
        torch.testing.assert_close(sample(model, **given), alone, rtol=1e-4, atol=1e-4)


class TestTraining:
    @variants
    def test_every_parameter_gets_a_gradient(self, variant):
        """DistributedDataParallel stops at parameters that take no part in the loss."""
        model = denoiser(**variant).train()
        model(**inputs(size=(16, 12))).sample.square().mean().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []

    @variants
    def test_gradient_checkpointing_gives_the_same_gradients(self, variant):
        model = denoiser(**variant).train()
        results = []
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.enable_gradient_checkpointing()
                assert model.is_gradient_checkpointing
            out = model(**inputs()).sample
            out.square().mean().backward()
            results.append((out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert torch.equal(results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)

    def test_a_few_steps_lower_the_loss_from_a_fresh_model(self):
        model = denoiser(randomize=False).train()
        target = references.random_map(2, 4, 16, 16, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(25):
            loss = (model(**inputs()).sample - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_parameters_fit_channels_last(self):
        model = denoiser()
        assert max(p.dim() for p in model.parameters()) <= 4
        before = sample(model, **inputs())
        after = sample(model.to(memory_format=torch.channels_last), **inputs())
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


class TestFusion:
    def test_plain_feed_forwards_have_nothing_to_fuse(self):
        model = denoiser(feed_forward="plain")
        assert torch.equal(sample(model.fuse(), **inputs()), sample(model, **inputs()))

    @variants
    def test_fused_equals_unfused(self, variant):
        model = denoiser(**variant)
        fused = model.fuse()
        torch.testing.assert_close(sample(fused, **inputs()), sample(model, **inputs()), rtol=1e-5, atol=1e-5)
        assert fused.config.fused
        assert fused.num_parameters() < model.num_parameters()

    def test_source_stays_as_it_was(self):
        model = denoiser().train()
        before = copy.deepcopy(model.state_dict())
        fused = model.fuse()
        for parameter in fused.parameters():
            parameter.fill_(3.0)
        assert model.training
        assert not model.config.fused
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_fusing_twice_changes_nothing(self):
        once = denoiser().fuse()
        twice = once.fuse()
        assert twice is not once
        assert once.state_dict().keys() == twice.state_dict().keys()
        assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in once.state_dict().items())

    def test_fusing_does_not_depend_on_train_or_eval(self):
        model = denoiser()
        states = [model.train().fuse().state_dict(), model.eval().fuse().state_dict()]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_a_fused_model_saves_and_loads(self, tmp_path):
        fused = denoiser().fuse()
        fused.save_pretrained(tmp_path)
        loaded = IPTV2Transformer2DModel.from_pretrained(tmp_path)
        assert loaded.config.fused
        assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        torch.testing.assert_close(sample(loaded, **inputs()), sample(fused, **inputs()), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="fuse"):
            loaded.train()

    def test_a_fused_model_refuses_to_train(self, tmp_path):
        fused = denoiser().fuse()
        fused.save_pretrained(tmp_path)
        loaded, built = IPTV2Transformer2DModel.from_pretrained(tmp_path), IPTV2Transformer2DModel(**TINY, fused=True)
        for model in (fused, loaded, built):
            assert not model.training
            assert not any(p.requires_grad for p in model.parameters())
            with pytest.raises(RuntimeError, match="fused"):
                model.train()
            assert not model.eval().training
            assert not model.train(False).training

    def test_fusing_keeps_dtype(self):
        fused = denoiser().to(torch.bfloat16).fuse()
        assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}

    def test_fusing_in_half_precision_is_as_exact_as_the_type(self):
        """The merge itself must not cancel: biases much larger than the weights are where (W + b) - b loses bits."""
        model = denoiser().to(torch.bfloat16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("expand_in.bias", "expand_out.bias")):
                    parameter.fill_(4.0)
        layer = next(m for m in model.modules() if hasattr(m, "expand_in"))
        expected = layer.expand_out.weight.double() @ layer.expand_in.weight.double()
        fused = next(m for m in model.fuse().modules() if hasattr(m, "expand"))
        torch.testing.assert_close(fused.expand.weight.double(), expected, rtol=2**-7, atol=1e-3)


class TestSaveLoad:
    @variants
    def test_round_trip_is_bit_identical(self, variant, tmp_path):
        model = denoiser(**variant)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
        loaded = IPTV2Transformer2DModel.from_pretrained(tmp_path)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(sample(loaded, **inputs()), sample(model, **inputs()))
        assert all(p.requires_grad for p in loaded.train().parameters())

    def test_weights_are_aligned_as_torch_aligns_its_own(self, tmp_path):
        """Unaligned, some CPU kernels sum in another order. With loading info, `from_pretrained` returns a pair."""
        denoiser().save_pretrained(tmp_path)
        loaded, info = IPTV2Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert {p.data_ptr() % 64 for p in loaded.parameters()} == {0}

    def test_configuration_survives(self, tmp_path):
        model = denoiser(sample_size=(16, 12), conditioning_dim=None, grid_stride=2)
        model.save_pretrained(tmp_path)
        saved, loaded = model.config, IPTV2Transformer2DModel.from_pretrained(tmp_path).config
        for name in saved:
            if not name.startswith("_"):
                value = saved[name]
                assert loaded[name] == (list(value) if isinstance(value, tuple) else value), name

    def test_half_precision_round_trip(self, tmp_path):
        model = denoiser()
        model.save_pretrained(tmp_path)
        loaded = IPTV2Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        given = inputs()
        out = sample(loaded, **{**given, "hidden_states": given["hidden_states"].bfloat16()})
        assert out.dtype == torch.bfloat16
        reference = sample(model, **given)
        assert (out.float() - reference).abs().mean() < 0.05 * reference.abs().mean()

    def test_config_alone_rebuilds_the_model(self):
        model = denoiser(sample_size=(16, 12))
        built = IPTV2Transformer2DModel.from_config(model.config)
        built.load_state_dict(model.state_dict())
        assert torch.equal(sample(built.eval(), **inputs()), sample(model, **inputs()))


class TestBackboneExchange:
    """One backbone class under one prefix: a restorer can load a denoiser's and back."""

    def test_backbone_has_its_own_prefix(self):
        model = denoiser()
        state = model.state_dict()
        backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
        assert isinstance(model.backbone, IPTV2Backbone)
        assert backbone.keys() == model.backbone.state_dict().keys()
        rest = {name.split(".")[0] for name in state if not name.startswith("backbone.")}
        assert rest == {"stem", "embedders", "head", "norm_out", "proj_out"}

    def test_a_backbone_moves_between_models_with_other_heads(self):
        """Other channels, classes and output; the same U."""
        source, target = denoiser(), denoiser(in_channels=3, out_channels=6, num_class_embeds=None, randomize=False)
        target.backbone.load_state_dict(source.backbone.state_dict())
        x, vector = references.random_map(1, 8, 16, 16), references.random_map(1, 16)
        with torch.no_grad():
            assert torch.equal(source.backbone(x, vector), target.backbone(x, vector))


class TestPrecision:
    @variants
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite_and_near_float32(self, variant, dtype):
        model, given = denoiser(**variant), inputs(size=(13, 16))
        reference = sample(model, **given)
        out = sample(model.to(dtype), **{**given, "hidden_states": given["hidden_states"].to(dtype)})
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert (out.float() - reference).abs().mean() < 0.05 * reference.abs().mean()

    def test_autocast_trains_with_finite_gradients(self):
        model = denoiser().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs()).sample.float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_large_inputs_stay_finite_in_bfloat16(self):
        model, given = denoiser().to(torch.bfloat16), inputs()
        assert sample(model, **{**given, "hidden_states": 1000 * given["hidden_states"].bfloat16()}).isfinite().all()

    @pytest.mark.parametrize("fused", [False, True])
    def test_layerwise_casting(self, fused):
        """fp8 storage: every layer's weight is cast around the layer's own call."""
        model, given = denoiser(), inputs()
        model = model.fuse() if fused else model
        reference = sample(model, **given)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        out = sample(model, **given)
        assert (out - reference).abs().mean() < 0.2 * reference.abs().mean()
