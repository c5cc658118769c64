"""The files for DND's server: their names, keys, types and content, and resumption."""

import numpy as np
import pytest
import torch
from real_noise_copies import write_dnd
from scipy.io import loadmat, whosmat
from script_loading import load_script

from iptv2_diffusion import IPTV2RestorationPipeline, create_model
from iptv2_diffusion.data.real_noise import DND
from iptv2_diffusion.training.errors import UserError

script = load_script("eval/dnd_submission.py")


@pytest.fixture
def setting(tmp_path):
    """A copy of DND, a model that takes σ, and the arguments that name them."""
    write_dnd(tmp_path / "dnd_2017")
    torch.manual_seed(0)
    model = create_model("restoration-tiny", sigma_conditioning="map")
    torch.nn.init.normal_(model.head.weight, std=0.02)
    IPTV2RestorationPipeline(model.fuse()).save_pretrained(tmp_path / "model")
    words = ["--data", tmp_path / "dnd_2017", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    return tmp_path, [str(word) for word in words]


@pytest.mark.parametrize("sigma", ["given", "estimated"])
def test_the_submission_is_the_model_on_every_crop_in_dnds_own_form(setting, sigma):
    folder, words = setting
    assert script.main([*words, "--sigma", sigma]) == 0
    data, pipe = DND(folder / "dnd_2017"), IPTV2RestorationPipeline.from_pretrained(folder / "model")
    assert {p.name for p in (folder / "out/bundled").iterdir()} == {"0001.mat", "0002.mat"}
    for index in range(2):
        path = folder / f"out/bundled/{index + 1:04d}.mat"
        assert sorted(whosmat(path)) == [
            ("Idenoised", (1, 3), "cell"), ("eval_version", (1,), "char"), ("israw", (1, 1), "logical")
        ]  # fmt: skip
        bundle = loadmat(path)
        assert bundle["eval_version"] == ["1.0"]
        assert bundle["israw"].item() == 0
        for crop, pixels in enumerate(data.crops(index)):
            level = data.sigmas[index][crop] if sigma == "given" else None
            expected = pipe(pixels, sigma=level, output_type="np").images[0]
            single = loadmat(folder / f"out/{index + 1:04d}_{crop + 1:02d}.mat")["Idenoised_crop"]
            assert single.dtype == np.float32
            assert single.shape == (32, 32, 3)
            assert np.array_equal(single, expected)
            assert np.array_equal(bundle["Idenoised"][0, crop], expected)
            assert np.abs(expected - pixels).max() > 1e-3  # the model does something


def test_the_same_command_resumes(setting, capsys):
    folder, words = setting
    assert script.main(words) == 0
    times = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*.mat")}
    assert len(times) == 6
    lost = folder / "out/0002_03.mat"
    content = loadmat(lost)["Idenoised_crop"]
    lost.unlink()
    capsys.readouterr()
    assert script.main(words) == 0
    assert "[2/2] 1 crops" in capsys.readouterr().out
    assert np.array_equal(loadmat(lost)["Idenoised_crop"], content)
    assert all(p.stat().st_mtime_ns == time for p, time in times.items() if p != lost)


def test_errors_are_one_line(setting):
    folder, words = setting
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"info\.mat does not exist"):
        script.main([*words, "--data", str(folder)])
    with pytest.raises(UserError, match="file"):
        script.main([*words, "--output", str(folder / "file/out")])
