"""The size tables against model.md §7, counted on the meta device, and `create_model`."""

from __future__ import annotations

from functools import cache

import pytest
import references
import torch
import yaml
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from iptv2_diffusion.models.presets import PRESETS, RESTORATION_PRESETS, count_macs, count_parameters, create_model
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

OURS = [name for name, preset in PRESETS.items() if preset.model_class is IPTV2Transformer2DModel]

# name: (most parameters in millions, GMACs of the DiT to match), model.md §7
TABLE = {
    "iptv2-s": (55, 6.06),
    "iptv2-b": (225, 23.0),
    "iptv2-l": (820, 80.7),
    "iptv2-xl": (1200, 118.6),
    "iptv2-s-2": (55, 6.06),
    "iptv2-b-2": (225, 23.0),
    "iptv2-l-2": (820, 80.7),
    "iptv2-xl-2": (1200, 118.6),
}

# the lineage's U-DiT: (channels, heads): (fused parameters in millions, GMACs), model.md §7
U_DIT = {"S": (96, 4, 52.05, 6.02), "B": (192, 8, 204.43, 22.18), "L": (384, 16, 810.19, 84.91)}


@cache
def on_meta(name: str, **overrides) -> torch.nn.Module:
    """A model on the meta device, created once; no test changes it."""
    with torch.device("meta"):
        return create_model(name, **overrides)


@cache
def macs(name: str, batch_size: int = 1, **overrides) -> int:
    return count_macs(on_meta(name, **overrides), batch_size=batch_size)


class TestSizes:
    @pytest.mark.parametrize("name", TABLE)
    def test_within_the_table(self, name):
        most_parameters, gmacs = TABLE[name]
        model = on_meta(name, fused=True)
        assert model.config.sample_size == 32
        assert model.config.in_channels == 4
        assert count_parameters(model) / 1e6 <= most_parameters
        assert macs(name, fused=True) / 1e9 == pytest.approx(gmacs, rel=0.04)

    @pytest.mark.parametrize("name", PRESETS)
    def test_figures_of_every_preset_are_true(self, name):
        """Three figures, as in the table."""
        preset = PRESETS[name]
        fused = {"fused": True} if name in (*OURS, *RESTORATION_PRESETS) else {}
        assert count_parameters(on_meta(name, **fused)) / 1e6 == pytest.approx(preset.parameters, rel=5e-3)
        assert macs(name, **fused) / 1e9 == pytest.approx(preset.gmacs, rel=8e-3)

    @pytest.mark.parametrize("name", TABLE)
    def test_head_sizes_fit_the_tensor_cores(self, name):
        """Heads of 32 or 64 channels at every stage: neither RoPE nor the attention kernels pad them."""
        model = on_meta(name)
        sizes = {
            module.out_proj.out_features // module.num_heads
            for module in model.modules()
            if hasattr(module, "out_proj")
        }
        assert sizes <= {32, 64}

    @pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
    def test_patch_2_is_wider_at_fewer_positions_for_the_same_macs(self, size):
        """Its widest map has a quarter of the positions and less than four times the channels: fewer bytes."""
        narrow, wide = on_meta(f"iptv2-{size}"), on_meta(f"iptv2-{size}-2")
        assert wide.config.patch_size == 2 * narrow.config.patch_size
        assert wide.backbone.out_channels < 4 * narrow.backbone.out_channels
        assert macs(f"iptv2-{size}-2", fused=True) == pytest.approx(macs(f"iptv2-{size}", fused=True), rel=0.04)

    @pytest.mark.parametrize("name", ["iptv2-s", "iptv2-b"])
    def test_training_costs_little_more_than_deployment(self, name):
        """model.md §7: unfused costs about 1.18 ×; the merged training form of a batch costs less."""
        ratio = macs(name, batch_size=32) / macs(name, fused=True)
        assert 1.0 < ratio < 1.18

    @pytest.mark.parametrize("size", U_DIT)
    def test_the_lineage_has_exactly_its_published_parameters(self, size):
        """Both attentions GGSA, stride 2 at every level, an embedder per width, learned variance."""
        channels, heads, parameters, gmacs = U_DIT[size]
        with torch.device("meta"):
            model = IPTV2Transformer2DModel(
                channels=channels,
                num_attention_heads=heads,
                layers_per_stage=(2, 5, 8, 5, 2),
                attention_pattern=("grid", "grid"),
                grid_stride=2,
                conditioning_dim=None,
                out_channels=8,
                fused=True,
            )
        assert round(count_parameters(model) / 1e6, 2) == parameters
        assert round(count_macs(model) / 1e9, 2) == gmacs


class TestCounting:
    def test_dit_s_2_reads_6_06(self):
        """On the CPU the counter ignores attention and gives 5.45."""
        assert round(macs("dit-s-2") / 1e9, 2) == 6.06

    def test_a_real_model_counts_as_its_meta_twin_and_is_not_touched(self):
        model = create_model("tiny").train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert count_macs(model) == count_macs(on_meta("tiny"))
        assert model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_counts_by_hand(self):
        """One fused, unconditional-size level by arithmetic: stem, one GGSA, one Rep-LeFFN, adaLN, embedder, head."""
        side, channels, dim = 8, 16, 32
        with torch.device("meta"):
            model = IPTV2Transformer2DModel(
                sample_size=side,
                channels=channels,
                layers_per_stage=(1,),
                num_attention_heads=2,
                attention_pattern=("grid",),
                grid_stride=2,
                conditioning_dim=dim,
                num_class_embeds=None,
                fused=True,
            )
        positions = side * side
        per_position = [
            9 * 4 * channels,  # stem
            25 * channels + 4 * channels**2,  # GGSA: depthwise and projections
            2 * channels * positions // 4,  # GGSA: q·k and its product with v, positions / p² tokens per group
            2 * 2 * channels**2 + 25 * 2 * channels,  # Rep-LeFFN
            9 * channels**2 + 9 * channels * 4,  # head and output
        ]
        once = 256 * dim + dim**2 + (2 * 3 + 2) * channels * dim  # timestep MLP; adaLN of two layers and the output
        assert count_macs(model) == positions * sum(per_position) + once

    def test_cost_grows_with_the_image_as_the_docstrings_say(self):
        """Four times the positions: a fixed grid costs four times, a fixed stride more."""
        by_grid = on_meta("tiny", grid_stride=None, grid_size=4, attention_pattern=("grid",))
        by_stride = on_meta("tiny", grid_stride=2, attention_pattern=("grid",))
        growth = [count_macs(model, 64, 64) / count_macs(model, 32, 32) for model in (by_grid, by_stride)]
        assert growth[0] == pytest.approx(4, rel=0.01)
        assert growth[1] > 4.5


class TestCreateModel:
    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_builds_with_overrides(self, name):
        overrides = {"in_channels": 1} if name in RESTORATION_PRESETS else {"num_class_embeds": 7}
        model = on_meta(name, **overrides, sample_size=16)
        assert isinstance(model, PRESETS[name].model_class)
        assert model.config.sample_size == 16
        if name in RESTORATION_PRESETS:
            assert model.config.in_channels == 1
        else:
            assert getattr(model.config, "num_class_embeds" if name in OURS else "num_embeds_ada_norm") == 7

    def test_a_preset_is_not_changed_by_overrides(self):
        before = dict(PRESETS["tiny"].config)
        on_meta("tiny", channels=32)
        assert PRESETS["tiny"].config == before

    def test_the_tiny_preset_runs(self):
        model = references.randomize_(create_model("tiny"), 0.1).eval()
        with torch.no_grad():
            out = model(references.random_map(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 8])).sample
        assert out.shape == (2, 4, 8, 8)
        assert out.isfinite().all()

    def test_dit_never_drops_labels_by_itself(self):
        """diffusers' DiT drops labels per block; here the training loop alone does, so training is deterministic."""
        model = create_model("dit-s-2", num_layers=2, sample_size=8, num_class_embeds=5).train()
        assert isinstance(model, DiTTransformer2DModel)
        embedders = [module for module in model.modules() if isinstance(module, LabelEmbedding)]
        assert len(embedders) == 2
        assert all(embedder.dropout_prob == 0 for embedder in embedders)
        assert all(embedder.embedding_table.num_embeddings == 6 for embedder in embedders)  # the null row stays
        references.randomize_(model, 0.05)
        given = references.random_map(64, 4, 8, 8), torch.full((64,), 10), torch.zeros(64, dtype=torch.long)
        with torch.no_grad():
            assert torch.equal(model(*given).sample, model(*given).sample)

    def test_from_a_saved_folder_with_its_weights(self, tmp_path):
        source = references.randomize_(create_model("tiny"), 0.1)
        source.save_pretrained(tmp_path)
        loaded = create_model(str(tmp_path))
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        agreeing = create_model(str(tmp_path), channels=16, layers_per_stage=(1, 1, 1))  # a list in JSON
        assert agreeing.config.channels == 16
        with pytest.raises(ValueError, match=r"channels.*16.*32"):
            create_model(str(tmp_path), channels=32)

    @pytest.mark.parametrize("suffix", ["json", "yaml"])
    def test_from_a_config_file(self, suffix, tmp_path):
        path = tmp_path / f"model.{suffix}"
        source = create_model("tiny")
        config = {"_class_name": "IPTV2Transformer2DModel", **PRESETS["tiny"].config}
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        path.write_text(source.to_json_string() if suffix == "json" else yaml.safe_dump(config))
        model = create_model(str(path), num_class_embeds=3)
        assert model.config.channels == 16
        assert model.config.num_class_embeds == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("chanels: 8", r"no argument 'chanels'; did you mean channels"),
            ("- 8", "holds list"),
            ("a: [", "neither JSON nor YAML"),
            ("1: 2", "the name 1 is not text"),
            ("_class_name: [IPTV2Transformer2DModel]", r"_class_name is \['IPTV2Transformer2DModel'\], not one of"),
            ("_class_name: UNet2DModel", "_class_name is 'UNet2DModel', not one of IPTV2Transformer2DModel, IPTV2Rest"),
        ],
    )
    def test_config_files_that_are_not_models(self, tmp_path, text, message):
        path = tmp_path / "model.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            create_model(str(path))
        assert "\n" not in str(caught.value)

    def test_a_folder_without_a_model_names_those_inside(self, tmp_path):
        """Most likely that of a pipeline."""
        with pytest.raises(ValueError, match=r"has no config\.json"):
            create_model(str(tmp_path))
        create_model("tiny").save_config(tmp_path / "transformer")
        with pytest.raises(ValueError, match="did you mean one of its folders: transformer"):
            create_model(str(tmp_path))

    def test_unknown_names_and_arguments_name_the_nearest(self):
        with pytest.raises(ValueError, match=r"iptv2-x.*iptv2-xl"):
            create_model("iptv2-x")
        with pytest.raises(ValueError, match=r"chanels.*channels"):
            create_model("tiny", chanels=8)

    def test_dit_refuses_oblong_latents(self):
        with pytest.raises(ValueError, match=r"16.*32"):
            create_model("dit-s-2", sample_size=(16, 32))
