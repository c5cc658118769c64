"""train_ldm.py end to end: real `accelerate launch` if processes matter, and `main()` for the rest."""

import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from ldm_runs import CHANNELS, ROOT, SCRIPT, SIZE, STEPS, TIMEOUT, environment, log, newest, tensors, words
from PIL import Image
from safetensors.torch import load_file
from script_loading import load_script

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.data.images import load_image_dataset
from iptv2_diffusion.data.own_folder import RECORD
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import UserError
from iptv2_diffusion.training.parsing import parse_config

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "vae" not in path.name)
SMALL_DIT = '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}'
SMALL = {"iptv2": ["--model", "tiny"], "dit": ["--model", "dit-s-2", "--model_overrides", SMALL_DIT]}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def main(script, ground, monkeypatch):
    """Run `main` here, on the CPU, with the configuration of `ground`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)

    def run(output, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return script.main(words(ground, output, *options))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --------------------------------------------------------------------------------------------------------------------
# The documented command


def test_the_documented_command_leaves_everything_promised(reference):
    for name in ("samples.png", "loss_curve.png", "metrics.jsonl", "config.yaml", "pipeline/model_index.json"):
        assert (reference / name).is_file(), name
    assert [p.name for p in sorted(reference.glob("checkpoint-*"))] == ["checkpoint-00000020", "checkpoint-00000030"]
    rows = log(reference)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert len(heldout) == 3
    assert heldout[-1] < heldout[0]
    assert not list(reference.glob(".tmp-*"))


def test_the_saved_pipeline_holds_the_averaged_weights_and_class_names(reference):
    pipeline = IPTV2Pipeline.from_pretrained(reference / "pipeline")
    assert list(pipeline.labels) == ["bird", "fish", "moth"]
    average = load_file(newest(reference) / "ema.safetensors")
    state = pipeline.transformer.state_dict()
    assert all(torch.equal(state[name], average[name]) for name in average)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("moth", num_inference_steps=2).images[0].size == (SIZE, SIZE)


def test_a_user_error_is_one_line_and_a_failing_exit_code(ground):
    command = [sys.executable, str(SCRIPT), "--batchsize", "3"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 1
    assert (
        result.stderr
        == "error: unknown option 'batchsize' on the command line; did you mean batch_size or encode_batch_size?\n"
    )


# --------------------------------------------------------------------------------------------------------------------
# Data, models, objectives


def test_a_flat_folder_without_labels_trains_unconditionally(main, ground, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (ground / "images").rglob("*.png"):
        shutil.copy(path, flat)
    assert main(tmp_path / "run", "--data", flat, "--max_train_steps", 2, "--objective", "flow") == 0
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.num_classes is None
    assert pipeline.transformer.config.num_class_embeds is None
    assert Image.open(tmp_path / "run" / "samples.png").height > 0


def test_on_the_fly_encoding_gives_the_cached_losses(main, tmp_path):
    main(tmp_path / "cached", "--max_train_steps", 3, "--cache_dtype", "float32", "--eval_every", 0)
    main(tmp_path / "fly", "--max_train_steps", 3, "--cache_latents", "false", "--eval_every", 0)
    for left, right in zip(log(tmp_path / "fly"), log(tmp_path / "cached"), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def streamed(ground, tmp_path, *options):
    """Options of a run on the images of `ground` in parquet shards, which are also the held-out images."""
    if not (tmp_path / "shards").exists():
        (tmp_path / "shards").mkdir()
        data = load_image_dataset(ground / "images").cast_column("image", datasets.Image()).shuffle(seed=1)
        for n in range(4):
            data.shard(4, n).to_parquet(tmp_path / "shards" / f"{n}.parquet")
    run = ("--streaming", "--data", tmp_path / "shards/*.parquet", "--heldout_split", "train", "--eval_every", 4)
    return (*run, "--lr_schedule", "constant", "--checkpoint_every", 4, "--shuffle_block", 8, *options)


def test_a_streamed_run_resumes_bit_for_bit(main, ground, tmp_path, capsys):
    """Eleven steps of eight: nearly four epochs of 24 pictures; stopped at a checkpoint and in between."""
    main(tmp_path / "whole", *streamed(ground, tmp_path, "--max_train_steps", 11))
    assert "a stream of images to train on, 3 classes" in capsys.readouterr().out
    for stop in (6, 8, 11):
        main(tmp_path / "parts", *streamed(ground, tmp_path, "--max_train_steps", stop, "--num_workers", 2))
    assert capsys.readouterr().out.count("resumed from") == 2
    whole, parts = (tensors(tmp_path / name) for name in ("whole", "parts"))
    for left, right in zip(whole, parts, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    steps = [[row for row in log(tmp_path / name) if "loss" in row] for name in ("whole", "parts")]
    assert steps[0] == steps[1]
    assert all(np.isfinite(row["heldout_loss"]) for row in log(tmp_path / "whole") if "heldout_loss" in row)


def test_a_corrupt_image_is_left_out_or_fails_by_name(main, ground, tmp_path, capsys):
    images = shutil.copytree(ground / "images", tmp_path / "images")
    bad = images / "fish" / "fish-3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    options = ("--data", images, "--max_train_steps", 1, "--heldout_fraction", 0, "--kid_samples", 0)
    with pytest.raises(UserError, match=r"fish-3\.png: cannot be read"):
        main(tmp_path / "strict", *options, "--strict")
    assert main(tmp_path / "run", *options) == 0
    text = capsys.readouterr().out
    assert "left out 1 of 24 images" in text
    assert "23 images to train on" in text


def test_a_dit_trains_with_the_same_script_and_learned_variance(main, tmp_path):
    options = (*SMALL["dit"], "--learned_variance", "--max_train_steps", 2)
    assert main(tmp_path, *options, "--save_dtype", "float16") == 0
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.transformer.config.out_channels == 2 * CHANNELS
    assert pipeline.scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize("objective", ["v_prediction", "epsilon"])
def test_objectives_options_and_half_precision(main, tmp_path, objective):
    options = ("--objective", objective, "--min_snr_gamma", 5, "--timestep_sampling", "logit_normal")
    more = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--channels_last", "false")
    assert main(tmp_path, *options, *more, "--max_train_steps", 2, "--save_dtype", "bfloat16") == 0
    assert load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert np.isfinite(log(tmp_path)[-1]["heldout_loss"])


@pytest.mark.slow
def test_compiled_training_gives_a_pipeline_of_the_usual_names(main, tmp_path):
    assert main(tmp_path, "--torch_compile", "--max_train_steps", 2) == 0
    assert IPTV2Pipeline.from_pretrained(tmp_path / "pipeline").transformer.config.channels > 0


def test_sizes_need_not_be_square(main, tmp_path):
    assert main(tmp_path, "--resolution", "24,40", "--max_train_steps", 1) == 0
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "pipeline")
    assert tuple(pipeline.transformer.config.sample_size) == (6, 10)


def test_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(main, tmp_path):
    """With an extreme learning rate and no clipping, the loss overflows within a few steps."""
    options = ("--learning_rate", 1e30, "--max_grad_norm", 0, "--lr_warmup_steps", 0, "--checkpoint_every", 1)
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d+: stopped .*checkpoint-\d+ is kept"):
        main(tmp_path, *options, "--eval_every", 0)
    assert all(torch.isfinite(value).all() for value in load_file(newest(tmp_path) / "model.safetensors").values())


def test_a_truncated_checkpoint_falls_back_and_another_configuration_is_refused(main, tmp_path, capsys):
    main(tmp_path, "--max_train_steps", 4, "--checkpoint_every", 2, "--lr_schedule", "constant")
    weights = tmp_path / "checkpoint-00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"learning_rate is 0\.001 there, 0\.01 here"):
        main(tmp_path, "--learning_rate", 0.01, "--lr_schedule", "constant")
    main(tmp_path, "--max_train_steps", 4, "--checkpoint_every", 2, "--lr_schedule", "constant")
    text = capsys.readouterr().out
    assert "checkpoint-00000004 is damaged" in text
    assert "resumed from" in text
    assert (tmp_path / "damaged-checkpoint-00000004").is_dir()
    assert newest(tmp_path).name == "checkpoint-00000004"


def test_alignment_trains_resumes_and_leaves_the_pipeline_as_it_is(main, tmp_path):
    options = ("--align_target", "colours:Colours", "--align_hidden", 8, "--lr_schedule", "constant", "--ema", "power")
    main(tmp_path / "whole", *options, "--max_train_steps", 4)
    for stop in (2, 4):
        main(tmp_path / "parts", *options, "--max_train_steps", stop)
    whole, parts = (tensors(tmp_path / name) for name in ("whole", "parts"))
    assert "alignment.projection.0.weight" in whole[0]
    assert all(torch.equal(whole[0][name], parts[0][name]) for name in whole[0])
    main(tmp_path / "off", "--lr_schedule", "constant", "--ema", "power", "--max_train_steps", 4)
    losses = [next(row["loss"] for row in log(tmp_path / name)) for name in ("whole", "off")]
    assert (
        0 < abs(losses[0] - losses[1]) <= 0.5
    )  # equal weights: the difference is the alignment loss, 0.5 times a cosine
    keys = [load_file(tmp_path / name / "pipeline" / WEIGHTS).keys() for name in ("whole", "off")]
    assert keys[0] == keys[1]
    assert load_script("eval/reconstruct_ema.py").main(["--run", str(tmp_path / "whole")]) == 0


def test_averages_of_any_length_are_made_after_training(main, tmp_path, capsys):
    power = ("--ema", "power", "--ema_snapshot_every", 2, "--eval_every", 0)
    main(tmp_path, "--max_train_steps", 8, *power)
    reconstruct_ema = load_script("eval/reconstruct_ema.py")
    own = load_file(tmp_path / "pipeline" / WEIGHTS)
    assert reconstruct_ema.main(["--run", str(tmp_path), "--sigma_rel", "0.05"]) == 0
    again = load_file(tmp_path / "pipeline-0.05" / WEIGHTS)  # the run's own length: the run's own weights
    assert all(torch.allclose(again[key], own[key], atol=1e-5) for key in own)
    assert (
        reconstruct_ema.main(["--run", str(tmp_path), "--sigma_rel", "0.2", "--output_dir", str(tmp_path / "o")]) == 0
    )
    assert '"snapshots": 8' in capsys.readouterr().out
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "o")
    longer = pipeline.transformer.state_dict()
    assert any(not torch.allclose(longer[key], own[key], atol=1e-5) for key in own)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("moth", num_inference_steps=2).images[0].size == (SIZE, SIZE)
    with pytest.raises(UserError, match="has no pipeline"):
        reconstruct_ema.main(["--run", str(tmp_path / "ema")])


# --------------------------------------------------------------------------------------------------------------------
# Dry runs, bad input


def test_a_dry_run_runs_every_stage_and_touches_nothing_else(main, tmp_path, capsys):
    assert main(tmp_path / "run", "--dry_run") == 0
    assert "every stage ran" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {RECORD, "dry_run"}  # the record says that it is ours
    made = tmp_path / "run" / "dry_run"
    for name in ("samples.png", "loss_curve.png", "pipeline", "previews/step-00000001.png", "checkpoint-00000002"):
        assert (made / name).exists(), name


def dry_run_of(config, ground, output, small_model):
    options = ["--config", str(config), "--data", str(ground / "images"), "--vae", str(ground / "vae"), "--dry_run"]
    options += ["--cache_dir", str(ground / "cache"), "--output_dir", str(output), "--resolution", str(SIZE)]
    options += ["--batch_size", "4", "--num_threads", "1", "--num_workers", "0", "--mixed_precision", "no"]
    return [*options, "--heldout_split", "none", "--vae_subfolder", "none", *small_model]


FAST = {("emoji64", "iptv2"), ("imagenet256", "dit")}
DRY_RUNS = [
    pytest.param(path, model, marks=() if (path.stem, model) in FAST else pytest.mark.slow, id=f"{path.stem}-{model}")
    for path in CONFIGS
    for model in (("iptv2", "dit") if path.stem.startswith("imagenet") else ("iptv2",))
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_understood(script, config):
    parsed = parse_config(LDMConfig, ["--config", str(config)])
    from iptv2_diffusion.models.presets import PRESETS, find_weights

    assert parsed.model in PRESETS or find_weights(parsed.model)


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("model", ["iptv2-s", "dit-xl-2"])
def test_imagenet_is_trained_by_the_recipe_of_dit_for_any_model(script, size, model):
    """docs/model.md, section 8; `--model` changes nothing else."""
    words = ["--config", str(ROOT / f"configs/imagenet{size}.yaml"), "--model", model]
    config = parse_config(LDMConfig, words)
    assert (config.model, config.resolution, config.num_classes) == (model, size, 1000)
    assert (config.learning_rate, config.lr_schedule, config.weight_decay, config.batch_size) == (
        1e-4,
        "constant",
        0,
        256,
    )
    assert (config.ema, config.ema_decay, config.label_dropout, config.random_flip) == ("constant", 0.9999, 0.1, True)
    assert (config.objective, config.learned_variance, config.timestep_sampling) == ("epsilon", True, "uniform")
    assert (config.stratified_timesteps, config.sample_steps) == (False, 250)
    assert config.vae == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize(("config", "model"), DRY_RUNS)
def test_a_dry_run_of_every_shipped_configuration(script, main, ground, tmp_path, config, model):
    assert script.main(dry_run_of(config, ground, tmp_path, SMALL[model])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--data", "EMPTY"], "holds neither images"),
        (["--train_split", "test"], 'no split "test"'),
        (["--image_column", "picture"], 'no image column "picture"; the columns are: image, label'),
        (["--vae", "/no/such/vae"], "/no/such/vae"),
        (["--resolution", 30], "height 30 is not a multiple of the VAE's 4; use 28 or 32"),
        (["--model", "iptv2-z"], "iptv2-s"),
        (["--model_overrides", '{"chanels": 8}'], "channels"),
        (["--model_overrides", '{"in_channels": 3}'], "the model takes 3 channels, but the VAE .* gives 4"),
        (["--data", "FLAT", "--num_classes", 3], "num_classes is 3, but no labels were found in"),
        (["--resolution", 0], "resolution is 0; it must be at least 1"),
        (["--preview_per_class", 0], "preview_per_class is 0; it must be at least 1"),
        (["--heldout_samples", 0], "heldout_samples is 0; it must be at least 1"),
        (["--num_classes", 2], "num_classes is 2, but the data has labels up to 2; use 3 or more"),
        (["--model", "dit-s-2", "--resolution", 36], "latents of 9 x 9 do not divide into this DiT's patches of 2"),
        (["--model_overrides", '{"out_channels": 5}'], "the model returns 5 channels for latents of 4"),
        (["--model_overrides", '{"num_class_embeds": 2}'], "the model has 2 classes, but the data has 3; set"),
        (["--model_overrides", '{"patch_size": 0}'], "patch_size is 0; it must be at least 1"),
        (["--seed", 2**32], r"seed is 4294967296; it must be in \[0, 4294967295\]"),
        (
            ["--objective", "flow", "--learned_variance"],
            "learned_variance does not .* use epsilon or v_pred",
        ),
        (["--label_dropout", 1], r"label_dropout is 1.0; it must be in \[0, 1\)"),
        (["--class_balance", 1.5], r"class_balance is 1.5; it must be in \[0, 1\]"),
        (
            ["--class_balance", 0.5, "--streaming", "true"],
            "is 0.5, but the labels of a stream are not known",
        ),
        (["--kid_every", 15], "kid_every is 15, not a multiple of eval_every 10; use 20"),
        (["--kid_every", 0], "kid_every is 0; it must be at least 1"),
        (["--heldout_fraction", 0.05], "kid_samples needs 2 held-out images or more, not 1"),
        (["--kid_extractor", "vgg"], "extractor is 'vgg'; use inception"),
        (["--heldout_fraction", 0], "kid_samples needs held-out images"),
        (["--report_to", "paper"], "report_to is 'paper'; choose"),
        (["--batch_size", 8, "--gradient_accumulation_steps", 3], "does not divide over"),
    ],
)
def test_bad_input_is_one_line_with_numbers_and_remedy(main, ground, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    folders = {"EMPTY": tmp_path / "empty", "FLAT": ground / "images" / "bird"}
    options = [folders.get(word, word) for word in options]
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", *options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_vae_that_decodes_to_nan_gives_white_images_and_the_run_continues(main, ground, tmp_path, capsys):
    """Encoding works, and so does the loss. Previews, KID and the grid name the images, and none is black."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ground / "vae")
    torch.nn.init.constant_(vae.decoder.conv_out.weight, float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    few = ("--max_train_steps", 3, "--preview_every", 2, "--eval_every", 2, "--kid_samples", 8, "--kid_every", 2)
    assert main(tmp_path / "run", "--vae", tmp_path / "vae", *few) == 0
    text = capsys.readouterr().out
    for told in (
        "step-00000002.png, row 1: images 1, 2 of 2",
        "samples.png, row 3: images 1, 2 of 2",
        "KID: images 1, 2",
    ):
        assert told in text
    assert text.count("the model returns NaN or infinity in float32") >= 3
    assert all(np.isfinite(row.get("kid", 0.0)) for row in log(tmp_path / "run"))
    for name in ("samples.png", "previews/step-00000002.png"):
        sheet = np.asarray(Image.open(tmp_path / "run" / name).convert("L"))
        assert sheet.mean() > 200, name  # white, with the names of the classes
