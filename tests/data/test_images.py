"""Loading from every kind of source, decoding, and wrong input."""

from __future__ import annotations

import io
import socket
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from iptv2_diffusion.data.archives import FetchError
from iptv2_diffusion.data.image_files import as_rgb, from_pillow
from iptv2_diffusion.data.image_tensors import center_crop, random_crop, to_tensor
from iptv2_diffusion.data.images import (
    ImageTensors,
    class_names,
    decode_image,
    load_image_dataset,
    load_train_and_heldout,
)
from iptv2_diffusion.data.latent_cache import dataset_fingerprint


def to_rgb(image: Image.Image) -> Image.Image:
    return as_rgb(from_pillow(image).pixels)


def picture(size: tuple[int, int] = (12, 8), colour: tuple[int, ...] = (200, 30, 60)) -> Image.Image:
    """A one-coloured picture of (width, height)."""
    return Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_shard(path: Path, pictures: Sequence[Image.Image], keys: Iterable[int]) -> None:
    """A WebDataset shard of these pictures, whose classes are their keys modulo 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for suffix, content in (("png", png(pictures[key])), ("cls", str(key % 3).encode())):
                member = tarfile.TarInfo(f"{key:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two classes of two images each, one of them nested deeper."""
    for name in ("cat/a.png", "cat/deep/b.jpg", "dog/test_1.png", "dog/2.PNG"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder with train.parquet, whose columns have other names, and string labels."""
    columns = {
        "picture_file": [{"bytes": png(picture()), "path": None}] * 3,
        "kind": ["pear", "apple", "pear"],
        "note": ["", "", ""],
    }
    features = datasets.Features(
        {"picture_file": datasets.Image(), "kind": datasets.Value("string"), "note": datasets.Value("string")}
    )
    (tmp_path / "pq").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pq" / "train.parquet")
    return tmp_path / "pq"


class TestSources:
    def test_labelled_folder(self, labelled: Path) -> None:
        data = load_image_dataset(labelled)
        assert data.column_names == ["image", "label"]
        assert class_names(data) == ["cat", "dog"]
        assert data["label"] == [0, 0, 1, 1]
        assert data.features["image"] == datasets.Image(decode=False)

    def test_flat_folder_is_unlabelled(self, labelled: Path) -> None:
        data = load_image_dataset(labelled / "dog")  # "test_1.png" is an ordinary name, not a split
        assert data.column_names == ["image"]
        assert len(data) == 2
        assert class_names(data) is None

    def test_split_folders(self, labelled: Path, tmp_path: Path) -> None:
        root = tmp_path / "splits"
        root.mkdir()
        labelled.rename(root / "train")
        (root / "test" / "dog").mkdir(parents=True)
        picture().save(root / "test" / "dog" / "x.png")
        assert len(load_image_dataset(root)) == 4
        assert len(load_image_dataset(root, split="test")) == 1
        with pytest.raises(ValueError, match='no split "val"; the splits are: test, train'):
            load_image_dataset(root, split="val")

    def test_a_class_called_train_is_not_a_split(self, labelled: Path) -> None:
        """CIFAR-100 has one."""
        (labelled / "notes").mkdir()  # without images: not a class
        (labelled / "train").mkdir()
        picture().save(labelled / "train" / "x.png")
        with pytest.raises(ValueError, match=r"train are names of splits, but cat, dog next to them are not; .* move"):
            load_image_dataset(labelled)
        (labelled.parent / "moved").mkdir()
        labelled.rename(labelled.parent / "moved" / "train")  # as the message says
        assert class_names(load_image_dataset(labelled.parent / "moved")) == ["cat", "dog", "train"]

    def test_slice_of_a_folder(self, labelled: Path) -> None:
        whole = load_image_dataset(labelled)
        assert load_image_dataset(labelled, split="train[1:3]")["label"] == whole["label"][1:3]
        assert len(load_image_dataset(labelled, split="train[:50%]")) == 2

    def test_images_next_to_the_classes_leave_no_labels_and_are_reported(self, labelled: Path) -> None:
        picture().save(labelled / "cover.png")
        with pytest.warns(UserWarning, match=r"no labels, because 1 of 5 images \(cover\.png \.\.\.\) are next to"):
            assert class_names(load_image_dataset(labelled)) is None

    @pytest.mark.parametrize("form", ["folder", "file", "glob"])
    def test_parquet(self, parquet: Path, form: str) -> None:
        source = {"folder": parquet, "file": parquet / "train.parquet", "glob": parquet / "*.parquet"}[form]
        data = load_image_dataset(source, image_column="picture_file", label_column="kind")
        assert data.column_names == ["image", "label"]
        assert class_names(data) == ["apple", "pear"]
        assert data["label"] == [1, 0, 1]
        assert ImageTensors(data, size=8)[0]["pixel_values"].shape == (3, 8, 8)

    @pytest.mark.parametrize("form", ["folder", "file", "glob"])
    def test_webdataset_tar_shards(self, tmp_path: Path, form: str) -> None:
        """Two shards of KEY.png and KEY.cls; the images come back as they went in, in the order of shards and keys."""
        pictures = [noise(12, 8, seed) for seed in range(5)]
        write_shard(tmp_path / "shards" / "train-00000.tar", pictures, range(3))
        write_shard(tmp_path / "shards" / "train-00001.tar", pictures, (3, 4))
        sources = {"folder": "shards", "file": "shards/train-00000.tar", "glob": "shards/*.tar"}
        data = load_image_dataset(tmp_path / sources[form], cache_dir=tmp_path / "cache")
        count = 3 if form == "file" else 5
        assert data["label"] == [0, 1, 2, 0, 1][:count]
        assert class_names(data) == ["0", "1", "2"]
        images = ImageTensors(data, size=(8, 12))
        for i in range(count):
            assert torch.equal(images[i]["pixel_values"], to_tensor(pictures[i]))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_split_folders_of_tar_shards(self, tmp_path: Path, streaming: bool) -> None:
        pictures = [noise(12, 8, seed) for seed in range(5)]
        write_shard(tmp_path / "shards" / "train" / "0.tar", pictures, range(3))
        write_shard(tmp_path / "shards" / "val" / "0.tar", pictures, (3, 4))

        def paths(split: str) -> list[str]:
            data = load_image_dataset(
                tmp_path / "shards", split=split, cache_dir=tmp_path / "cache", streaming=streaming
            )
            return [record["image"]["path"].split("/")[-1] for record in data]

        assert paths("train") == ["000.png", "001.png", "002.png"]
        assert paths("val") == ["003.png", "004.png"]
        with pytest.raises(ValueError, match='no split "test"; the splits are: train, val'):
            paths("test")
        write_shard(tmp_path / "shards" / "more" / "0.tar", pictures, (0,))
        with pytest.raises(ValueError, match="train, val are names of splits, but more next to them"):
            paths("train")

    def test_columns_are_found(self, parquet: Path) -> None:
        data = load_image_dataset(parquet)  # the only Image feature, under an unusual name; "kind" is not a usual label
        assert data.column_names == ["image"]

    def test_integer_labels_and_ignored_labels(self, tmp_path: Path) -> None:
        columns = {"img": [{"bytes": png(picture()), "path": None}] * 2, "label": [4, 2]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
        assert class_names(load_image_dataset(tmp_path / "x.parquet")) == ["0", "1", "2", "3", "4"]
        assert class_names(load_image_dataset(tmp_path / "x.parquet", label_column="ignore")) is None


class TestHeldOut:
    @pytest.fixture
    def splits(self, labelled: Path, tmp_path: Path) -> Path:
        """train/{cat,dog} and test/dog, where `dog` alone would be class 0."""
        (tmp_path / "splits" / "test" / "dog").mkdir(parents=True)
        labelled.rename(tmp_path / "splits" / "train")
        picture().save(tmp_path / "splits" / "test" / "dog" / "x.png")
        return tmp_path / "splits"

    def test_a_share(self, labelled: Path) -> None:
        train, heldout = load_train_and_heldout(labelled, heldout_fraction=0.25, seed=3)
        assert (len(train), len(heldout)) == (3, 1)
        again = load_train_and_heldout(labelled, heldout_fraction=0.25, seed=3)
        assert [d["label"] for d in again] == [train["label"], heldout["label"]]
        assert len(load_train_and_heldout(labelled, heldout_fraction=0.99)[0]) == 1
        assert load_train_and_heldout(labelled, heldout_fraction=0)[1] is None

    def test_a_split_keeps_the_class_numbers_of_training(self, splits: Path) -> None:
        train, heldout = load_train_and_heldout(splits, heldout_split="test")
        assert class_names(heldout) == class_names(train) == ["cat", "dog"]
        assert heldout["label"] == [1]
        unlabelled = load_train_and_heldout(splits, heldout_split="test", label_column="ignore")
        assert [class_names(data) for data in unlabelled] == [None, None]

    def test_classes_and_labels_that_do_not_fit(self, splits: Path) -> None:
        (splits / "test" / "dog").rename(splits / "test" / "eel")
        with pytest.raises(
            ValueError, match=r'split "test": has 1 classes that the training images do not have \(eel\)'
        ):
            load_train_and_heldout(splits, heldout_split="test")
        picture().save(splits / "test" / "y.png")
        with pytest.warns(UserWarning, match="next to"), pytest.raises(ValueError, match="has no labels"):
            load_train_and_heldout(splits, heldout_split="test")

    @pytest.mark.parametrize("source", ["train.parquet", "*.parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_files_named_one_by_one_hold_no_second_split(self, parquet: Path, source: str, streaming: bool) -> None:
        """Otherwise the same images would be both trained on and held out."""
        with pytest.raises(ValueError, match='no split "heldout"; single files form one split, "train"'):
            load_train_and_heldout(parquet / source, heldout_split="heldout", streaming=streaming)
        train, heldout = load_train_and_heldout(
            parquet / source, train_split="train[1:]", heldout_split="train[:1]", label_column="kind"
        )
        assert (len(train), len(heldout)) == (2, 1)


class TestWrongSources:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_image_dataset(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="no such parquet"):
            load_image_dataset(tmp_path / "nothing-*.parquet")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").write_text("no images here")
        with pytest.raises(ValueError, match=r"neither images .* nor parquet"):
            load_image_dataset(tmp_path)

    def test_column_that_is_not_there(self, parquet: Path) -> None:
        with pytest.raises(ValueError, match='no image column "jpg"; the columns are: picture_file, kind, note'):
            load_image_dataset(parquet, image_column="jpg")
        with pytest.raises(ValueError, match='no label column "class"'):
            load_image_dataset(parquet, label_column="class")

    def test_split_that_is_not_there(self, parquet: Path) -> None:
        with pytest.raises(ValueError, match="train"):
            load_image_dataset(parquet, split="heldout")

    def test_messages_are_one_line(self, tmp_path: Path, parquet: Path) -> None:
        for source, options in (
            (tmp_path / "nowhere", {}),
            (parquet, {"split": "x"}),
            (parquet, {"image_column": "x"}),
        ):
            with pytest.raises((FileNotFoundError, ValueError)) as caught:
                load_image_dataset(source, **options)
            assert "\n" not in str(caught.value)


class TestDecoding:
    def test_range_layout_and_flip(self, tmp_path: Path) -> None:
        left_white = np.zeros((8, 8, 3), np.uint8)
        left_white[:, :4] = 255
        Image.fromarray(left_white).save(tmp_path / "a.png")
        images = ImageTensors(load_image_dataset(tmp_path), size=8)
        item = images[0]
        assert item["class_labels"] == 0
        assert item["index"] == 0
        assert item["pixel_values"].dtype == torch.float32
        assert item["pixel_values"][:, :, :4].eq(1).all()
        assert item["pixel_values"][:, :, 4:].eq(-1).all()
        assert torch.equal(images.get(0, flip=True)["pixel_values"], item["pixel_values"].flip(-1))

    def test_index_beyond_the_end(self, labelled: Path) -> None:
        with pytest.raises(IndexError):
            ImageTensors(load_image_dataset(labelled), size=8)[4]

    def test_transparency_goes_white_before_resizing(self) -> None:
        """Hidden pixels are black in most emoji: resized first, they would darken the outline."""
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste((255, 255, 255, 255), (16, 16, 48, 48))
        assert np.asarray(center_crop(to_rgb(image), (24, 24))).min() == 255
        palette = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert("P")
        palette.info["transparency"] = palette.getpixel((0, 0))
        assert np.asarray(to_rgb(palette)).min() == 255

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "LA"])
    def test_modes(self, mode: str) -> None:
        grey = Image.fromarray(np.full((4, 4), 40_000, np.uint16)) if mode == "I;16" else picture().convert(mode)
        rgb = to_rgb(grey)
        assert rgb.mode == "RGB"
        if mode == "I;16":
            assert rgb.getpixel((0, 0)) == (40_000 >> 8,) * 3

    def test_upright(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90°
        buffer = io.BytesIO()
        picture((12, 8)).save(buffer, "JPEG", exif=exif)
        assert to_rgb(Image.open(buffer)).size == (8, 12)

    @pytest.mark.parametrize("size", [(8, 8), (7, 13), (31, 5), (64, 64)])
    @pytest.mark.parametrize("source", [(64, 64), (33, 17), (5, 90), (1, 1), (200, 64)])
    def test_any_size(self, size: tuple[int, int], source: tuple[int, int]) -> None:
        assert center_crop(picture(source), size).size == (size[1], size[0])

    @pytest.mark.parametrize("source", [(64, 64), (100, 70), (301, 150), (40, 20), (257, 513)])
    def test_square_crop_is_adms(self, source: tuple[int, int]) -> None:
        """ADM: box-halve while the short side is ≥ 2·size, bicubic to the size, crop the centre."""
        image, size = noise(*source), 32
        expected = image
        while min(expected.size) >= 2 * size:
            expected = expected.resize(tuple(x // 2 for x in expected.size), Image.Resampling.BOX)
        scale = size / min(expected.size)
        expected = expected.resize(tuple(round(x * scale) for x in expected.size), Image.Resampling.BICUBIC)
        array = np.array(expected)
        y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
        assert np.array_equal(np.asarray(center_crop(image, (size, size))), array[y : y + size, x : x + size])

    @pytest.mark.parametrize("source", [(64, 64), (100, 70), (301, 150), (40, 20)])
    def test_random_crop_is_adms(self, source: tuple[int, int]) -> None:
        """ADM: the short side becomes 1 to 1/0.8 times the size, box-halved then bicubic, and a window of it is cut."""
        image, size = noise(*source), 32
        for seed in range(4):
            enlarged, down, right = torch.rand(
                3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            ).tolist()
            side = round(size * (1 + 0.25 * enlarged))
            expected = image
            while min(expected.size) >= 2 * side:
                expected = expected.resize(tuple(x // 2 for x in expected.size), Image.Resampling.BOX)
            scale = side / min(expected.size)
            if scale != 1:
                expected = expected.resize(tuple(round(x * scale) for x in expected.size), Image.Resampling.BICUBIC)
            array = np.array(expected)
            y, x = int(down * (array.shape[0] - size + 1)), int(right * (array.shape[1] - size + 1))
            ours = random_crop(image, (size, size), torch.Generator().manual_seed(seed))
            assert np.array_equal(np.asarray(ours), array[y : y + size, x : x + size])


class TestCorruptImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a", "b", "c"):
            noise(16, 16).save(tmp_path / f"{name}.png")
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])  # truncated
        (tmp_path / "d.jpg").write_bytes(b"not a picture at all")
        return tmp_path

    def test_rows_without_an_image_are_left_out(self, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
        whole = {"bytes": (folder / "a.png").read_bytes(), "path": None}
        for records in ([None, whole, None], [whole, None]):
            features = datasets.Features({"image": datasets.Image(decode=False)})
            images = ImageTensors(datasets.Dataset.from_dict({"image": records}, features=features), size=8)
            assert images.valid_indices() == [records.index(whole)]
            assert len(dataset_fingerprint(images)) == 16
        assert "image 0: the row has no image; image 2: the row has no image" in str(recwarn[0].message)

    def test_skipped_counted_and_reported_once(self, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
        images = ImageTensors(load_image_dataset(folder), size=8)
        assert images.valid_indices() == images.valid_indices() == [0, 2]
        told = [str(w.message) for w in recwarn if "skipping" in str(w.message)]
        assert len(told) == 1
        assert told[0].startswith("skipping 2 of 4 images: ")
        assert "b.png" in told[0]
        assert "d.jpg" in told[0]

    def test_strict_fails_with_the_name(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"b\.png: cannot be read"):
            ImageTensors(load_image_dataset(folder), size=8, strict=True).valid_indices()
        with pytest.raises(ValueError, match=r"d\.jpg"):
            ImageTensors(load_image_dataset(folder), size=8)[3]

    def test_none_left(self, folder: Path) -> None:
        for name in ("a", "c"):
            (folder / f"{name}.png").unlink()
        with pytest.raises(ValueError, match="none of the 2 images"):
            ImageTensors(load_image_dataset(folder), size=8).valid_indices()


def test_what_cannot_be_fetched_now_is_not_taken_for_corrupt():
    """A port of this machine without a server, and fsspec's own memory, with and without the image."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"ftp://127.0.0.1:{unused.getsockname()[1]}/a.png"
        with pytest.raises(FetchError, match=r"a\.png could not be fetched \(.*refused.*run the same command again"):
            decode_image({"bytes": None, "path": url}, "a")
    fsspec.filesystem("memory").pipe("/test-images/b.png", png(picture()))
    assert decode_image({"bytes": None, "path": "memory://test-images/b.png"}, "b").size == (12, 8)
    with pytest.raises(ValueError, match="c: cannot be read as an image"):
        decode_image({"bytes": None, "path": "memory://test-images/c.png"}, "c")
