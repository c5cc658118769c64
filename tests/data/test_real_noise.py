"""DND and SIDD's validation blocks, read from small copies in their own layouts."""

import h5py
import numpy as np
import pytest
from real_noise_copies import BOXES, SIDE, write_dnd, write_sidd_validation
from scipy.io import loadmat, savemat

from iptv2_diffusion.data.matlab_files import read_mat
from iptv2_diffusion.data.real_noise import DND, sidd_validation_blocks


def test_dnds_crops_are_the_boxes_of_its_photographs(tmp_path):
    images = write_dnd(tmp_path)
    data = DND(tmp_path)
    assert len(data) == 2
    for index, image in enumerate(images):
        for crop, (top, left) in zip(data.crops(index), BOXES - 1, strict=True):
            assert np.array_equal(crop, image[top : top + SIDE, left : left + SIDE])
        np.testing.assert_allclose(data.sigmas[index], 255 * (np.array([0.04, 0.05, 0.06]) + 0.01 * index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "info.mat").unlink(), r"info\.mat does not exist"),
        (lambda root: (root / "info.mat").write_bytes(b"MATLAB 5.0"), r"info\.mat is not in DND's format"),
        (lambda root: savemat(root / "info.mat", {"info": 1}), r"info\.mat is not in DND's format"),
        (lambda root: (root / "images_srgb/0002.mat").unlink(), r"0002\.mat does not exist"),
        (
            lambda root: h5py.File(root / "images_srgb/0002.mat", "w").close(),
            r"0002\.mat is not in DND's format: .*InoisySRGB",
        ),
    ],
)
def test_damaged_copies_of_dnd_are_named(tmp_path, damage, message):
    write_dnd(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        [crop for index in range(2) for crop in DND(tmp_path).crops(index)]


def test_a_box_outside_its_photograph_is_named(tmp_path):
    write_dnd(tmp_path)
    with h5py.File(tmp_path / "info.mat", "r+") as file:
        file["#refs#/b1"][2, 0] = 49  # the first box's bottom; the photograph has 48 rows
    with pytest.raises(ValueError, match=r"0002\.mat is 48x56 pixels; its box \(0, 0, 49, 32\) .* outside"):
        DND(tmp_path).crops(1)


def test_the_validation_blocks_of_sidd(tmp_path):
    noisy, clean = write_sidd_validation(tmp_path)
    found = list(sidd_validation_blocks(tmp_path))
    assert [name for name, _, _ in found] == [f"000{i}_0{j}" for i in (1, 2) for j in (1, 2, 3)]
    assert np.array_equal([degraded for _, degraded, _ in found], noisy.reshape(6, 32, 32, 3))
    assert np.array_equal([target for _, _, target in found], clean.reshape(6, 32, 32, 3))
    savemat(tmp_path / "ValidationGtBlocksSrgb.mat", {"ValidationGtBlocksSrgb": clean[:1]})
    with pytest.raises(ValueError, match=r"noisy blocks \(2, 3, 32, 32, 3\) of uint8, clean ones \(1, 3"):
        list(sidd_validation_blocks(tmp_path))
    whole = (tmp_path / "ValidationNoisyBlocksSrgb.mat").read_bytes()
    unknown_type = whole[:128] + b"\x63" + whole[129:]
    for damaged in (b"", b"no MATLAB file", b"PK\3\4", whole[:128], whole[:150], whole[:1000], unknown_type):
        (tmp_path / "ValidationGtBlocksSrgb.mat").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ValidationGtBlocksSrgb\.mat is not in SIDD's format"):
            list(sidd_validation_blocks(tmp_path))


@pytest.mark.parametrize("compressed", [False, True])
def test_numeric_arrays_are_read_as_by_scipy(tmp_path, compressed):
    random = np.random.default_rng(0)
    arrays = {
        f"{dtype}_{number}": (random.random(shape) * 100).astype(dtype)
        for dtype in ("f8", "f4", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
        for number, shape in enumerate([(2, 3, 4), (1, 1), (3, 1), (5, 7), (0, 3), (2, 1, 2, 1, 2)])
    }
    savemat(
        tmp_path / "x.mat", {"text": "hello", "cell": np.array([1, "a"], object), **arrays}, do_compression=compressed
    )
    expected = loadmat(tmp_path / "x.mat")
    for name in arrays:
        found = read_mat(tmp_path / "x.mat", name)
        assert found.dtype == expected[name].dtype.newbyteorder("=")
        assert np.array_equal(found, expected[name])
    for name in ("text", "cell", "absent"):
        with pytest.raises(ValueError, match=f"{name} is no array of real|no numeric array {name}"):
            read_mat(tmp_path / "x.mat", name)


@pytest.mark.parametrize("compressed", [False, True])
def test_any_damage_is_an_error_and_never_the_end_of_the_process(tmp_path, compressed):
    whole_array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    savemat(tmp_path / "x.mat", {"before": 1, "x": whole_array}, do_compression=compressed)
    whole, random = (tmp_path / "x.mat").read_bytes(), np.random.default_rng(0)
    told = []
    for number in range(3000):
        damaged = bytearray(whole)
        place = random.integers(120, len(whole))
        if number % 3 == 0:
            damaged = damaged[:place]
        elif number % 3 == 1:
            damaged[place] = random.integers(256)
        else:
            damaged[place : place + 4] = random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
        (tmp_path / "y.mat").write_bytes(damaged)
        try:
            assert read_mat(tmp_path / "y.mat", "x").ndim
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 1000
    assert not any("\n" in text for text in told)
