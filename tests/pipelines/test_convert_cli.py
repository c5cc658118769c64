"""iptv2-convert: a checkpoint of U-DiT's code becomes a pipeline folder; other files are refused in one line."""

import argparse
import pathlib

import pytest
import torch
from diffusers import DDPMScheduler
from kl_vae import make_kl_vae
from safetensors.torch import save_file
from udit_references import TINY, forward, merge_in_place, weights

from iptv2_diffusion import IPTV2Pipeline, create_model
from iptv2_diffusion.imagenet_classes import imagenet_id2label
from iptv2_diffusion.pipelines.command_line import CommandError
from iptv2_diffusion.pipelines.convert_cli import main


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    make_kl_vae(4, 4, 4).save_pretrained(folder)
    return str(folder)


def checkpoint(path, state, **others):
    """A file as that code's training writes it, with the command line's options next to the weights."""
    options = argparse.Namespace(model="U-DiT-S", image_size=64, vae="ema", ckpt=None, epochs=80)
    torch.save({"model": state, "ema": state, "opt": {"state": {}}, "args": options, **others}, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True], ids=["branches", "merged"])
def test_a_checkpoint_becomes_a_pipeline(vae, tmp_path, capsys, merged):
    state = weights()
    file = checkpoint(tmp_path / "400k.pt", merge_in_place(state) if merged else state)
    assert main(["udit", file, str(tmp_path / "out"), "--vae", vae]) == 0
    assert "trainable form, 5 classes, latents 4x16x16" in capsys.readouterr().out
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "out")
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    timestep, labels = torch.tensor([10, 700]), torch.tensor([1, TINY["classes"]])
    output = pipeline.transformer(x, timestep, labels).sample
    torch.testing.assert_close(output, forward(state, x, timestep, labels), atol=1e-4, rtol=1e-4)
    assert type(pipeline.scheduler) is DDPMScheduler
    assert pipeline.scheduler.config.variance_type == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(3, num_inference_steps=2, guidance_scale=2.0).images[0].size == (64, 64)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_thousand_classes_get_their_names_and_fuse_writes_the_deployed_form(vae, tmp_path):
    file = tmp_path / "bare.pt"
    torch.save(weights(classes=1000, depths=(1, 1, 1, 1, 1)), file)  # weights alone
    out = tmp_path / "new" / "out"
    assert main(["udit", str(file), str(out), "--vae", vae, "--resolution", "32", "--fuse"]) == 0
    pipeline = IPTV2Pipeline.from_pretrained(out)
    assert pipeline.transformer.config.fused
    assert pipeline.transformer.config.sample_size == 8
    names = imagenet_id2label()
    assert pipeline.id2label == names
    assert (len(names), names[0], names[207], names[999]) == (1000, "tench", "golden retriever", "toilet tissue")


def test_training_continues_from_a_converted_model(vae, tmp_path):
    main(["udit", checkpoint(tmp_path / "x.pt", weights()), str(tmp_path / "out"), "--vae", vae])
    model = IPTV2Pipeline.from_pretrained(tmp_path / "out").transformer.train()
    model(torch.randn(1, 4, 16, 16), torch.tensor([1]), torch.tensor([0])).sample.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"num_class_embeds": 9}, "num_class_embeds=5, not 9"),
        ({"sample_size": 32}, "sample_size=16, not 32"),
        ({"out_channels": 4}, "out_channels=8, not 4"),
    ],
)
def test_training_for_other_classes_or_another_size_is_refused_in_one_line(vae, tmp_path, wanted, told):
    main(["udit", checkpoint(tmp_path / "x.pt", weights()), str(tmp_path / "out"), "--vae", vae])
    with pytest.raises(ValueError, match=f"was saved with {told}") as caught:
        create_model(str(tmp_path / "out" / "transformer"), **wanted)
    assert "\n" not in str(caught.value)


def write_wrong(kind, path, state):
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "truncated":
        whole = pathlib.Path(checkpoint(path, state)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<!DOCTYPE html> not found")
    elif kind == "no ema":
        torch.save({"model": state, "opt": {}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(2), path)
    elif kind == "code":
        torch.save({"ema": state, "args": pathlib.Path("x")}, path)
    elif kind == "numbered":
        torch.save({"ema": {**state, 1: torch.zeros(1)}}, path)
    elif kind == "sparse":
        torch.save({"ema": {**state, "output.bias": torch.zeros(4).to_sparse()}}, path)
    elif kind == "dit":
        torch.save({"blocks.0.adaLN_modulation.1.weight": torch.zeros(6, 1)}, path)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("safetensors", "not a (complete )?checkpoint of torch"),
        ("truncated", "not a complete checkpoint of torch .*; download it again"),
        ("empty", "not a (complete )?checkpoint of torch"),
        ("text", "not a (complete )?checkpoint of torch"),
        ("no ema", "has no `ema`, but model, opt; give"),
        ("numbered", "has no `ema`, but ema; give"),
        ("sparse", "has no `ema`, but ema; give"),
        ("tensor", "holds Tensor, not a dictionary"),
        ("code", r"contains pathlib\S* in addition to the weights; for safety, it is not loaded"),
        ("dit", "seems to be the weights of a DiT under its authors' names"),
        ("missing", "is not a file"),
    ],
)
def test_other_files_are_refused_in_one_line(vae, tmp_path, kind, told):
    path = tmp_path / "x.pt"
    write_wrong(kind, path, weights())
    with pytest.raises(CommandError, match=told) as caught:
        main(["udit", str(path), str(tmp_path / "out"), "--vae", vae])
    assert "x.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_in_one_line(vae, tmp_path):
    file, out = checkpoint(tmp_path / "x.pt", weights()), str(tmp_path / "out")
    deep = make_kl_vae(4, 4, 4, latent_channels=16)
    deep.save_pretrained(tmp_path / "deep")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for words, told in (
        (["udit", file, out, "--vae", str(tmp_path / "deep")], "takes 4 channels, but the VAE's latents have 16"),
        (["udit", file, out, "--vae", str(tmp_path / "none")], "cannot load the VAE .*: no such folder"),
        (["udit", file, out, "--vae", vae, "--resolution", "30"], "height 30 is not a multiple of the VAE's 4; use 28"),
        (["udit", file, str(tmp_path / "full"), "--vae", vae], "exists and is not an empty folder"),
    ):
        with pytest.raises(CommandError, match=told) as caught:
            main(words)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
