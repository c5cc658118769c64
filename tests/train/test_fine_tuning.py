"""Fine-tuning: a denoiser for other classes, another size or none, from a pipeline, a model's folder or the Hub."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from ldm_runs import SCRIPT, TIMEOUT, environment, log, words, write_pictures
from script_loading import load_script

from iptv2_diffusion import DiffusionObjective, IPTV2Pipeline, create_model
from iptv2_diffusion.models.adaptation import adapt_denoiser, match_classes
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.latent_diffusion.task import LatentDiffusionTask
from iptv2_diffusion.training.errors import ConfigError, UserError
from iptv2_diffusion.training.parsing import parse_config

BASE = ("ant", "bee", "bird", "cat", "cow", "dog", "fish", "fox", "moth, night butterfly")  # nine classes, as `tiny`


def denoiser(classes=9, kind="tiny", **overrides):
    """A small denoiser in which no layer returns 0."""
    torch.manual_seed(0)
    dit = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 4}
    options = {"sample_size": 8, "num_class_embeds": classes, **(dit if kind.startswith("dit") else {}), **overrides}
    model = create_model(kind, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.3 if "class_embedder" in name else 0.05)
    return model


def predict(model, label=None):
    torch.manual_seed(1)
    latents = torch.randn(2, 4, 8, 8)
    labels = None if label is None else torch.full((2,), label)
    with torch.no_grad():
        return model(latents, torch.full((2,), 300), class_labels=labels).sample


def write_pipeline(folder, ground, objective="flow", classes=9, names=BASE, **scheduler):
    vae = AutoencoderKL.from_pretrained(ground / "vae")
    made = DiffusionObjective.make_scheduler(objective, **scheduler)
    id2label = dict(enumerate(names)) if classes else None
    IPTV2Pipeline(denoiser(classes), vae, made, id2label=id2label).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# Rows of the class embedding


def test_classes_match_by_name_and_synonym():
    known = dict(enumerate(BASE))
    assert match_classes(["dog", "yak", "night butterfly"], known, 9) == {0: 5, 2: 8}
    assert match_classes(["0", "1"], {}, 2) == {0: 0, 1: 1}
    assert match_classes(["a", "b", "c"], {}, 2) == {}
    assert match_classes(["dog"], known, None) == {}


@pytest.mark.parametrize(("kind", "classes"), [("tiny", 3), ("tiny", 20), ("dit-s-2", 3), ("dit-s-2", 20)])
def test_kept_classes_compute_what_they_did_and_new_ones_what_the_null_label_does(kind, classes):
    old = denoiser(kind=kind)
    new = adapt_denoiser(old, sample_size=8, num_classes=classes, kept={0: 5, 2: 8}).eval()
    assert torch.equal(predict(new, 0), predict(old, 5))
    assert torch.equal(predict(new, 2), predict(old, 8))
    assert torch.equal(predict(new, 1), predict(old, 9))
    assert torch.equal(predict(new, classes), predict(old, 9))
    assert not torch.equal(predict(old, 5), predict(old, 9))


def test_without_classes_it_computes_what_the_null_label_does():
    old = denoiser()
    new = adapt_denoiser(old, sample_size=8, num_classes=None, kept={})
    assert new.config.num_class_embeds is None
    assert torch.allclose(predict(new.eval()), predict(old, 9), atol=1e-5)


def test_an_unconditional_denoiser_takes_classes():
    old = denoiser(None)
    new = adapt_denoiser(old, sample_size=8, num_classes=5, kept={})
    assert all(torch.equal(predict(new.eval(), label), predict(old)) for label in range(6))


@pytest.mark.parametrize("kind", ["tiny", "dit-s-2"])
def test_another_size_keeps_all_weights(kind):
    old = denoiser(kind=kind)
    new = adapt_denoiser(old, sample_size=16, num_classes=9, kept={n: n for n in range(9)})
    assert new.config.sample_size == 16
    state = new.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.state_dict().items())
    assert new(torch.randn(1, 4, 16, 16), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long)).sample.shape[
        -2:
    ] == (16, 16)


# --------------------------------------------------------------------------------------------------------------------
# Options that follow from the saved model


def resolved(*words):
    return parse_config(LDMConfig, list(map(str, words)))


def test_target_and_vae_are_those_of_the_saved_pipeline(ground, tmp_path):
    flow = write_pipeline(tmp_path / "flow", ground, shift=2.0)
    for model in (flow, flow / "transformer"):
        config = resolved("--model", model)
        assert (config.objective, config.flow_shift, config.learned_variance) == ("flow", 2.0, False)
        assert (config.vae, config.vae_subfolder) == (str(flow), "vae")
    assert resolved("--model", flow, "--objective", "flow", "--flow_shift", 1).flow_shift == 1
    assert resolved("--model", flow, "--vae", "assets/vae-emoji64").vae == "assets/vae-emoji64"
    new = resolved("--model", flow / "transformer/config.json", "--objective", "epsilon")
    assert (new.objective, new.vae) == ("epsilon", "assets/vae-emoji64")
    new = resolved("--model", "tiny")
    assert (new.objective, new.learned_variance, new.flow_shift) == ("epsilon", False, 1.0)


def test_the_noise_schedule_is_the_saved_ones(ground, tmp_path):
    from iptv2_diffusion.recipes.latent_diffusion.run import make_objective

    folder = write_pipeline(tmp_path / "v", ground, "v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
    sampler = DPMSolverMultistepScheduler.from_config(DDPMScheduler.load_config(folder / "scheduler"))
    sampler.save_pretrained(folder / "scheduler")
    config = resolved("--model", folder)
    objective = make_objective(config)
    assert config.objective == objective.prediction_type == "v_prediction"
    assert torch.equal(objective.scheduler.alphas_cumprod, sampler.alphas_cumprod)


def test_a_contradiction_names_both(ground, tmp_path):
    folder = write_pipeline(tmp_path / "flow", ground)
    with pytest.raises(ConfigError, match=r"objective is epsilon, but .*flow was trained with flow; leave --objective"):
        resolved("--model", folder, "--objective", "epsilon")
    with pytest.raises(ConfigError, match=r"learned_variance is true, but .* was trained with false"):
        resolved("--model", folder, "--learned_variance")


def test_a_name_that_is_neither_local_nor_on_the_hub_is_one_line():
    with pytest.raises(UserError, match=r"cannot load nobody/nothing: no such folder here, and from the Hub: ") as e:
        resolved("--model", "nobody/nothing")
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def train(ground, tmp_path, monkeypatch):
    """Train in this process; return the held-out losses and the pipeline."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(model, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        output = tmp_path / "run"
        short = ["--max_train_steps", 2, "--eval_every", 0, "--kid_samples", 0, "--checkpoint_every", 0]
        arguments = words(ground, output, "--vae", "none", "--model", model, *short, *options)
        assert load_script(SCRIPT).main(arguments) == 0
        losses = [row["heldout_loss"] for row in log(output) if "heldout_loss" in row]
        return losses, IPTV2Pipeline.from_pretrained(output / "pipeline")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_nine_classes_to_three_of_which_one_is_new(ground, tmp_path, train, capfd):
    folder = write_pipeline(tmp_path / "base", ground, names=("moth", *BASE[1:8], "yak"))
    base = IPTV2Pipeline.from_pretrained(folder)
    _, pipeline = train(folder, "--learning_rate", 1e-9)
    assert "3 of 3 classes start from their rows" in capfd.readouterr().out
    assert list(pipeline.labels) == ["bird", "fish", "moth"]
    assert pipeline.config.prediction_type == "flow"
    rows = pipeline.transformer.embedders[0].class_embedder.weight
    wanted = base.transformer.embedders[0].class_embedder.weight[[2, 6, 0, 9]]
    assert torch.allclose(rows, wanted, atol=1e-5)
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)


def test_to_more_classes_to_no_classes_and_to_another_size(ground, tmp_path, train):
    folder = write_pipeline(tmp_path / "base", ground)
    _, pipeline = train(folder / "transformer", "--num_classes", 20, "--resolution", 64)
    assert pipeline.transformer.config.num_class_embeds == 20
    assert pipeline.transformer.config.sample_size == 16
    _, pipeline = train(folder, "--label_column", "ignore", "--overwrite", "--accept_changes")
    assert pipeline.num_classes is None
    pipeline.save_pretrained(tmp_path / "none")
    write_pictures(tmp_path / "five", ("a", "b", "c", "d", "e"), 4)
    _, pipeline = train(tmp_path / "none", "--data", tmp_path / "five", "--overwrite", "--accept_changes")
    assert list(pipeline.labels) == ["a", "b", "c", "d", "e"]


def test_from_a_hub_cache(ground, tmp_path, train, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "hub/models--someone--tiny/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    write_pipeline(snapshot, ground)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    _, pipeline = train("someone/tiny")
    assert pipeline.config.prediction_type == "flow"
    assert list(pipeline.labels) == ["bird", "fish", "moth"]


def test_fifty_steps_lower_the_heldout_loss(ground, tmp_path, train):
    folder = write_pipeline(tmp_path / "base", ground)
    losses, _ = train(folder, "--max_train_steps", 50, "--eval_every", 10, "--learning_rate", 4e-3)
    assert losses[-1] < 0.97 * losses[0]


# --------------------------------------------------------------------------------------------------------------------
# LoRA

DRAW = """
import sys
import numpy, torch
from iptv2_diffusion import IPTV2Pipeline
pipe = IPTV2Pipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights(sys.argv[2])
draw = lambda: pipe("bird", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
numpy.save(sys.argv[3], draw())
"""


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipeline("bird", num_inference_steps=2, output_type="np", generator=seed).images


def check_cards(run, base, heldout_loss):
    """The cards of the pipeline and of the adapter say what they are, and their code draws."""
    for name, told in (("pipeline", "with an `IPTV2Transformer2DModel`"), ("lora", f"rank 4 for .* `{base}`")):
        card = ModelCard.load(run / name / "README.md")
        assert re.search(told, card.text)
        assert card.data.pipeline_tag == "unconditional-image-generation"
        assert card.data.library_name == "diffusers"
        assert ("lora" in card.data.tags) == (name == "lora")
        assert "class-conditional-image-generation" in card.data.tags
        [result] = card.data.eval_results
        assert (result.metric_name, result.metric_value) == ("heldout_loss", heldout_loss)
        assert "![Samples, one row per class." in card.text
        assert (run / name / "samples.png").is_file()
        values = {}
        code = card.text.split("```python\n")[1].split("```")[0]
        exec(code.replace("guidance_scale=3", "guidance_scale=3, num_inference_steps=1"), values)
        assert values["image"].size == (32, 32)


def test_an_adapter_trains_and_leaves_the_base_unchanged(ground, tmp_path, train, capfd):
    folder = write_pipeline(tmp_path / "base", ground)
    options = ["--lora_rank", 4, "--max_train_steps", 40, "--eval_every", 10, "--learning_rate", 1e-2]
    losses, merged = train(folder, *options, "--save_dtype", "float32")
    assert losses[-1] < 0.98 * losses[0]
    assert " M trainable)" in capfd.readouterr().out
    assert merged.id2label == dict(enumerate(BASE))  # the base's classes, because an adapter adds none
    base, adapter = IPTV2Pipeline.from_pretrained(folder), tmp_path / "run/lora"
    names = {path.name for path in adapter.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "README.md", "samples.png"}
    check_cards(tmp_path / "run", folder, losses[-1])
    before, state = draw(base), merged.transformer.state_dict()
    differing = {k for k, v in base.transformer.state_dict().items() if not torch.equal(v, state[k])}
    assert differing
    assert all(name.endswith(("qkv.weight", "out_proj.weight")) for name in differing)

    base.load_lora_weights(adapter)
    adapted = draw(base)
    assert abs(adapted - before).max() > 1e-3
    assert np.allclose(adapted, draw(merged), atol=1e-4)
    base.fuse_lora()
    assert np.allclose(draw(base), adapted, atol=1e-4)
    base.unfuse_lora()
    base.unload_lora_weights()
    base.load_lora_weights(str(adapter / "pytorch_lora_weights.safetensors"), adapter_name="style")
    base.set_adapters("style", 0.0)
    assert np.allclose(draw(base), before, atol=1e-4)
    base.unload_lora_weights()
    fresh = IPTV2Pipeline.from_pretrained(folder)
    fresh.load_lora_weights(adapter)
    fresh.unload_lora_weights()
    assert np.array_equal(draw(fresh), before)

    command = [sys.executable, "-c", DRAW, str(folder), str(adapter), str(tmp_path / "drawn.npy")]
    subprocess.run(command, check=True, env=environment(), timeout=TIMEOUT)
    assert np.allclose(np.load(tmp_path / "drawn.npy"), adapted, atol=1e-5)
    with pytest.raises(
        ValueError, match="this is not an adapter of a IPTV2Transformer2DModel: it names the layers other"
    ):
        base.load_lora_weights({"transformer.other.lora_A.weight": torch.zeros(4, 4)})


def test_labels_of_an_adapter_are_classes_of_the_base(ground, tmp_path, train, monkeypatch):
    folder = write_pipeline(tmp_path / "base", ground, names=(*BASE[:8], "yak"))
    seen = set()
    prepare = LatentDiffusionTask._prepare
    monkeypatch.setattr(
        LatentDiffusionTask, "_prepare", lambda *a: (lambda out: (seen.update(out[3].tolist()), out)[1])(prepare(*a))
    )
    short = ["--lora_rank", 2, "--label_dropout", 0]
    with pytest.raises(ConfigError, match=r"base has no class 'moth', and an adapter adds none"):
        train(folder, *short)
    shutil.copytree(ground / "images", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/moth")
    train(folder, *short, "--data", tmp_path / "two")
    assert seen == {2, 6}  # bird and fish
    seen.clear()
    train(folder, *short, "--label_column", "ignore", "--overwrite", "--accept_changes")
    assert seen == {9}
    with pytest.raises(ConfigError, match="lora_rank needs saved weights; set --model"):
        train("tiny", *short)
    with pytest.raises(ConfigError, match="kid_samples is 40, but it does not work with lora_rank 2; leave one out"):
        train(folder, *short, "--kid_samples", 40)
