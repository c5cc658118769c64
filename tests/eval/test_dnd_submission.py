"""The files for DND's server: their names, keys, types and content, and resumption."""

import numpy as np
import pytest
import torch
from real_noise_copies import write_dnd
from scipy.io import loadmat, savemat, whosmat
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


def foreign_mat(path):
    savemat(path, {"x": 1})


def small_mat(path):
    savemat(path, {"Idenoised_crop": np.zeros((3, 3), np.float32)})


def flipped(path):
    whole = bytearray(path.read_bytes())
    whole[-200:-100] = bytes(100 * [0xFF])
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("0001_02.mat", lambda path: path.write_bytes(b""), r"0001_02\.mat is damaged \(it is no MATLAB file"),
        ("0001_02.mat", lambda path: path.write_bytes(b"mine" * 2000), r"0001_02\.mat is damaged"),
        ("0001_02.mat", flipped, r"0001_02\.mat is damaged \(it is cut short\); delete it"),
        ("0001_02.mat", foreign_mat, r"0001_02\.mat is damaged \(it has no numeric array Idenoised_crop\)"),
        ("0001_02.mat", small_mat, r"0001_02\.mat holds \(3, 3\) of float32, not \(32, 32, 3\) of float32; delete it"),
    ],
)
def test_foreign_and_damaged_files_are_one_line_and_are_kept(setting, name, change, told):
    """In a folder of a version without records, where every crop counts as made."""
    folder, words = setting
    script.main(words)
    (folder / "out/IPTV2_RECORD").unlink()
    change(folder / "out" / name)
    content = (folder / "out" / name).read_bytes()
    with pytest.raises(UserError, match=told) as caught:
        script.main(words)
    assert "\n" not in str(caught.value)
    assert (folder / "out" / name).read_bytes() == content


def test_a_bundle_of_somebody_else_is_kept(setting):
    folder, words = setting
    (folder / "out/bundled").mkdir(parents=True)
    (folder / "out/IPTV2_RECORD").write_text('{"kind": "a submission to DND"}\n')
    (folder / "out/bundled/0001.mat").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"bundled/0001\.mat was not made here; move it away"):
        script.main(words)
    assert (folder / "out/bundled/0001.mat").read_bytes() == b"mine"


def test_errors_are_one_line(setting):
    folder, words = setting
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"info\.mat does not exist"):
        script.main([*words, "--data", str(folder)])
    with pytest.raises(UserError, match="file"):
        script.main([*words, "--output", str(folder / "file/out")])
    with pytest.raises(UserError, match=r"cannot load .*absent: no such folder here"):
        script.main([*words, "--model", str(folder / "absent")])
    with pytest.raises(SystemExit):
        script.main([*words, "--num_threads", "-1"])
