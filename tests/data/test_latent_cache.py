"""Cached latents: their content, when they are reused, and that corrupt images are left out."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from kl_vae import make_kl_vae
from PIL import Image
from safetensors.torch import load_file, save_file

from iptv2_diffusion.data.draws import DataOrder, RunDraws, draw_step, own_slices
from iptv2_diffusion.data.images import ImageTensors, load_image_dataset
from iptv2_diffusion.data.latent_cache import CachedLatents, LatentCache, cached_latents, dataset_fingerprint
from iptv2_diffusion.data.latent_encoding import EncodedLatents, Encoding
from iptv2_diffusion.files import atomic
from iptv2_diffusion.latents import LatentCodec

COUNT, SIZE = 11, 16


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "images" / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return LatentCodec(make_kl_vae(4, 4))


def load(folder, **options):
    return ImageTensors(load_image_dataset(folder), size=SIZE, **options)


def make(folder, codec, tmp_path, shard_images=100, **options):
    messages = []
    encoding = Encoding(**options)
    sizes = {"batch_size": 4, "shard_images": shard_images}
    cache = cached_latents(load(folder), codec, tmp_path / "cache", encoding, **sizes, say=messages.append)
    return cache, messages


@pytest.mark.parametrize("shard_images", [100, 4])
def test_latents_are_those_of_the_codec(folder, codec, tmp_path, shard_images):
    images = load(folder)
    cache, _ = make(folder, codec, tmp_path, shard_images, dtype="float32")
    assert len(list(cache.folder.glob("shard-*"))) == (1 if shard_images == 100 else 3)
    assert (len(cache), cache.latent_shape, cache.has_spread) == (COUNT, (4, 8, 8), True)
    draws = draw_step(DataOrder(COUNT, 0), 0, COUNT, cache.latent_shape)
    latents, labels = cache.batch(draws)
    for row, (item, flip) in enumerate(zip(draws.items.tolist(), draws.flips.tolist(), strict=True)):
        sample = images.get(item, flip=flip)
        mean, std = codec.encode_moments(sample["pixel_values"][None])
        assert torch.allclose(latents[row], (mean + std * draws.posterior_noise[row])[0], atol=1e-5)
        assert labels[row] == sample["class_labels"]


def test_half_precision_is_within_its_rounding(folder, codec, tmp_path):
    draws = draw_step(DataOrder(COUNT, 0), 0, COUNT, (4, 8, 8))
    half, full = (make(folder, codec, tmp_path, dtype=d)[0].batch(draws)[0] for d in ("float16", "float32"))
    assert not torch.equal(half, full)
    assert torch.allclose(half, full, rtol=2e-3, atol=2e-3)


def test_bfloat16_encoding_is_near(folder, codec, tmp_path):
    draws = draw_step(DataOrder(COUNT, 0), 0, COUNT, (4, 8, 8))
    half, full = (make(folder, codec, tmp_path, precision=p)[0].batch(draws)[0] for p in ("bfloat16", "float32"))
    assert not torch.equal(half, full)
    assert (half - full).abs().mean() < 0.02 * full.std()


def test_without_flips_the_images_are_upright(folder, codec, tmp_path):
    cache, _ = make(folder, codec, tmp_path, flips=False, dtype="float32")
    draws = draw_step(DataOrder(COUNT, 0), 0, COUNT, cache.latent_shape, posterior=False)
    upright = codec.encode_moments(torch.stack([load(folder).get(i)["pixel_values"] for i in draws.items.tolist()]))
    assert draws.flips.any()
    assert torch.allclose(cache.batch(draws)[0], upright[0], atol=1e-5)


def test_a_vae_without_spread_stores_none(folder, tmp_path):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4,
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    cache, _ = make(folder, LatentCodec(tiny.eval()), tmp_path)
    assert not cache.has_spread
    draws = draw_step(DataOrder(COUNT, 0), 0, 4, cache.latent_shape)
    assert cache.batch(draws)[0].shape == (4, *cache.latent_shape)


def test_it_is_made_once_and_again_when_anything_changes(folder, codec, tmp_path):
    first, messages = make(folder, codec, tmp_path)
    assert "encoded 11 images of 11, 2 views each" in messages[0]
    assert make(folder, codec, tmp_path)[1] == []
    made = {first.folder}

    def made_again(**options):
        cache, messages = make(folder, codec, tmp_path, **options)
        fresh = cache.folder not in made and len(messages) == 1
        made.add(cache.folder)
        return fresh

    assert made_again(flips=False)
    assert made_again(dtype="float32")
    assert made_again(precision="bfloat16")
    with torch.no_grad():
        codec.vae.encoder.conv_in.weight.add_(0.1)
    assert made_again()
    os.utime(next(folder.rglob("*.png")), (1, 1))  # an image that was changed
    assert made_again()


def test_a_damaged_or_half_made_cache_is_made_again(folder, codec, tmp_path):
    cache, _ = make(folder, codec, tmp_path)
    shard = cache.folder / "shard-00000000-00000011.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    again, messages = make(folder, codec, tmp_path)
    assert "encoded" in messages[0]
    assert len(again) == COUNT
    (again.folder / "index.json").unlink()
    assert "encoded" in make(folder, codec, tmp_path)[1][0]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [again.folder.name]


def test_a_cache_whose_index_is_not_its_own_is_made_again(folder, codec, tmp_path):
    path = make(folder, codec, tmp_path)[0].folder / "index.json"
    whole = path.read_bytes()
    name = "shard-00000000-00000011.safetensors"
    changes = [{"shards": other} for other in (None, {}, [name], {name: "1"}, {name: 1}, {"../x": 1})]
    changes += [{"latent_shape": None}, {"latent_shape": [4, 8]}, {"flips": 3}, {"crops": "many"}]
    changed = [json.dumps({**json.loads(whole), **change}).encode() for change in changes]
    for content in (b"null", b"[]", b"{}", b"\xff", *changed):
        path.write_bytes(content)
        again, messages = make(folder, codec, tmp_path)
        assert messages[0].startswith("encoded 0 images of 11"), content  # the shards are complete
        assert len(again) == COUNT
        assert path.read_bytes() == whole


@pytest.mark.parametrize("shard", ["header", "labels", "std", "shape"])
def test_a_damaged_shard_of_the_right_size_is_made_again(folder, codec, tmp_path, shard):
    cache, _ = make(folder, codec, tmp_path)
    path = cache.folder / "shard-00000000-00000011.safetensors"
    labels = cache.class_labels
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if shard == "header":  # a flipped bit
        whole = bytearray(path.read_bytes())
        whole[9] = 0
        path.write_bytes(whole)
    else:
        changed = {
            "labels": {"class_labels": labels[:3]},
            "std": {"std": tensors["std"][:, :3].contiguous()},
            "shape": {"mean": tensors["mean"].flatten()},
        }
        save_file({**tensors, **changed[shard]}, path, metadata={"unreadable": "[]"})
        index = json.loads((cache.folder / "index.json").read_text())
        index["shards"][path.name] = path.stat().st_size
        (cache.folder / "index.json").write_text(json.dumps(index))
    again, messages = make(folder, codec, tmp_path)
    assert messages[0].startswith("encoded 11 images of 11")
    assert torch.equal(again.class_labels, labels)


def test_corrupt_images_are_left_out_and_named(folder, codec, tmp_path):
    bad = folder / "cat" / "03.png"
    bad.write_bytes(bad.read_bytes()[:40])
    cache, messages = make(folder, codec, tmp_path)
    assert len(cache) == COUNT - 1
    assert "left out 1 of 11 images" in messages[-1]
    assert "03.png" in messages[-1]
    _, again = make(folder, codec, tmp_path)
    assert again == messages[-1:]  # reported at each use of the cache
    with pytest.raises(ValueError, match=r"03\.png: cannot be read .*one of 1 that .* lacks"):
        cached_latents(load(folder, strict=True), codec, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"03\.png"):
        cached_latents(load(folder, strict=True), codec, tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.*"))


def test_no_readable_image_is_an_error(folder, codec, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 11 images can be read"):
        make(folder, codec, tmp_path)


def test_processes_share_the_shards_and_make_the_same_files(folder, codec, tmp_path):
    bad = folder / "cat" / "03.png"
    bad.write_bytes(bad.read_bytes()[:40])
    alone, _ = make(folder, codec, tmp_path, shard_images=3)
    results = []

    def work(process):
        sizes = {"batch_size": 4, "shard_images": 3}
        results.append(cached_latents(load(folder), codec, tmp_path / "three", **sizes, share=(process, 3)))

    workers = [threading.Thread(target=work, args=(process,)) for process in (2, 1, 0)]
    for worker in workers[:2]:
        worker.start()
        worker.join(0.5)
    assert results == []  # each process waits for all
    workers[2].start()
    for worker in workers:
        worker.join(20)
    assert {cache.folder.name for cache in results} == {alone.folder.name}
    files = [{p.name: p.read_bytes() for p in cache.folder.iterdir()} for cache in (alone, results[0])]
    assert len(files[0]) == 5
    assert files[0] == files[1]


def test_a_killed_encoding_resumes_with_the_missing_shards(folder, codec, tmp_path):
    cache, _ = make(folder, codec, tmp_path, shard_images=3)
    whole = {p.name: p.read_bytes() for p in cache.folder.iterdir()}
    (cache.folder / "index.json").unlink()
    (cache.folder / "shard-00000003-00000006.safetensors").unlink()
    killed = (
        "import os, sys; from iptv2_diffusion.files import atomic\n"
        "with atomic(sys.argv[1]) as temporary:\n    temporary.write_bytes(b'half'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", killed, str(cache.folder / "shard-00000003-00000006.safetensors")])
    assert len(list(cache.folder.glob(".tmp-*"))) == 1
    kept = (cache.folder / "shard-00000000-00000003.safetensors").stat().st_mtime_ns
    again, messages = make(folder, codec, tmp_path, shard_images=3)
    assert "encoded 3 images of 11" in messages[0]
    assert (cache.folder / "shard-00000000-00000003.safetensors").stat().st_mtime_ns == kept
    assert {p.name: p.read_bytes() for p in again.folder.iterdir()} == whole


def test_two_runs_that_make_the_same_cache_do_not_meet(folder, codec, tmp_path, monkeypatch):
    """Another run, here or on another machine, is writing the same shard: its file does not change."""
    whole, _ = make(folder, codec, tmp_path)
    shard = "shard-00000000-00000011.safetensors"
    (whole.folder / shard).unlink()
    paths = []
    for host in (socket.gethostname(), "other-1"):
        with monkeypatch.context() as other, contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            other.setattr(os, "getpid", os.getppid)
            other.setattr(socket, "gethostname", lambda host=host: host)
            paths.append(stack.enter_context(atomic(whole.folder / shard)))
            raise KeyboardInterrupt
        paths[-1].write_bytes(b"half")
    make(folder, codec, tmp_path)
    assert len(set(paths)) == 2
    assert [path.read_bytes() for path in paths] == [b"half"] * 2


@pytest.mark.parametrize("flips", [True, False])
def test_crops_are_stored_and_drawn(folder, codec, tmp_path, flips):
    images = load(folder)
    cache, _ = make(folder, codec, tmp_path, dtype="float32", crops=3, flips=flips)
    order = DataOrder(COUNT, 0)
    run = RunDraws(order, 32, cache.latent_shape, [slice(0, 32)])
    source = EncodedLatents(images, codec, run, start=0, encoding=Encoding(flips, 3))
    draws = draw_step(order, 0, 32, cache.latent_shape)
    latents, _ = cache.batch(draws)
    ((encoded, _, _),) = source.micro_batches(0)
    assert torch.allclose(latents, encoded, atol=1e-5)
    crops = (draws.crops * 3).long().tolist()
    assert set(crops) == {0, 1, 2}
    for row, (item, flip, crop) in enumerate(zip(draws.items.tolist(), draws.flips.tolist(), crops, strict=True)):
        pixels = images.get(item, flip=flip and flips, crop=crop)["pixel_values"]
        mean, std = codec.encode_moments(pixels[None])
        assert torch.allclose(latents[row], (mean + std * draws.posterior_noise[row])[0], atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_on_the_fly_gives_what_the_cache_gives(folder, codec, tmp_path, processes):
    cache, _ = make(folder, codec, tmp_path, dtype="float32")
    order = DataOrder(COUNT, 1)
    run = RunDraws(order, 8, cache.latent_shape, own_slices(8, processes, processes - 1, 2))
    encoded, cached = EncodedLatents(load(folder), codec, run, start=3), CachedLatents(cache, run)
    for step in (3, 4):
        draws = draw_step(order, step, 8, cache.latent_shape)
        pairs = zip(encoded.micro_batches(step), cached.micro_batches(step), run.slices, strict=True)
        for (*ours, our_draws), (*theirs, their_draws), part in pairs:
            for left, right, expected in zip(ours, theirs, cache.batch(draws[part]), strict=True):
                assert torch.allclose(left, right, atol=1e-5)
                assert torch.equal(right, expected)
            assert torch.equal(our_draws.noise, draws.noise[part])
            assert torch.equal(their_draws.noise, draws.noise[part])
    with pytest.raises(RuntimeError, match="out of order"):
        next(encoded.micro_batches(9))


def test_fingerprints_of_parquet_follow_its_content(folder, tmp_path):
    def fingerprint(count):
        data = load_image_dataset(folder).cast_column("image", datasets.Image()).select(range(count))
        path = tmp_path / f"{count}.parquet"
        data.map(lambda row: row).to_parquet(path)
        return dataset_fingerprint(ImageTensors(load_image_dataset(path), size=SIZE))

    assert fingerprint(4) == fingerprint(4)
    assert fingerprint(4) != fingerprint(5)


def test_fingerprints_of_images_behind_urls_follow_their_names(folder):
    """Like Hub repositories whose images `datasets` downloads one by one."""
    urls = [path.as_uri() for path in sorted(folder.rglob("*.png"))]

    def fingerprint(*paths):
        features = datasets.Features({"image": datasets.Image(decode=False)})
        records = [{"bytes": None, "path": path} for path in paths]
        images = ImageTensors(datasets.Dataset.from_dict({"image": records}, features=features), size=SIZE)
        assert images.valid_indices() == [0, 1]
        return dataset_fingerprint(images)

    assert fingerprint(*urls[:2]) == fingerprint(*urls[:2])
    assert fingerprint(*urls[:2]) != fingerprint(*urls[1:3])


def test_the_index_says_what_it_was_made_from(folder, codec, tmp_path):
    cache, _ = make(folder, codec, tmp_path)
    index = json.loads((cache.folder / "index.json").read_text())
    assert (index["codec"], index["count"], index["size"]) == (codec.fingerprint(), COUNT, [SIZE, SIZE])
    assert LatentCache(cache.folder).latent_shape == (4, 8, 8)
