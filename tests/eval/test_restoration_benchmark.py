"""The benchmark: the protocol's noise, the written files, images of a folder."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import noisy, photograph
from PIL import Image
from real_noise_copies import write_sidd_validation
from script_loading import load_script

from iptv2_diffusion import IPTV2RestorationPipeline, create_model
from iptv2_diffusion.data.degradations import MotionBlur, RainStreaks
from iptv2_diffusion.data.sixteen_bit import write_16_bit
from iptv2_diffusion.evaluation import peers, restoration_examples
from iptv2_diffusion.evaluation.pictures import side_by_side
from iptv2_diffusion.training.errors import UserError

ROOT = Path(__file__).parents[2]
benchmark = load_script("eval/restoration_benchmark.py")


@pytest.fixture
def setting(tmp_path):
    """A model that returns its input, two pictures, and the arguments that name them."""
    IPTV2RestorationPipeline(create_model("restoration-tiny").fuse()).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        array = np.random.default_rng(seed).integers(100, 156, (200, 210, 3), np.uint8)
        Image.fromarray(array).save(tmp_path / f"photos/{seed}.png")
    threads = torch.get_num_threads()
    words = ["--images", tmp_path / "photos", "--models", tmp_path / "model", "--output", tmp_path / "out"]
    yield tmp_path, [str(word) for word in words]
    torch.set_num_threads(threads)


def test_a_run_writes_what_the_definition_gives(setting, monkeypatch, capsys):
    folder, words = setting
    monkeypatch.setenv("TORCH_HOME", str(folder))
    assert benchmark.main([*words, "--levels", "10", "20"]) == 0
    rows = json.loads((folder / "out/results.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2  # levels, pictures, input and model
    for row in rows:
        clean = np.asarray(Image.open(folder / f"photos/{row['image']}.png"), np.float64)
        seed = 1000 * int(row["level"]) + int(row["image"])
        noisy = clean + np.random.default_rng(seed).normal(0, row["level"], clean.shape)
        error = ((noisy.clip(0, 255) - clean) ** 2).mean()
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)
    assert "LPIPS is skipped" in capsys.readouterr().out
    assert (folder / "out/0-noise20.png").is_file()
    table = (folder / "out/results.md").read_text()
    assert "RGB, border 0, clipped, not rounded" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + 4


def test_small_pictures_are_shown_whole(setting):
    clean = np.zeros((120, 100, 1))
    clean[60:] = 255
    sheet = np.asarray(side_by_side({"clean": clean}))[20:]
    assert (sheet[:120, :200] == 0).all()
    assert (sheet[120:240, :200] == 255).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--first", "0"], "--first is 0; it must be at least 1"),
        (["--levels", "-5"], r"--levels of noise is -5; each must be in \(0, 255\]"),
        (
            ["--degradation", "motion_blur", "--levels", "0"],
            r"motion_blur is 0; each must be in \(1, 100\]",
        ),
        (["--degradation", "motion_blur", "--levels", "100"], "motion_blur of 100 needs images of more than 2"),
    ],
)
def test_bad_options_are_named(setting, words, message):
    with pytest.raises(UserError, match=message):
        benchmark.main([*setting[1], *words])


def test_runs_and_pictures_of_one_last_name_stay_apart(setting):
    """Two folders called "pipeline", two images called "0.png"; a 16-bit copy gives the figures of its original."""
    folder, words = setting
    for run in ("a", "b"):
        shutil.copytree(folder / "model", folder / f"runs/{run}/pipeline")
    (folder / "photos/sub").mkdir()
    pixels = np.asarray(Image.open(folder / "photos/0.png"))
    write_16_bit(pixels.astype(np.uint16) * 257, folder / "photos/sub/0.png")
    models = [str(folder / f"runs/{run}/pipeline") for run in ("a", "b")]
    assert benchmark.main([*words, "--models", *models, "--levels", "10", "--lpips", "none"]) == 0
    rows = json.loads((folder / "out/results.json").read_text())["rows"]
    assert [(row["image"], row["method"]) for row in rows] == [
        (image, method) for image in ("0", "1", "sub/0") for method in ("input", "a", "b")
    ]
    assert (folder / "out/sub/0-noise10.png").is_file()
    images = benchmark.folder_photographs(folder / "photos")
    assert np.array_equal(images["sub/0"], images["0"])
    assert all(28 < row["psnr"] < 28.3 for row in rows)  # 28.13 dB is σ 10

    with pytest.raises(benchmark.UserError, match=r"runs/a/pipeline and .*b/a would both be 'a' in the results"):
        benchmark.main([*words, "--models", models[0], str(folder / "b/a")])


@pytest.mark.parametrize(("kind", "level"), [("motion_blur", 9), ("rain", 0.01)])
def test_a_degradation_is_that_of_training_and_leaves_its_border_out(kind, level):
    clean = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    degraded, inner = restoration_examples.degrade(clean, kind, level, index=3)
    kernel = {"motion_blur": MotionBlur, "rain": RainStreaks}[kind](level, level)
    margin = kernel.margin
    assert degraded.shape == inner.shape == (60 - 2 * margin, 70 - 2 * margin, 3)
    assert np.array_equal(inner, clean[margin : 60 - margin, margin : 70 - margin])
    assert np.array_equal(degraded, degraded.round())
    image = torch.from_numpy(clean / np.float32(255)).permute(2, 0, 1)[None]
    expected, _ = kernel(image, torch.Generator().manual_seed(int(1000 * level) + 3))
    assert np.abs(degraded / 255 - expected[0].permute(1, 2, 0).numpy()).max() < 0.6 / 255
    again, _ = restoration_examples.degrade(clean, kind, level, index=3)
    other, _ = restoration_examples.degrade(clean, kind, level, index=4)
    assert np.array_equal(degraded, again)
    assert not np.array_equal(degraded, other)


def test_a_data_set_is_measured_pair_by_pair(setting):
    """Compared with the definition on a copy of Rain100H: no noise, no level, and only luma counts."""
    folder, words = setting
    for number in range(1, 4):
        for kind, image in (("target", photograph(number)), ("input", noisy(photograph(number), 20, number))):
            path = folder / f"Rain/test/Rain100H/{kind}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    words = [*words[2:], "--layout", "rain100h", "--data", str(folder / "Rain"), "--channels", "y"]
    assert benchmark.main(words) == 0
    described = json.loads((folder / "out/results.json").read_text())
    assert described["degradation"] == "rain100h"
    assert len(described["rows"]) == 3 * 2
    weights = np.array([65.481, 128.553, 24.966]) / 255
    for row in described["rows"]:
        number = int(row["image"].rsplit("/", 1)[1])
        assert row["image"] == f"test/Rain100H/input/{number}"
        error = (noisy(photograph(number), 20, number).astype(float) - photograph(number)) @ weights
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / (error**2).mean()), abs=1e-4)
    assert len(list((folder / "out/test/Rain100H/input").glob("*-rain100h.png"))) == 3
    assert "| rain100h | model |" in (folder / "out/results.md").read_text()

    Image.fromarray(photograph(2, 40, 48)).save(folder / "Rain/test/Rain100H/target/2.png")
    with pytest.raises(benchmark.UserError, match=r"input/2\.png is 40x56 pixels but .*target/2\.png is 40x48"):
        benchmark.main(words)


def test_the_validation_blocks_of_sidd_are_measured(setting):
    folder, words = setting
    degraded, clean = write_sidd_validation(folder / "SIDD")
    words = [*words[2:], "--layout", "sidd_validation", "--data", str(folder / "SIDD"), "--first", "4"]
    assert benchmark.main(words) == 0
    rows = json.loads((folder / "out/results.json").read_text())["rows"]
    assert [row["image"] for row in rows if row["method"] == "model"] == ["0001_01", "0001_02", "0001_03", "0002_01"]
    error = ((degraded[1, 0].astype(float) - clean[1, 0]) ** 2).mean()
    assert rows[-1]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)


def test_gray_photographs_and_estimated_noise(setting):
    """A gray model that takes σ receives the noise level, or estimates it."""
    folder, words = setting
    torch.manual_seed(0)
    model = create_model("restoration-tiny", in_channels=1, sigma_conditioning="map")
    torch.nn.init.normal_(model.head.weight, std=0.02)
    IPTV2RestorationPipeline(model.fuse()).save_pretrained(folder / "gray")
    words = [*words, "--models", str(folder / "gray"), "--gray", "--peers", "nlm", "--levels", "20"]
    assert benchmark.main(words) == 0
    told = json.loads((folder / "out/results.json").read_text())["rows"]
    assert benchmark.main([*words, "--estimate_sigma"]) == 0
    estimated = json.loads((folder / "out/results.json").read_text())["rows"]
    assert [row["method"] for row in told] == 2 * ["input", "gray", "nlm"]
    for a, b in zip(told, estimated, strict=True):
        assert (a["psnr"] == b["psnr"]) == (a["method"] != "gray")
    photo = Image.open(folder / "photos/1.png").convert("L")
    clean = np.asarray(photo, np.float64)[..., None]
    error = np.random.default_rng(20_001).normal(0, 20, clean.shape)
    expected = 10 * np.log10(255**2 / (((clean + error).clip(0, 255) - clean) ** 2).mean())
    assert told[3]["psnr"] == pytest.approx(expected, abs=1e-4)


# DATA.md §4: PSNR on chelsea (the second photograph) at σ 25
PEERS = {"nlm": 30.43, "ffdnet": 32.97, "bm3d": 32.61}


@pytest.mark.parametrize("name", ["nlm", "ffdnet", pytest.param("bm3d", marks=pytest.mark.slow)])
def test_peers_reach_what_was_measured_before(name):
    if importlib.util.find_spec(peers.PEERS[name][0]) is None:
        with pytest.raises(ModuleNotFoundError, match=f"{name} needs the package"):
            peers.peer(name)
        return
    degraded, clean = restoration_examples.degrade(benchmark.test_photographs()["chelsea"], "noise", 25, 1)
    error = ((peers.peer(name)(degraded, 25).clip(0, 255) - clean) ** 2).mean()
    assert 10 * np.log10(255**2 / error) == pytest.approx(PEERS[name], abs=0.011)


def test_ffdnet_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in peers.FFDNet().parameters()) == 852_108


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "absent"], "absent is not a folder"),
        (["--models", "absent"], "cannot load absent: no such folder here"),
        (["--degradation", "rain", "--peers", "nlm"], "--peers nlm needs noise of a known level"),
        (["--gray", "--peers", "ffdnet"], "the weights of ffdnet are for colour"),
        (["--layout", "gopro"], "give both or none"),
        (["--layout", "gopro", "--data", "absent"], "gopro has its own images"),
    ],
)
def test_errors_are_one_line(setting, words, message):
    with pytest.raises(benchmark.UserError, match=message):
        benchmark.main([*setting[1], *words])


def test_a_set_by_name_with_a_blind_peer_and_published_figures(tmp_path, capsys):
    for i in range(2):
        clean = photograph(i)
        for folder, image in (("target", clean), ("input", clean // 2)):
            (tmp_path / "sets/Rain100L" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / f"sets/Rain100L/{folder}/{i}.png")
    weights = tmp_path / "prenet.pth"
    torch.save(peers.PReNet(iterations=6, width=32).state_dict(), weights)
    words = ["--set", "Rain100L", "--root", str(tmp_path / "sets"), "--output", str(tmp_path / "out"), "--no_memory"]
    assert benchmark.main([*words, "--peer_weights", f"prenet={weights}"]) == 0
    text = (tmp_path / "out/results.md").read_text()
    assert "Y, border 0, clipped, rounded to 8 bits" in text
    assert "| Rain100L | PReNet (published) |" in text
    assert "37.48" in text
    assert "MB/MP" not in text
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"input", "prenet"}
    with pytest.raises(UserError, match="does not hold the weights of DnCNN"):
        benchmark.main([*words, "--peer_weights", f"dncnn={weights}"])
    with pytest.raises(UserError, match="is not NAME=FILE with a name from dncnn, prenet"):
        benchmark.main([*words, "--peer_weights", "restormer=x"])
    with pytest.raises(UserError, match="has its own images"):
        benchmark.main([*words, "--images", str(tmp_path)])


def test_gray_jpeg_of_a_named_set(tmp_path):
    (tmp_path / "classic5").mkdir()
    Image.fromarray(photograph(1, 48, 64)).save(tmp_path / "classic5/a.png")
    words = ["--set", "classic5", "--root", str(tmp_path), "--output", str(tmp_path / "out"), "--no_memory"]
    assert benchmark.main(words) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    figures = [row["psnr"] for row in rows]
    assert [row["level"] for row in rows] == [10, 20, 30, 40]
    assert figures == sorted(figures)  # higher quality, higher PSNR
    assert figures[0] > 15
