"""The training script: it learns, resumes bit for bit, takes pairs, tasks, stages and a generator's backbone."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from script_loading import load_script

from iptv2_diffusion import IPTV2RestorationPipeline, create_model
from iptv2_diffusion.commands.train_restoration import EXAMPLES
from iptv2_diffusion.recipes.restoration.config import RestorationConfig
from iptv2_diffusion.recipes.restoration.data import make_sources
from iptv2_diffusion.recipes.restoration.run import make_model
from iptv2_diffusion.training.errors import UserError
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.parsing import parse_config

ROOT = Path(__file__).parents[2]
train_restoration = load_script("train/train_restoration.py")


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(tmp_path, name, *words, steps=4):
    """Run the script in this process; returns the output folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = {
        "output_dir": tmp_path / name, "data": tmp_path / "photos", "heldout": tmp_path / "photos",
        "cache_dir": tmp_path / "cache", "model": "restoration-tiny", "patch_sizes": "16", "batch_size": 4,
        "max_train_steps": steps, "learning_rate": "2e-3", "heldout_size": 32, "report_to": "none",
        "lr_schedule": "constant", "num_threads": 1, "preview_every": 0, "checkpoint_every": 0, "log_every": 1,
    }  # fmt: skip
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert train_restoration.main([*argv, *words]) == 0
    return tmp_path / name


@pytest.fixture
def photos(tmp_path):
    y, x = np.mgrid[:64, :72].astype(np.float32)
    for seed in range(3):
        waves = [128 + 90 * np.sin(x / (5 + seed)) * np.cos(y / (6 + channel)) for channel in range(3)]
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(tmp_path / f"photos/{seed}.png")
    return tmp_path


SIGMA = ("--model_overrides", json.dumps({"sigma_conditioning": "map"}))


def test_it_learns_to_denoise_and_leaves_a_pipeline(photos):
    words = ("--noise", "25,25", "--eval_every", "20", "--heldout_sigmas", "25", "--ema_decay", "0.9", *SIGMA)
    folder = train(photos, "run", *words, steps=60)
    values = [row["psnr_sigma25"] for row in read_metrics(folder / "metrics.jsonl") if "psnr_sigma25" in row]
    assert values[-1] > 20.17 + 1.5  # 20.17 dB is the noise itself
    assert values[-1] > values[0]
    pipeline = IPTV2RestorationPipeline.from_pretrained(folder / "pipeline")
    assert pipeline.model.config.fused
    assert (folder / "pipeline/training_config.yaml").is_file()


def test_an_adapter_trains_and_leaves_the_base_unchanged(photos):
    words = ("--noise", "25,25", "--heldout_sigmas", "25", "--ema_decay", "0.9", "--save_dtype", "float32")
    base = train(photos, "base", *words, "--eval_every", "0", *SIGMA, steps=25) / "pipeline"
    before = (base / "model/diffusion_pytorch_model.safetensors").read_bytes()
    lora = ("--model", str(base), "--lora_rank", "4", "--eval_every", "10", "--learning_rate", "1e-2")
    folder = train(photos, "adapted", *words, *lora, steps=50)
    values = [row["psnr_sigma25"] for row in read_metrics(folder / "metrics.jsonl") if "psnr_sigma25" in row]
    assert values[-1] > values[0] + 0.1  # [dB]
    assert (base / "model/diffusion_pytorch_model.safetensors").read_bytes() == before

    pipeline, merged = (IPTV2RestorationPipeline.from_pretrained(path) for path in (base, folder / "pipeline"))
    pictures = [str(photos / "photos/0.png")]

    def restore(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(pictures, sigma=25, output_type="np").images

    plain = restore(pipeline)
    pipeline.load_lora_weights(folder / "lora", adapter_name="photos")
    adapted = restore(pipeline)
    assert abs(adapted - plain).max() > 1e-3
    np.testing.assert_allclose(adapted, restore(merged), atol=1e-4)
    pipeline.fuse_lora()
    np.testing.assert_allclose(restore(pipeline), adapted, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.set_adapters("photos", 0.0)
    np.testing.assert_allclose(restore(pipeline), plain, atol=1e-4)
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(restore(pipeline), plain, atol=1e-6)
    with pytest.raises(
        ValueError, match="this is not an adapter of a IPTV2RestorationModel: it names the layers other"
    ):
        pipeline.load_lora_weights({"model.other.lora_A.weight": torch.zeros(4, 4)})
    card = ModelCard.load(folder / "lora/README.md")
    assert "lora" in card.data.tags
    assert f"pipe.load_lora_weights('{folder / 'lora'}')" in card.text
    assert (folder / "pipeline/README.md").is_file()


def test_a_resumed_run_equals_an_uninterrupted_one(photos):
    words = (
        "--patch_sizes",
        "16,24",
        "--patch_steps",
        "3",
        "--patch_batch_sizes",
        "4,2",
        "--rgb_shuffle",
        "--mixup",
        "0.5",
    )
    words = (*words, "--losses", json.dumps({"l1": 1, "mse": 1, "sobel": 0.1}), "--eval_every", "0", *SIGMA)
    whole = train(photos, "whole", *words, steps=6)
    train(photos, "halves", *words, steps=3)
    halves = train(photos, "halves", *words, steps=6)
    states = [load_file(f / "checkpoint-00000006/model.safetensors") for f in (whole, halves)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_accumulation_equals_the_large_batch(photos):
    words = ("--eval_every", "0", "--ema_decay", "0", *SIGMA)
    losses = []
    for parts in (1, 2):
        folder = train(photos, f"parts{parts}", *words, "--gradient_accumulation_steps", str(parts), steps=2)
        losses.append([row["loss"] for row in read_metrics(folder / "metrics.jsonl")])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_pairs_from_folders(photos):
    for kind, shift in (("input", 20), ("target", 0)):
        (photos / f"pairs/{kind}").mkdir(parents=True)
        for path in (photos / "photos").glob("*.png"):
            image = np.asarray(Image.open(path)).astype(int) + shift
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(photos / f"pairs/{kind}/{path.name}")
    words = ("--layout", "folders", "--data", str(photos / "pairs"), "--heldout", str(photos / "pairs"), "--losses")
    folder = train(photos, "pairs_run", *words, '{"psnr": 1}', "--eval_every", "25", "--ema_decay", "0", steps=50)
    values = [row["psnr_pairs"] for row in read_metrics(folder / "metrics.jsonl") if "psnr_pairs" in row]
    assert values[-1] > 22.4 + 1.5  # a shift by 20 is 22.1 to 22.4 dB


def test_one_model_for_several_tasks(photos):
    words = (
        "--tasks",
        "noise,motion_blur+jpeg,rain",
        "--motion_blur",
        "3,5",
        "--heldout_size",
        "24",
        "--rain",
        "0.01,0.02",
    )
    folder = train(photos, "tasks", *words, "--rgb_shuffle", "--mixup", "0.5", "--eval_every", "4", *SIGMA)
    (row,) = [row for row in read_metrics(folder / "metrics.jsonl") if "psnr" in row]
    assert {"psnr_noise_sigma25", "psnr_motion_blur+jpeg_sequential", "psnr_rain_rainstreaks"} <= set(row)
    assert IPTV2RestorationPipeline.from_pretrained(folder / "pipeline").model.config.num_tasks == 3


def test_one_task_alone(photos):
    folder = train(photos, "task", "--tasks", "noise", "--eval_every", "0", *SIGMA, steps=1)
    assert IPTV2RestorationPipeline.from_pretrained(folder / "pipeline").model.config.num_tasks == 1


def test_later_stages_must_divide_over_the_micro_batches_too(photos):
    words = ("--patch_sizes", "16,24", "--patch_steps", "3", "--patch_batch_sizes", "4,2", *SIGMA)
    with pytest.raises(UserError, match=r"patch_batch_sizes, stage 2: 2 does not divide over 1 .* 4 micro.*; use 4"):
        train(photos, "stages", *words, "--gradient_accumulation_steps", "4")
    with pytest.raises(UserError, match=r"patch_batch_sizes is .*; each must be at least 1"):
        train(photos, "stages", *words, "--patch_batch_sizes", "4,0")
    assert not (photos / "stages").exists()


def test_training_continues_from_shipped_weights(photos):
    """The shipped weights are fused and in half precision. After a tiny step the function is almost the same."""
    words = ("--model", str(ROOT / "assets/iptv2-denoise-color/model"), "--noise", "10,30", "--eval_every", "0")
    folder = train(photos, "more", *words, "--learning_rate", "1e-9", "--save_dtype", "float32", steps=1)
    ours = IPTV2RestorationPipeline.from_pretrained(folder / "pipeline")
    theirs = IPTV2RestorationPipeline.from_pretrained(ROOT / "assets/iptv2-denoise-color")
    assert tuple(ours.config.sigma_range) == (10, 30)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ours.model(image, 25).sample, theirs.model(image, 25).sample, atol=2e-4, rtol=0)
    with pytest.warns(UserWarning, match="sigma is 50; this model was trained with 10 to 30"):
        ours(image, sigma=50)


def test_gray_from_the_command_line(photos):
    folder = train(photos, "gray", "--channels", "1", *SIGMA, "--eval_every", "0", steps=1)
    assert IPTV2RestorationPipeline.from_pretrained(folder / "pipeline").model.config.in_channels == 1


def test_a_restorer_starts_from_a_generators_backbone(photos, capsys):
    create_model("tiny").save_pretrained(photos / "generator")
    words = ("--model", "restoration-tiny-exchange", "--backbone_from", str(photos / "generator"), "--eval_every", "0")
    train(photos, "exchange", *words, steps=1)
    assert "(100.0%)" in capsys.readouterr().out


def test_scales_add_smaller_copies_to_train_on_and_leave_the_heldout_crops_alone(photos, capsys):
    config = parse_config(
        RestorationConfig,
        ["--data", str(photos / "photos"), "--cache_dir", str(photos / "cache"), "--scales", "1,0.5"],
    )
    accelerator = Accelerator(cpu=True)
    (train_source,), (test_source,) = (
        make_sources(config, config.data, split, accelerator) for split in ("train", "test")
    )
    assert [image.shape[:2] for image in train_source.sampler.clean.images] == [(64, 72), (32, 36)] * 3
    assert [image.shape[:2] for image in test_source.sampler.clean.images] == [(64, 72)] * 3
    train(photos, "scales", "--scales", "1,0.5", steps=1)
    told = capsys.readouterr().out
    assert "3 images to train on, 9 held-out crops" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--patch_sizes", "16,24"), "patch_steps is empty; give 1 in increasing order for 2 patch_sizes"),
        (("--losses", '{"vgg": 1}'), "unknown losses vgg"),
        (("--degradations", "snow"), "'snow' is not a degradation; choose from noise"),
        (("--noise", "50,5"), "noise is 50,5"),
        (("--heldout_size", "100"), "no image of .*photos is large enough for .* of 100"),
        (
            ("--gaussian_blur", "0,0", "--degradations", "gaussian_blur"),
            r"gaussian_blur is 0,0; each must be in \[0.1, 100\]",
        ),
        (("--losses", '{"l1": "x"}'), "give weights of at least 0"),
        (("--losses", '{"l1": 0}'), "one of them above 0"),
        (
            ("--losses", '{"sobel": 1}', "--patch_sizes", "2"),
            "sobel needs patches of at least 3 pixels; patch_sizes has 2",
        ),
        (("--channels", "2"), "channels is '2'; choose one of 1, 3"),
        (("--mixup", "0.5", "--batch_size", "1"), "a batch has 1; use 2 or more"),
        (("--seed", "-1"), r"seed is -1; it must be in \[0, 4294967295\]"),
        (("--tasks", "", "--degradations", ""), "degradations and tasks are both empty"),
        (("--data", "absent"), "absent is not a folder"),
        (("--degradations", "rain", *SIGMA), "takes a noise level, but the data has none"),
        (("--tasks", "noise", "--layout", "gopro"), "layout gopro has pairs"),
        (("--scales", "0.5", "--layout", "gopro"), "layout gopro has pairs"),
        (("--scales", "1,2"), r"scales is 1,2; each must be in \(0, 1\]"),
        (("--lora_rank", "4"), "lora_rank needs saved weights; set --model to a folder, a pipeline or a Hub name"),
        (("--lora_rank", "4", "--backbone_from", "x"), "lora_rank 4 changes the saved restorer .* leave one out"),
        (("--lora_rank", "4", "--ema", "power"), "lora_rank needs --ema constant and --sharding none"),
        (("--model", "tiny"), "Transformer2DModel"),
    ],
)
def test_bad_options_are_named(photos, words, message):
    with pytest.raises(UserError, match=message):
        train(photos, "bad", *words)


EXAMPLES = [shlex.split(line.split(" ... ")[1]) for line in EXAMPLES.splitlines() if " ... --" in line]


@pytest.mark.parametrize("words", EXAMPLES, ids=lambda words: " ".join(words[-2:]))
def test_the_examples_of_help_run_as_printed(photos, words, monkeypatch, capsys):
    """The examples run with small data, small patches and a small model."""
    monkeypatch.setenv("HOME", str(photos))
    monkeypatch.chdir(photos)
    for name in ("configs", "assets"):
        Path(name).symlink_to(ROOT / name)
    cached = ".cache/iptv2-diffusion/photographs"
    pairs = ("my_pairs/input", "my_pairs/target", "GoPro/train/1/blur", "GoPro/train/1/sharp")
    for folder in ("my_photos", "my_heldout_photos", f"{cached}/train", f"{cached}/heldout", *pairs):
        shutil.copytree("photos", folder)
    small = ["--patch_sizes", "32", "--patch_steps", "[]", "--patch_batch_sizes", "[]", "--batch_size", "1"]
    small += ["--model", "restoration-tiny"] if "GoPro" in words else []
    assert train_restoration.main([*words, *small, "--report_to", "none", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "every stage ran" in told
    measured = "--data" not in words or "--heldout" in words
    assert ("3 images to train on, 0 held-out" in told) == (not measured)
    assert ("(100.0%)" in told) == ("configs/restoration/denoise-color-emoji64.yaml" in words)


def shipped_commands():
    """Options of every configuration, and of the variants that the comments of one name."""
    for path in sorted((ROOT / "configs/restoration").glob("*.yaml")):
        yield pytest.param([], path, id=path.stem)
        for line in path.read_text().splitlines():
            if line.startswith("#   --"):
                words = shlex.split(line[1:])
                yield pytest.param(words, path, id=words[words.index("--output_dir") + 1])


@pytest.mark.parametrize(("words", "path"), list(shipped_commands()))
def test_shipped_configurations_are_valid(words, path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # paths of initial backbones are relative to it
    config = parse_config(RestorationConfig, ["--config", str(path), *words])
    with torch.device("meta") if config.backbone_from is None else contextlib.nullcontext():
        model = make_model(config)
    assert model.config.in_channels == config.channels
    assert ("(100.0%)" in capsys.readouterr().out) == (config.backbone_from is not None)
    if config.layout != "clean":  # pairs have no noise level
        assert model.config.sigma_conditioning is None
