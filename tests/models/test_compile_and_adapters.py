"""torch.compile of the denoiser, whole and by repeated blocks, and hooks of other libraries."""

from __future__ import annotations

import pytest
import references
import torch
from accelerate import cpu_offload
from diffusers.training_utils import EMAModel
from test_transformer_iptv2 import VARIANTS, denoiser, inputs, sample
from torch._dynamo.testing import CompileCounterWithBackend

from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("variant", ["default", "grid only"])
    def test_forward_is_one_graph(self, variant):
        model = denoiser(**VARIANTS[variant])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        given = inputs(size=(13, 16))
        torch.testing.assert_close(sample(compiled, **given), sample(model, **given), rtol=1e-4, atol=1e-5)

    def test_training_step_is_one_graph(self):
        model = denoiser(layers_per_stage=(1,), grid_stride=2).train()
        model(**inputs()).sample.square().mean().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(**inputs()).sample.square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)

    def test_repeated_blocks(self):
        """Regional compilation: one graph per stage, not one per block.

        `dynamic=False`, because widths differ between stages: PyTorch would take the channels for a dynamic dimension
        and compile ten times longer.
        """
        model, given = denoiser(layers_per_stage=(2, 2, 2)), inputs()
        expected = sample(model, **given)
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=counter)
        torch.testing.assert_close(sample(model, **given), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 3

    def test_repeated_blocks_train_with_checkpointing_and_evaluate_in_between(self):
        """With `--torch_compile --gradient_checkpointing`, the gradients are those of the eager model."""
        model = denoiser(layers_per_stage=(1,), grid_stride=2).train()
        model(**inputs()).sample.square().mean().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        names = list(model.state_dict())
        model.enable_gradient_checkpointing()
        model.compile_repeated_blocks(dynamic=False, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            model.train()(**inputs()).sample.square().mean().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
            sample(model.eval(), **inputs())
        assert list(model.state_dict()) == names  # checkpoints of eager and compiled runs are interchangeable

    def test_fused(self):
        model, given = denoiser(layers_per_stage=(1,), grid_stride=2).fuse(), inputs()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(sample(compiled, **given), sample(model, **given), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_inductor_trains_under_autocast(self):
        """One level, because the number of kernels determines the minutes of C++ compilation."""
        model, given = denoiser(layers_per_stage=(1,), grid_stride=2), inputs()
        expected = sample(model, **given)
        compiled = torch.compile(model.train(), fullgraph=True)
        torch.testing.assert_close(compiled(**given).sample, expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(**given).sample.float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestAdapters:
    def lora(self, **kwargs):
        peft = pytest.importorskip("peft")
        targets = ["qkv", "out_proj", "expand_in", "expand_out", "project_in", "project_out"]
        return peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=True, **kwargs)

    def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(self):
        model, given = denoiser(), inputs()
        before = sample(model, **given)
        model.add_adapter(self.lora(), adapter_name="style")
        torch.testing.assert_close(sample(model, **given), before, rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        changed = sample(model, **given)
        assert (changed - before).abs().max() > 1e-3
        model.disable_adapters()
        torch.testing.assert_close(sample(model, **given), before, rtol=1e-4, atol=1e-5)
        model.enable_adapters()
        torch.testing.assert_close(sample(model, **given), changed, rtol=1e-4, atol=1e-5)

    def test_every_adapted_layer_learns(self):
        """A layer whose weight is read instead of called would leave its adapter without a gradient."""
        model = denoiser()
        model.add_adapter(self.lora())
        references.randomize_(model, 0.05)
        model.train()
        model(**inputs()).sample.square().mean().backward()
        adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        assert len(adapters) > 0
        assert [n for n, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_adapter_saves_and_loads(self, tmp_path):
        model, given = denoiser(), inputs()
        model.add_adapter(self.lora(), adapter_name="style")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        model.save_lora_adapter(tmp_path, adapter_name="style")
        other = denoiser()
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(sample(other, **given), sample(model, **given), rtol=1e-4, atol=1e-5)

    def test_adapters_are_merged_before_the_model_is_fused(self):
        """fuse() merges the layers' own weights: it must not silently lose an adapter."""
        model, given = denoiser(), inputs()
        model.add_adapter(self.lora())
        references.randomize_(model, 0.05)
        expected = sample(model, **given)
        with pytest.raises(RuntimeError, match=r"qkv carries an adapter.*fuse_lora\(\) and unload_lora\(\)"):
            model.fuse()
        model.fuse_lora()
        model.unload_lora()
        torch.testing.assert_close(sample(model.fuse(), **given), expected, rtol=1e-4, atol=1e-4)

    def test_attention_processor_interface(self):
        """FCSA and GGSA have no exchangeable processors; the mixin's interface says so instead of failing."""
        model = denoiser()
        assert model.attn_processors == {}
        model.fuse_qkv_projections()
        model.unfuse_qkv_projections()


class TestDiffusersTools:
    @pytest.mark.filterwarnings("ignore:.*from_config.*:FutureWarning")  # diffusers' own way of loading an EMAModel
    def test_ema_model_round_trip(self, tmp_path):
        model = denoiser()
        ema = EMAModel(model.parameters(), decay=0.5, model_cls=IPTV2Transformer2DModel, model_config=model.config)
        references.randomize_(model, 0.1, seed=1)
        ema.step(model.parameters())
        ema.save_pretrained(tmp_path)
        loaded = EMAModel.from_pretrained(tmp_path, IPTV2Transformer2DModel)
        assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, ema.shadow_params, strict=True))

    @pytest.mark.parametrize("hook", ["offload", "casting"])
    def test_hooked_weights_are_not_fused(self, hook):
        model = denoiser()
        if hook == "offload":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"call fuse\(\) before enabling offloading or layerwise casting"):
            model.fuse()

    @pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
    def test_group_offload(self, offload_type):
        model, given = denoiser(), inputs()
        expected, cpu = sample(model, **given), torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type, num_blocks_per_group=1)
        assert any(hasattr(module, "_diffusers_hook") for module in model.modules())
        torch.testing.assert_close(sample(model, **given), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fused", [False, True])
    def test_sequential_offload(self, fused):
        """With `enable_sequential_cpu_offload`, a layer's weights are on the meta device except during its call."""
        model, given = denoiser(), inputs()
        model = model.fuse() if fused else model
        expected = sample(model, **given)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
        torch.testing.assert_close(sample(model, **given), expected, rtol=1e-4, atol=1e-5)
