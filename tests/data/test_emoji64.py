"""The shipped data set: the claims of its card are true, and no emoji is on both sides of the split."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch

from iptv2_diffusion.data.images import ImageTensors, class_names, load_image_dataset

FOLDER = Path(__file__).resolve().parents[2] / "data" / "emoji64"
TARBALLS = Path.home() / ".cache" / "iptv2-src"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """build.py, which is a script, as a module."""
    spec = importlib.util.spec_from_file_location("build_emoji64", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> datasets.DatasetDict:
    return datasets.load_dataset(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_splits_and_columns(emoji: datasets.DatasetDict, build: ModuleType) -> None:
    assert set(emoji) == {"train", "heldout"}
    for split in emoji.values():
        assert split.features == build.FEATURES
    assert len(class_names(emoji["train"])) == 9


def test_every_base_image_is_there_once(emoji: datasets.DatasetDict) -> None:
    """DATA.md counts 5,664 base images and gives their number per class."""
    labels, seen = Counter(), Counter()
    for split in emoji.values():
        base = split.filter(lambda tone: tone == "", input_columns="skin_tone")
        labels.update(base.features["label"].int2str(base["label"]))
        seen.update(zip(base["style"], base["code_point"], strict=True))
    assert labels == {
        "people_body": 1133,
        "flags": 793,
        "objects": 789,
        "symbols": 671,
        "travel_places": 654,
        "smileys_emotion": 504,
        "animals_nature": 475,
        "food_drink": 390,
        "activities": 255,
    }
    assert set(seen.values()) == {1}


def test_no_emoji_on_both_sides(emoji: datasets.DatasetDict, build: ModuleType) -> None:
    families = [{build.family(c) for c in split["code_point"]} for split in emoji.values()]
    assert not families[0] & families[1]
    assert set(emoji["heldout"]["skin_tone"]) == {""}


def test_a_tenth_of_each_class_is_held_out(emoji: datasets.DatasetDict) -> None:
    points = {name: set(zip(split["label"], split["code_point"], strict=True)) for name, split in emoji.items()}
    base = {row for row in points["train"] if not re.search("1F3F[B-F]", row[1])}
    for label in range(9):
        held = sum(row[0] == label for row in points["heldout"])
        share = held / (held + sum(row[0] == label for row in base))
        assert 0.08 <= share <= 0.12


def test_family(build: ModuleType) -> None:
    """Skin tone, gender and direction do not make a separate family; the profession does."""
    same = ["1F3C3", "1F3C3-1F3FD", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F"]
    assert {build.family(c) for c in same} == {"1F3C3"}
    assert build.family("1F468-200D-1F680") == build.family("1F469-1F3FB-200D-1F680")
    assert build.family("1F468-200D-1F680") != build.family("1F468-200D-1F52C")
    assert build.family("1F3FB") == "1F3FB"


def test_pictures(emoji: datasets.DatasetDict) -> None:
    images = ImageTensors(load_image_dataset(FOLDER, split="heldout[:64]"), size=64)
    assert images.valid_indices() == list(range(64))
    for index in range(0, 64, 8):
        pixels = images[index]["pixel_values"]
        original = torch.from_numpy(np.array(emoji["heldout"][index]["image"].convert("RGB")))
        assert pixels.shape == (3, 64, 64)
        assert torch.equal(((pixels + 1) * 127.5).round().byte(), original.permute(2, 0, 1))  # no resampling


def test_card_and_size() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    files = sorted(FOLDER.glob("*.parquet"))
    assert [f.name for f in files] == ["heldout.parquet", "train.parquet"]
    assert sum(f.stat().st_size for f in files) < 25e6
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT"):
        assert licence in card


def test_wrong_tarball_is_refused(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / build.SOURCES[0].tarball).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"SHA-256 is .*, expected .*delete the file"):
        build.obtain(build.SOURCES[0], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not list(TARBALLS.glob("*.tgz")), reason=f"the npm packages are not in {TARBALLS}")
def test_build_gives_the_shipped_pixels(build: ModuleType, emoji: datasets.DatasetDict, tmp_path: Path) -> None:
    """Rows and pixels, not bytes: the WebP and parquet encoders may differ between versions."""
    build.build(TARBALLS, tmp_path)
    for name, split in emoji.items():
        built = datasets.load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train")
        assert built.remove_columns("image").to_dict() == split.remove_columns("image").to_dict()
        for index in range(0, len(split), 97):
            assert built[index]["image"].convert("RGB").tobytes() == split[index]["image"].convert("RGB").tobytes()
