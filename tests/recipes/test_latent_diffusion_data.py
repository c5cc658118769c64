"""What a latent-diffusion run loads: the classes of its images, in memory and as a stream."""

import io
import tarfile

import pytest
from accelerate import Accelerator
from PIL import Image

from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.latent_diffusion.data import load_images
from iptv2_diffusion.training.errors import ConfigError


def load(data, **options):
    return load_images(LDMConfig(data=str(data), output_dir="", resolution=8, **options), Accelerator())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_heldout_split_keeps_the_class_numbers_of_training(tmp_path, streaming):
    """val/ lacks the first class: by itself it would number b and c from 0."""
    for split, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            path = tmp_path / split / name / "x.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
    _, heldout, names = load(tmp_path, heldout_split="val", streaming=streaming)
    assert names == ["a", "b", "c"]
    assert sorted(heldout.labels) == [1, 2]


def test_class_numbers_of_a_stream_stay(tmp_path):
    """Shards name no classes: their labels are numbers."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for split, labels in (("train", (0, 1, 2)), ("val", (1, 2))):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for label in labels:
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{label}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    _, heldout, names = load(tmp_path, heldout_split="val", streaming=True, num_classes=4)
    assert names == ["0", "1", "2", "3"]
    assert heldout.labels == [1, 2]


@pytest.mark.parametrize("labels", ["none", "ignored"])
def test_classes_are_not_balanced_without_labels(tmp_path, labels):
    folder = tmp_path if labels == "none" else tmp_path / "a"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    column = None if labels == "none" else "ignore"
    with pytest.raises(ConfigError, match=r"class_balance is 0\.5, but no labels were found in"):
        load(tmp_path, class_balance=0.5, label_column=column)
