"""Published latents: the layout of fast-DiT and U-DiT, as a folder and as a tar; damaged ones refused in one line."""

import os
import tarfile

import numpy as np
import pytest
import torch

from iptv2_diffusion.data.draws import DataOrder, RunDraws, draw_step, own_slices
from iptv2_diffusion.data.feature_folder import FeatureFolder, holds_features
from iptv2_diffusion.data.latent_cache import CachedLatents

COUNT, SHAPE = 24, (4, 8, 8)


def write_features(folder, count=COUNT, shape=SHAPE, classes=3, ranks=None):
    """Files as np.save writes them: N.npy as fast-DiT names them, or STEP_RANK.npy as U-DiT does."""
    random = np.random.default_rng(0)
    for part in ("features", "labels"):
        (folder / f"imagenet256_{part}").mkdir(parents=True)
    for i in range(count):
        name = f"{i}.npy" if ranks is None else f"{i // ranks}_{i % ranks}.npy"
        latent = random.standard_normal((1, *shape)).astype(np.float32)
        np.save(folder / "imagenet256_features" / name, latent)
        np.save(folder / "imagenet256_labels" / name, np.array([i % classes]))
    return folder


def write_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "imagenet_feature")
    return path


@pytest.fixture
def folder(tmp_path):
    return write_features(tmp_path / "imagenet_feature")


def opened(path, **options):
    return FeatureFolder(path, path.parent / "cache", **options)


def latent(folder, name):
    return torch.from_numpy(np.load(folder / "imagenet256_features" / name))[0]


@pytest.mark.parametrize("ranks", [None, 8])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_items_are_in_the_order_of_their_numbers(tmp_path, kind, ranks):
    folder = write_features(tmp_path / "imagenet_feature", ranks=ranks)
    source = folder if kind == "folder" else write_tar(folder, tmp_path / "imagenet_feature.tar")
    assert holds_features(source)
    features = opened(source)
    assert (len(features), features.latent_shape, features.kind) == (COUNT, SHAPE, "imagenet256")
    assert features.labels == [i % 3 for i in range(COUNT)]
    draws = draw_step(DataOrder(COUNT, 0), 0, 6, SHAPE)
    latents, labels = features.batch(draws)
    for item, value, label in zip(draws.items.tolist(), latents, labels.tolist(), strict=True):
        name = f"{item}.npy" if ranks is None else f"{item // ranks}_{item % ranks}.npy"
        assert torch.equal(value, latent(folder, name))
        assert label == item % 3
    assert features.deviation() == pytest.approx(1, abs=0.05)


def test_two_processes_share_the_batches_of_one(folder):
    features = opened(folder)

    def batches(processes, process):
        draws = RunDraws(DataOrder(COUNT, 0), 8, SHAPE, own_slices(8, processes, process), posterior=False)
        return [next(CachedLatents(features, draws).micro_batches(step)) for step in range(4)]

    for whole, first, second in zip(batches(1, 0), batches(2, 0), batches(2, 1), strict=True):
        assert torch.equal(whole[0], torch.cat((first[0], second[0])))
        assert torch.equal(whole[1], torch.cat((first[1], second[1])))


def test_threads_read_the_same_and_a_selection_keeps_its_labels(folder):
    features, threaded = opened(folder), opened(folder, num_workers=3)
    items = torch.tensor([5, 1, 23, 1])
    assert torch.equal(features.means(items), threaded.means(items))
    some = features.select([2, 7, 10])
    assert (len(some), some.labels, len(features)) == (3, [2, 1, 1], COUNT)
    assert torch.equal(some.means(torch.tensor([1])), features.means(torch.tensor([7])))


def test_the_index_is_made_once_and_again_after_a_change(folder, monkeypatch):
    opened(folder)
    (index,) = (folder.parent / "cache").iterdir()
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    opened(folder)
    assert not [path for path in listed if "imagenet256" in str(path)]
    for part in ("features", "labels"):
        os.remove(folder / f"imagenet256_{part}" / "3.npy")
    assert len(opened(folder)) == COUNT - 1
    index.write_bytes(b"damaged")
    assert len(opened(folder)) == COUNT - 1


def test_without_labels_all_are_one_class(folder):
    for path in (folder / "imagenet256_labels").iterdir():
        path.unlink()
    (folder / "imagenet256_labels").rmdir()
    with pytest.raises(ValueError, match=r"needs one folder \*_labels .*has none; --label_column ignore trains"):
        opened(folder)
    features = opened(folder, labelled=False)
    assert features.labels == []
    assert not features.class_labels.any()


def test_folders_of_images_are_none_of_latents(tmp_path):
    (tmp_path / "bird_features").mkdir()
    (tmp_path / "bird_features" / "1.png").write_bytes(b"")
    assert not holds_features(tmp_path)
    assert not holds_features(tmp_path / "nothing")
    assert not holds_features(write_tar(tmp_path / "bird_features", tmp_path / "images.tar"))


def features_of(folder, name):
    return folder / "imagenet256_features" / name


def labels_of(folder, name):
    return folder / "imagenet256_labels" / name


AT_OPENING = {
    "a missing label": (
        lambda f: labels_of(f, "7.npy").unlink(),
        r"1 of 24 latents have no label of the same name \(7\.npy\)",
    ),
    "extra labels": (
        lambda f: [np.save(labels_of(f, f"{n}.npy"), [0]) for n in range(90, 95)],
        r"5 of 29 labels have no latent of the same name \(90\.npy, 91\.npy, 92\.npy, \.\.\.\)",
    ),
    "a negative label": (lambda f: np.save(labels_of(f, "2.npy"), [-1]), r"2\.npy: the label is -1; labels start at 0"),
    "a label of several": (lambda f: np.save(labels_of(f, "2.npy"), [1, 2]), r"2\.npy: is int64 of shape \(2,\); a la"),
    "a label that is no integer": (lambda f: np.save(labels_of(f, "2.npy"), [0.5]), r"is float64 of shape \(1,\); a l"),
    "a pickled label": (
        lambda f: np.save(labels_of(f, "2.npy"), np.array([{}]), allow_pickle=True),
        r"2\.npy: not a \.npy file, or damaged \(Object arrays",
    ),
    "an empty label": (lambda f: labels_of(f, "2.npy").write_bytes(b""), r"2\.npy: not a \.npy file, or damaged"),
    "two folders": (lambda f: (f / "x_features").mkdir(), r"needs one folder \*_features .*imagenet256_features, x_fe"),
    "no files": (
        lambda f: [p.unlink() for part in ("features", "labels") for p in (f / f"imagenet256_{part}").iterdir()],
        r"holds no latents",
    ),
}
AT_READING = {
    "another shape": (
        lambda f: np.save(features_of(f, "5.npy"), np.zeros((1, 4, 4, 4), np.float32)),
        r"5\.npy: has shape \(4, 4, 4\), but the first latent has \(4, 8, 8\)",
    ),
    "no latent": (
        lambda f: np.save(features_of(f, "5.npy"), np.zeros((2, 4, 8, 8), np.float32)),
        r"5\.npy: is float32 of shape \(2, 4, 8, 8\); a latent is float",
    ),
    "integers": (
        lambda f: np.save(features_of(f, "5.npy"), np.zeros((1, 4, 8, 8), np.uint8)),
        r"5\.npy: is uint8 of shape",
    ),
    "not a number": (
        lambda f: np.save(features_of(f, "5.npy"), np.full((1, 4, 8, 8), np.nan, np.float32)),
        r"5\.npy: the latent is NaN or infinite",
    ),
    "a cut file": (
        lambda f: features_of(f, "5.npy").write_bytes(features_of(f, "5.npy").read_bytes()[:500]),
        r"5\.npy: not a \.npy file, or damaged",
    ),
}


CASES = [(case, kind) for case in (*AT_OPENING, *AT_READING) for kind in ("folder", "tar")]
CASES.remove(("two folders", "tar"))  # an empty folder of a tar holds no files


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_damage_is_reported_in_one_line(folder, tmp_path, case, kind):
    change, told = (AT_OPENING | AT_READING)[case]
    change(folder)
    source = folder if kind == "folder" else write_tar(folder, tmp_path / "x.tar")
    with pytest.raises(ValueError, match=told) as caught:
        opened(source).means(torch.arange(COUNT))
    assert "\n" not in str(caught.value)


def test_a_truncated_tar_is_reported_in_one_line(folder, tmp_path):
    tar = write_tar(folder, tmp_path / "x.tar")
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"x\.tar: damaged, or not a tar"):
        opened(tar)
