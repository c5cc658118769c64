"""evaluation/reference_images.py: the reference images, and the source of their statistics."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from iptv2_diffusion.data.image_tensors import center_crop
from iptv2_diffusion.evaluation.reference_images import ReferenceImages


def test_images_of_a_folder_are_cropped_to_whole_grey_levels(tmp_path):
    random, expected = np.random.default_rng(0), []
    for index in range(5):
        picture = Image.fromarray(random.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{index}.png")
        expected.append(np.asarray(center_crop(picture, (16, 16))))
    reference = ReferenceImages(str(tmp_path), size=16)
    found = torch.cat(list(reference.batches(2))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(expected))
    assert (reference.count, reference.stored, reference.preparation) == (5, {}, "ADM centre crop to 16")
    pixels = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2).contiguous().numpy()
    assert reference.sha256() == hashlib.sha256(pixels.tobytes()).hexdigest()


def test_npz_of_adm_has_images_and_statistics(tmp_path):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)
    stored = {"mu": random.normal(size=4), "sigma": np.eye(4), "mu_s": random.normal(size=3), "sigma_s": 2 * np.eye(3)}
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(7), **stored)
    reference = ReferenceImages(str(path))
    assert np.array_equal(torch.cat(list(reference.batches(3))).permute(0, 2, 3, 1).numpy(), images)
    assert torch.equal(reference.stored["pool"].mean, torch.from_numpy(stored["mu"]))
    assert torch.equal(reference.stored["spatial"].covariance, torch.from_numpy(stored["sigma_s"]))
    assert reference.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    np.savez(path, arr_0=images)
    assert ReferenceImages(str(path)).stored == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mu": np.zeros(3)}, "holds mu, but no images"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8 \(2, 3, 8, 8\), not uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is float64"),
    ],
)
def test_npz_without_8_bit_images_is_refused(tmp_path, content, message):
    np.savez(tmp_path / "other.npz", **content)
    with pytest.raises(ValueError, match=message):
        ReferenceImages(str(tmp_path / "other.npz"))


def test_truncated_npz_is_refused(tmp_path):
    path = tmp_path / "half.npz"
    np.savez(path, arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"half\.npz is damaged.*; download it again"):
        ReferenceImages(str(path))


def test_npz_with_a_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "flipped.npz"
    np.savez(path, arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[20000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz is damaged: .*; download it again"):
        ReferenceImages(str(path))


def test_a_pickle_by_the_name_of_an_npz_is_refused(tmp_path):
    path = tmp_path / "pickle.npz"
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"pickle\.npz is damaged or is not an \.npz file; download it again"):
        ReferenceImages(str(path))


def test_npz_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ReferenceImages(str(tmp_path / "objects.npz"))
