"""Runs over published latents, in the layout of fast-DiT and U-DiT: neither images nor encoding."""

import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from ldm_runs import ROOT, SCRIPT, finish, launch, log, tensors, words
from script_loading import load_script

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.imagenet_classes import imagenet_id2label
from iptv2_diffusion.training.errors import UserError

COUNT, SHAPE = 24, (1, 4, 8, 8)
RUN = ("--max_train_steps", 4, "--eval_every", 2, "--kid_samples", 0, "--lr_schedule", "constant")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """`imagenet_feature/` with 24 latents of 3 classes, and the same as a tar."""
    folder = tmp_path_factory.mktemp("published") / "imagenet_feature"
    random = np.random.default_rng(0)
    for part in ("features", "labels"):
        (folder / f"flowers_{part}").mkdir(parents=True)
    for i in range(COUNT):
        np.save(folder / "flowers_features" / f"{i // 8}_{i % 8}.npy", random.standard_normal(SHAPE).astype("f4"))
        np.save(folder / "flowers_labels" / f"{i // 8}_{i % 8}.npy", np.array([i % 3]))
    shutil.make_archive(str(folder), "tar", folder.parent, folder.name)
    return folder


@pytest.fixture
def main(ground, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)
    script = load_script(SCRIPT)

    def run(output, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return script.main(words(ground, output, *RUN, *options))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same_run(one, other):
    assert log(one) == log(other)
    for left, right in zip(tensors(one), tensors(other), strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_folder_and_a_resumed_run_of_the_tar_train_the_same(main, features, tmp_path, capsys):
    assert main(tmp_path / "folder", "--data", features) == 0
    assert "18 images to train on, 3 classes" in capsys.readouterr().out  # a quarter is held out
    assert [row["step"] for row in log(tmp_path / "folder") if "heldout_loss" in row] == [2, 4]
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "folder" / "pipeline")
    assert list(pipeline.labels) == ["0", "1", "2"]
    tar = ("--data", f"{features}.tar", "--num_workers", 2)
    main(tmp_path / "parts", *tar, "--max_train_steps", 2)
    main(tmp_path / "parts", *tar)
    assert "resumed from" in capsys.readouterr().out
    assert_same_run(tmp_path / "folder", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(main, ground, features, tmp_path):
    main(tmp_path / "one", "--data", features)
    finish(launch(ground, tmp_path / "two", *RUN, "--data", features, processes=2))
    for left, right in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_features_of_imagenet_have_its_classes(main, features, tmp_path):
    folder = tmp_path / "imagenet_feature"
    for part in ("features", "labels"):
        shutil.copytree(features / f"flowers_{part}", folder / f"imagenet256_{part}")
    assert main(tmp_path / "run", "--data", folder, "--dry_run") == 0
    pipeline = IPTV2Pipeline.from_pretrained(tmp_path / "run" / "dry_run" / "pipeline")
    assert pipeline.id2label == imagenet_id2label()


def test_a_run_without_labels(main, features, tmp_path):
    assert main(tmp_path / "run", "--data", features, "--label_column", "ignore", "--max_train_steps", 1) == 0
    assert IPTV2Pipeline.from_pretrained(tmp_path / "run" / "pipeline").num_classes is None


def rescaled(features, folder, change):
    shutil.copytree(features, folder)
    for path in (folder / "flowers_features").iterdir():
        np.save(path, change(np.load(path)))
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--resolution", 64), r"latents of 4x8x8, but the VAE .* gives 4x16x16 at 64x64 pixels; set --resolution 32"),
        (("--heldout_split", "val"), r"heldout_split is val, but .* contains latents: .*; set heldout_split to none"),
        (("--streaming", "true", "--heldout_split", "val"), r"streaming is True, .*; set streaming to false"),
        (("--kid_samples", 8), r"kid_samples is 8, .* no pixels; set kid_samples to 0"),
        (("--num_classes", 2), r"num_classes is 2, but the data has labels up to 2; use 3 or more"),
    ],
)
def test_options_that_do_not_fit_are_reported_in_one_line(main, features, tmp_path, options, told):
    with pytest.raises(UserError, match=told) as caught:
        main(tmp_path / "run", "--data", features, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: 5 * x, r"a standard deviation of 4\.\d+, but a denoiser needs about 1; .* scaling_factor 1\.0"),
        (lambda x: 0 * x, r"a standard deviation of 0, but"),
        (lambda x: np.concatenate([x, x], axis=1), r"latents of 8x8x8, .* gives 4x8x8 .*; set --vae to the VAE that"),
    ],
    ids=["unscaled", "constant", "channels"],
)
def test_latents_of_another_vae_are_reported_in_one_line(main, features, tmp_path, change, told):
    with pytest.raises(UserError, match=told) as caught:
        main(tmp_path / "run", "--data", rescaled(features, tmp_path / "changed", change))
    assert "\n" not in str(caught.value)


def test_damage_found_while_training_is_one_line(main, features, tmp_path):
    folder = rescaled(features, tmp_path / "changed", lambda x: x)
    np.save(folder / "flowers_features" / "1_1.npy", np.full(SHAPE, np.inf, "f4"))
    with pytest.raises(UserError, match=r"1_1\.npy: the latent is NaN or infinite") as caught:
        main(tmp_path / "run", "--data", folder)
    assert "\n" not in str(caught.value)
