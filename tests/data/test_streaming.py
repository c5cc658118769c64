"""Streams: each image once per epoch, the same for any number of processes, exact from any step; and tars of tars."""

import io
import itertools
import json
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
import torch
from kl_vae import make_kl_vae
from PIL import Image

from iptv2_diffusion.data.draws import RunDraws, draw_step, own_slices
from iptv2_diffusion.data.images import ImageTensors, class_names, load_image_dataset
from iptv2_diffusion.data.streaming import ImageStream, Lane, StreamedLatents, StreamOrder, count_lanes, join_positions
from iptv2_diffusion.latents import LatentCodec

SHARDS, EACH, BATCH = 4, 6, 8  # 24 images, labelled by their number: an epoch is three batches
COUNT = SHARDS * EACH


def png(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shards(folder, kind, broken=()):
    """Shards of EACH images, as a glob. The bytes of `broken` images are truncated."""
    contents = [png(n)[:40] if n in broken else png(n) for n in range(COUNT)]
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        numbers = range(shard * EACH, (shard + 1) * EACH)
        if kind == "tar":
            with tarfile.open(folder / f"{shard}.tar", "w") as archive:
                for n in numbers:
                    add(archive, f"{n:02d}.png", contents[n])
                    add(archive, f"{n:02d}.cls", str(n).encode())
        else:
            features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=COUNT)}
            columns = {"image": [{"bytes": contents[n], "path": f"{n:02d}.png"} for n in numbers], "label": numbers}
            data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            data.to_parquet(folder / f"{shard}.parquet", batch_size=2)
    return folder / f"*.{kind}"


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return LatentCodec(make_kl_vae(4, 4))


class Reader:
    """A stream as `processes` read it, with their parts of each batch joined."""

    def __init__(self, source, codec, processes=1, start=0, position=None, strict=False, block=8, **options):
        self.messages = []
        stream = load_image_dataset(source, streaming=True)
        self.parts = [
            StreamedLatents(
                ImageStream(stream, (8, 8), strict=strict, block=block),
                codec,
                RunDraws(StreamOrder(5), BATCH, (4, 4, 4), own_slices(BATCH, processes, process)),
                start=start,
                position=position,
                say=self.messages.append,
                **options,
            )
            for process in range(processes)
        ]
        self.step = start

    def read(self, steps):
        """Labels (steps * BATCH) and latents of the next steps."""
        latents, labels = [], []
        for _ in range(steps):
            for part in self.parts:
                ((made, classes, _),) = part.micro_batches(self.step)
                latents.append(made)
                labels += classes.tolist()
            self.step += 1
        return labels, torch.cat(latents) if latents else None

    def position(self):
        return json.loads(json.dumps(join_positions([part.position(self.step) for part in self.parts])))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_each_image_is_seen_once_an_epoch_in_another_order_each_time(tmp_path, codec, kind):
    labels, _ = Reader(write_shards(tmp_path, kind), codec).read(6)
    first, second = labels[:COUNT], labels[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert first != list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_are_those_of_the_image_with_its_flip(tmp_path, codec, workers):
    source = write_shards(tmp_path, "parquet")
    images = ImageTensors(load_image_dataset(source), size=8)
    labels, latents = Reader(source, codec, num_workers=workers).read(2)
    draws = [draw_step(StreamOrder(5), step, BATCH, (4, 4, 4)) for step in range(2)]
    flips = torch.cat([d.flips for d in draws]).tolist()
    noise = torch.cat([d.posterior_noise for d in draws])
    pixels = torch.stack([images.get(n, flip=f)["pixel_values"] for n, f in zip(labels, flips, strict=True)])
    mean, std = codec.encode_moments(pixels)
    torch.testing.assert_close(latents, mean + std * noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("processes", [2, 8])
def test_the_stream_does_not_depend_on_the_number_of_processes(tmp_path, codec, processes):
    """Eight processes share four lanes: two processes read the same shards, for different positions of the batch."""
    source = write_shards(tmp_path, "parquet")
    one, many = (Reader(source, codec, count) for count in (1, processes))
    (labels, latents), (others, other_latents) = one.read(5), many.read(5)
    assert labels == others
    torch.testing.assert_close(latents, other_latents, atol=1e-5, rtol=1e-5)
    assert one.position() == many.position()


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize(("block", "workers"), [(8, 0), (12, 2), (1, 0)])
def test_resume_from_every_step_sees_what_the_uninterrupted_run_sees(tmp_path, codec, kind, block, workers):
    """Also with another number of processes, and without a saved position. Seven steps are more than two epochs."""
    source = write_shards(tmp_path, kind)
    whole, _ = Reader(source, codec, block=block).read(7)
    going = Reader(source, codec, block=block, num_workers=workers)
    for stop in range(7):
        position = going.position()  # as at a checkpoint in mid-run: reading ahead must not affect it
        resumed = Reader(source, codec, 2 if stop % 2 else 1, stop, position, block=block, num_workers=workers)
        assert (
            resumed.read(2)[0]
            == (whole + Reader(source, codec, start=7, block=block).read(1)[0])[stop * BATCH : (stop + 2) * BATCH]
        )
        assert going.read(1)[0] == whole[stop * BATCH : (stop + 1) * BATCH]
        # the trainer draws the next step before it saves this one, and the position must still be the same
        assert json.loads(json.dumps(join_positions([going.parts[0].position(stop)]))) == position


def test_without_its_position_the_stream_is_read_through_with_a_note(tmp_path, codec):
    source = write_shards(tmp_path, "parquet")
    whole, _ = Reader(source, codec).read(4)
    late = Reader(source, codec, start=3)
    assert late.read(1)[0] == whole[3 * BATCH :]
    assert "reading it from the beginning to step 3" in late.messages[0]
    other = Reader(
        source, codec, start=3, position=Reader(source, codec, block=4).position()
    )  # with another block size
    assert other.read(1)[0] == whole[3 * BATCH :]
    assert len(other.messages) == 1


def test_unreadable_images_are_replaced_by_the_next_and_counted(tmp_path, codec):
    good, bad = write_shards(tmp_path / "good", "parquet"), write_shards(tmp_path / "bad", "parquet", broken=(3, 20))
    reader = Reader(bad, codec, num_workers=2)
    labels, _ = reader.read(3)
    whole, _ = Reader(good, codec).read(3)
    differing = [i for i, (a, b) in enumerate(zip(labels, whole, strict=True)) if a != b]
    assert sorted(whole[i] for i in differing) == [3, 20]  # all others keep their positions
    assert [m.split(":")[0] for m in sorted(reader.messages)] == ["03.png", "20.png"]
    position = reader.position()
    assert position["skipped"] == 2
    again = Reader(bad, codec, 2, 3, position)
    again.read(3)
    assert again.position()["skipped"] == 4
    assert reader.read(3)[0] == Reader(bad, codec, 1, 3, position).read(3)[0]
    with pytest.raises(ValueError, match=r"(03|20)\.png: cannot be read"):
        Reader(bad, codec, strict=True).read(3)
    none = write_shards(tmp_path / "none", "tar", broken=range(COUNT))
    with pytest.raises(ValueError, match="none of 2 images in a row can be read"):
        Reader(none, codec).read(1)


def test_labels_are_checked(tmp_path, codec):
    with pytest.raises(ValueError, match=r"labels are 0 to 9"):
        Reader(write_shards(tmp_path, "tar"), codec, num_classes=10).read(3)
    words = datasets.Dataset.from_dict({"image": [{"bytes": png(0), "path": None}], "label": ["pear"]})
    words.cast_column("image", datasets.Image()).to_parquet(tmp_path / "words.parquet")
    with pytest.raises(ValueError, match=r'column "label" holds string; a stream needs class numbers'):
        load_image_dataset(tmp_path / "words.parquet", streaming=True)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_lanes_together_hold_each_image_once_an_epoch(tmp_path, lanes):
    """Three lanes share four shards: they end their epochs at different times, but no shard is read more often."""
    stream = load_image_dataset(write_shards(tmp_path, "parquet"), streaming=True)
    seen = {epoch: [] for epoch in range(4)}
    for number in range(lanes):
        lane = Lane(stream, number, lanes, seed=5, block_size=1)
        for block in itertools.count():
            (record,) = lane.block(block)
            epoch = lane.states[block + 1]["epoch"]  # of the shard that the record came from
            if epoch > 3:
                break
            seen[epoch].append(record["label"])
    assert all(sorted(labels) == list(range(COUNT)) for labels in seen.values())
    assert len({tuple(labels) for labels in seen.values()}) > 1


LAYOUTS = [(1, 8, 1), (3, 8, 2), (4, 6, 3), (1024, 256, 64), (100, 96, 48)]


@pytest.mark.parametrize(("shards", "batch", "lanes"), LAYOUTS)
def test_lanes_divide_the_batch(shards, batch, lanes):
    assert count_lanes(shards, batch) == lanes


# --------------------------------------------------------------------------------------------------------------------
# ImageNet's form


@pytest.fixture
def nested(tmp_path):
    """`images/CLASS/*.JPEG`, and the same as a tar of one tar per class; ten images."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for name, numbers in (("n01440764", range(4)), ("n01443537", range(4, 10))):
            buffer = io.BytesIO()
            (tmp_path / "images" / name).mkdir(parents=True)
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for n in numbers:
                    (tmp_path / "images" / name / f"{name}_{n}.JPEG").write_bytes(png(n))
                    add(inner, f"{name}_{n}.JPEG", png(n))
                add(inner, "readme.txt", b"no image")
            add(outer, f"{name}.tar", buffer.getvalue())
    return tmp_path


def test_a_tar_of_tars_is_the_folder_of_its_classes(nested):
    folder = load_image_dataset(nested / "images")
    data = load_image_dataset(nested / "ILSVRC2012_img_train.tar", cache_dir=nested / "cache")
    assert class_names(data) == class_names(folder) == ["n01440764", "n01443537"]
    assert data["label"] == folder["label"]
    ours, theirs = ImageTensors(data, size=8), ImageTensors(folder, size=8)
    for n in range(10):
        assert torch.equal(ours[n]["pixel_values"], theirs[n]["pixel_values"])
    assert ours.name(5).endswith("::n01443537/n01443537_5.JPEG")
    assert len(load_image_dataset(nested / "ILSVRC2012_img_train.tar", split="train[:3]")) == 3


@pytest.mark.parametrize("source", ["images", "ILSVRC2012_img_train.tar"])
def test_loose_images_and_tars_of_tars_are_streamed_in_mixed_order(nested, codec, source):
    stream = load_image_dataset(nested / source, streaming=True)
    assert class_names(stream) == ["n01440764", "n01443537"]
    labels, _ = Reader(nested / source, codec).read(25)  # 20 epochs, in which eight lanes share ten shards
    assert labels.count(0) == pytest.approx(80, abs=8)
    assert 0 < sum(labels[:4]) < 4


def test_images_behind_a_url_are_read(tmp_path, codec):
    """Images as `datasets` yields them from the archives of a Hub repository."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", png(1))
    url = f"zip://x.png::{tmp_path}/a.zip"
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": url}]}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    expected = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png(1)))).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ImageTensors(data, size=8)[0]["pixel_values"], expected)
