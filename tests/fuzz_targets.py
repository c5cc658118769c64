"""Targets of the fuzzer."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from fuzz_inputs import (
    mutate,
    mutate_file,
    mutate_safetensors,
    mutate_text,
    nasty_line,
    sound_array,
    sound_images,
    sound_tar,
    tar_of,
)
from hostile_images import encoded
from PIL import Image

# ---------------------------------------------------------------------------------------------------------------------
# Targets. Each takes a random generator and a scratch folder, and may raise errors that its callers print in one line


class Targets:
    """Functions to fuzz."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.input = b""  # input of the current target, kept if it is a finding

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """Return valid pipeline folders by kind. Imports are late because torch and diffusers take seconds."""
        from iptv2_diffusion import IPTV2RestorationPipeline, create_model

        sys.path.insert(0, str(Path(__file__).parent / "eval"))
        from tiny_pipelines import save_pipeline

        folders = {kind: Path(save_pipeline(self.scratch / kind, kind)) for kind in ("iptv2", "dit")}
        restorer = create_model("restoration-tiny", sigma_conditioning="map")
        IPTV2RestorationPipeline(restorer.fuse()).save_pretrained(self.scratch / "restorer")
        return {**folders, "restorer": self.scratch / "restorer"}

    @functools.cached_property
    def pipeline(self):
        """Return a restorer without a progress bar."""
        from iptv2_diffusion import IPTV2RestorationPipeline

        pipeline = IPTV2RestorationPipeline.from_pretrained(self.folders["restorer"])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def yaml(self) -> str:
        """Return a valid configuration."""
        from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
        from iptv2_diffusion.training.options import save_config

        save_config(LDMConfig(), self.scratch / "config.yaml")
        return (self.scratch / "config.yaml").read_text(encoding="utf-8")

    def prepare(self, names: list[str]) -> None:
        """Create what these targets need, so that the time does not count for an input."""
        if {"restore", "weights", "single", "drawn", "page"} & set(names):
            assert self.pipeline
        if "options" in names:
            assert self.yaml
            import iptv2_diffusion.models.presets
        if {"archive", "folder", "table", "cache"} & set(names):
            import datasets

            import iptv2_diffusion.data.images

            datasets.disable_progress_bars()
        if "record" in names:
            import iptv2_diffusion.evaluation.sample_folder  # noqa: F401
        if "cache" in names:
            assert self.cached
        if "checkpoint" in names:
            assert self.run

    def read(self, rng: random.Random, scratch: Path) -> None:
        """The reader, its conversions and the metadata that it keeps."""
        from iptv2_diffusion.data.image_files import Limits, as_rgb, read_image_file

        self.input = sound_images(rng) if rng.random() < 0.1 else mutate(sound_images(rng), rng)
        picture = read_image_file(self.input, Limits(4_000_000))
        assert picture.pixels.dtype in (np.uint8, np.uint16, np.float32)
        assert picture.pixels.ndim == 3
        assert 1 <= picture.pixels.shape[2] <= 4
        assert picture.pixels.size
        as_rgb(picture.pixels)

    def restore(self, rng: random.Random, scratch: Path) -> None:
        """The command line's one picture: read, restored with strength 0, written with its metadata."""
        from iptv2_diffusion.data.own_folder import OwnFolder
        from iptv2_diffusion.pipelines.restore_cli import parse, restore

        suffix = rng.choice((".png", ".jpg", ".webp", ".bmp", ".tif", ".ppm"))
        self.input = mutate(sound_images(rng), rng) if rng.random() < 0.7 else sound_images(rng)
        source = scratch / f"a{suffix}"
        source.write_bytes(self.input)
        words = [str(source), "-o", str(scratch / "out"), "--model", "m", "--sigma", "5", "--strength", "0"]
        words += ["--max-pixels", "40000", *rng.choice(([], ["--bits", "8"], ["--bits", "16"]))]
        folder = OwnFolder.claim(scratch / "out", "restored pictures")
        restore(self.pipeline, source, source.name, folder.writing, parse(words))
        assert folder.holds(source.name)

    def archive(self, rng: random.Random, scratch: Path) -> None:
        """Tars of every kind, read in place or as a stream, every image decoded."""
        from iptv2_diffusion.data.images import ImageTensors, load_image_dataset

        self.input = mutate(sound_tar(rng, rng.choice(("folders", "tars", "samples"))), rng)
        (scratch / "x.tar").write_bytes(self.input)
        streaming = rng.random() < 0.3
        data = load_image_dataset(scratch / "x.tar", cache_dir=scratch / "cache", streaming=streaming)
        if not streaming:
            ImageTensors(data, size=8).valid_indices()

    def folder(self, rng: random.Random, scratch: Path) -> None:
        """Folders of strange names, splits and metadata files."""
        from iptv2_diffusion.data.images import ImageTensors, load_train_and_heldout

        names = ["cat", "Train", "test", ".hidden", "__MACOSX", "val", "dog [1]", "a b", "é", "train", "x" * 200]
        root = scratch / "data"
        for index in range(rng.randrange(0, 6)):
            inner = root.joinpath(*rng.choices(names, k=rng.randrange(0, 3)))
            inner.mkdir(parents=True, exist_ok=True)
            suffix = rng.choice((".png", ".jpg", ".PNG", ".heic", ".txt", ""))
            content = encoded(Image.new("RGB", (8, 8)), "PNG")
            (inner / f"{index}{suffix}").write_bytes(content if rng.random() < 0.8 else mutate(content, rng))
        root.mkdir(exist_ok=True)
        if rng.random() < 0.4:
            text = rng.choice(('{"file_name": "0.png", "label": 1}\n', "file_name,label\n0.png,cat\n1.png,dog\n"))
            self.input = mutate_text(text, rng).encode("utf-8", "replace")
            (root / rng.choice(("metadata.jsonl", "metadata.csv", "metadata.parquet"))).write_bytes(self.input)
        splits = ("train", "test", "train[:50%]", "train[1:1]", "val", "x", "train[", "train[0:2]+train[1:]", "")
        train, _ = load_train_and_heldout(
            root, train_split=rng.choice(splits), heldout_split=rng.choice((None, *splits)), heldout_fraction=0.3
        )
        ImageTensors(train, size=8).valid_indices()

    def weights(self, rng: random.Random, scratch: Path) -> None:
        """A pipeline folder with one file mutated, loaded as the command lines load it."""
        from diffusers import DiffusionPipeline

        from iptv2_diffusion.models.presets import create_model
        from iptv2_diffusion.training.errors import loading

        kind = rng.choice(sorted(self.folders))
        shutil.copytree(self.folders[kind], scratch / "p")
        path = rng.choice(sorted(p for p in (scratch / "p").rglob("*") if p.is_file()))
        self.input = str(path.relative_to(scratch)).encode() + b"\n" + mutate_file(path, rng)
        with loading(str(scratch / "p")):
            pipeline = DiffusionPipeline.from_pretrained(scratch / "p")
            if path.parent.name in ("transformer", "model"):
                create_model(str(path.parent))
        parameters = [
            p for part in pipeline.components.values() if hasattr(part, "parameters") for p in part.parameters()
        ]
        assert not any(p.device.type == "meta" for p in parameters)

    def options(self, rng: random.Random, scratch: Path) -> None:
        """Configurations, and models built from them."""
        from iptv2_diffusion.models.presets import create_model
        from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
        from iptv2_diffusion.training.parsing import parse_config

        self.input = mutate_text(self.yaml, rng).encode("utf-8", "replace")
        (scratch / "c.yaml").write_bytes(self.input)
        parse_config(LDMConfig, ["--config", str(scratch / "c.yaml")])
        values = {"channels": 8, "layers_per_stage": [1, 1, 1], "num_attention_heads": 1, "window_size": 4}
        values |= {"grid_stride": [2, 1], "conditioning_dim": 16, "sample_size": 8, "ffn_ratio": 2.0}
        self.input = mutate_text(json.dumps(values, indent=1), rng).encode("utf-8", "replace")
        (scratch / "model.json").write_bytes(self.input)
        create_model(str(scratch / "model.json"))

    def record(self, rng: random.Random, scratch: Path) -> None:
        """Records of folders, checkpoints' manifests and recipes of samples."""
        from iptv2_diffusion.data.own_folder import RECORD, OwnFolder
        from iptv2_diffusion.evaluation.sample_folder import SampleFolder
        from iptv2_diffusion.training.checkpoint import DamagedCheckpointError, is_ours, verify

        text = (
            '{"kind": "generated images"}\n{"file": "images/000000.png", "bytes": 3}\n{"file": "../x", "bytes": null}\n'
        )
        self.input = mutate_text(text, rng).encode("utf-8", "replace")
        (scratch / RECORD).write_bytes(self.input)
        outside = scratch.parent / "x"
        outside.write_bytes(b"mine")
        OwnFolder(scratch, "generated images").delete()
        assert outside.read_bytes() == b"mine"
        manifest = '{"step": 1, "files": {"a": {"bytes": 1, "sha256": "x"}},\n"config": {},\n"progress": {}}'
        (scratch / "manifest.json").write_text(mutate_text(manifest, rng), encoding="utf-8")
        is_ours(scratch)
        with contextlib.suppress(DamagedCheckpointError):
            verify(scratch)
        recipe = '{"recipe": {"seed": 1},\n"pipeline": "x",\n"versions": {}}'
        (scratch / "generation.json").write_text(mutate_text(recipe, rng), encoding="utf-8")
        SampleFolder(scratch).check({"seed": 1})

    # -----------------------------------------------------------------------------------------------------------------
    # Caches and checkpoints

    @functools.cached_property
    def cached(self):
        """Return images, the function that opens or makes their cache, and a valid cache."""
        import torch
        from diffusers import AutoencoderTiny

        from iptv2_diffusion.data.images import ImageTensors, load_image_dataset
        from iptv2_diffusion.data.latent_cache import cached_latents
        from iptv2_diffusion.latents import LatentCodec

        for index in range(5):
            path = self.scratch / "images" / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.new("RGB", (8, 8), (index, 2 * index, 0)), "PNG"))
        images = ImageTensors(load_image_dataset(self.scratch / "images"), size=8)
        torch.manual_seed(0)
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4}
        codec = LatentCodec(
            AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), **blocks).eval()
        )

        def open_or_make(folder: Path):
            return cached_latents(images, codec, folder, shard_images=2, say=lambda text: None)

        open_or_make(self.scratch / "cache")
        return open_or_make, self.scratch / "cache"

    def cache(self, rng: random.Random, scratch: Path) -> None:
        """A cache of latents with one file mutated: made again, refused, or as it was."""
        import torch

        open_or_make, sound = self.cached
        shutil.copytree(sound, scratch / "cache")
        path = rng.choice(sorted(p for p in (scratch / "cache").rglob("*") if p.is_file()))
        self.input = path.name.encode() + b"\n" + mutate_file(path, rng, mutate_safetensors)
        with contextlib.redirect_stderr(io.StringIO()):  # bars
            cache = open_or_make(scratch / "cache")
        assert cache.means(torch.arange(len(cache))).shape == (len(cache), 4, 4, 4)

    @functools.cached_property
    def run(self):
        """Return a function that opens a run's folder, and the folder of a valid run with a checkpoint."""
        import torch
        from accelerate import Accelerator

        from iptv2_diffusion.training.checkpoint import CheckpointManager

        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

        def manager(folder: Path):
            return CheckpointManager(folder, accelerator, {"width": 2}, say=lambda text: None)

        manager(self.scratch / "run").save(3, {"seconds": 1.5})
        return manager, self.scratch / "run"

    def checkpoint(self, rng: random.Random, scratch: Path) -> None:
        """A run's folder with a file of its checkpoint mutated or missing: resumed, set aside, or refused."""
        manager, sound = self.run
        shutil.copytree(sound, scratch / "run")
        path = rng.choice(sorted(p for p in (scratch / "run").rglob("*") if p.is_file()))
        if rng.random() < 0.6:
            path = scratch / "run" / "checkpoint-00000003" / "manifest.json"
        self.input = mutate_file(path, rng)
        if rng.random() < 0.1:
            path.unlink()
        (scratch / "mine").write_bytes(b"mine")
        opened = manager(scratch / "run")
        found = opened.latest()
        if found is not None:
            opened.load(found)
            opened.save(found.step, found.progress)
        opened.delete_all()
        assert (scratch / "mine").read_bytes() == b"mine"

    # -----------------------------------------------------------------------------------------------------------------
    # Published latents, tables, third-party checkpoints, MATLAB files, single files

    def features(self, rng: random.Random, scratch: Path) -> None:
        """Folders and tars of .npy files."""
        import torch

        from iptv2_diffusion.data.feature_folder import FeatureFolder, holds_features

        contents = {}
        for index in range(rng.randrange(1, 4)):
            for part, kind in (("features", "latent"), ("labels", "label")):
                content = sound_array(rng, kind if rng.random() < 0.9 else "odd")
                contents[f"x_{part}/{index}.npy"] = mutate(content, rng) if rng.random() < 0.4 else content
        self.input = b"".join(contents.values())
        if rng.random() < 0.5:
            path = scratch / "x.tar"
            archive = tar_of(contents, rng)
            path.write_bytes(mutate(archive, rng) if rng.random() < 0.5 else archive)
        else:
            path = scratch / "x"
            for name, content in contents.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
        if not holds_features(path):
            return
        latents = FeatureFolder(path, scratch / "cache")
        latents.means(torch.arange(len(latents)))

    def table(self, rng: random.Random, scratch: Path) -> None:
        """Parquet, arrow, CSV and JSON lines with images and labels of every type."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from iptv2_diffusion.data.images import ImageTensors, load_image_dataset

        png = encoded(Image.new("RGB", (8, 8)), "PNG")
        images = rng.choice(
            ([{"bytes": png, "path": "a"}] * 3, [png] * 3, ["a.png"] * 3, [[png]] * 3, [None, png, png], [1, 2, 3])
        )
        labels = rng.choice(
            ([0, 1, 2], ["a", "b", "b"], [-1, 0, 1], [0.5, 1.0, 2.0], [None, 1, 1], [[1], [2], [3]], [2**62, 0, 0])
        )
        names = rng.choice((("image", "label"), ("img", "fine_label"), ("image", "image2"), ("x", "y")))
        path = scratch / "data" / rng.choice(("train.parquet", "a.parquet", "test-00000-of-00001.parquet"))
        path.parent.mkdir()
        pq.write_table(pa.table(dict(zip(names, (images, labels), strict=True))), path)
        self.input = path.read_bytes() if rng.random() < 0.5 else mutate(path.read_bytes(), rng)
        path.write_bytes(self.input)
        data = load_image_dataset(rng.choice((path, path.parent)), cache_dir=scratch / "cache")
        ImageTensors(data, size=8).valid_indices()

    def published(self, rng: random.Random, scratch: Path) -> None:
        """.pt files of U-DiT's code, with a tensor or a byte changed."""
        import torch
        from udit_references import weights

        from iptv2_diffusion.models.udit_weights import convert_udit
        from iptv2_diffusion.pipelines.convert_cli import read_checkpoint

        state = weights()
        for _ in range(rng.randrange(0, 3)):
            name = rng.choice(sorted(state))
            odd = (torch.tensor(1.0), torch.zeros(3), torch.zeros(1, 1, 1, 1, 1), torch.zeros(0), torch.tensor([1, 2]))
            state[name] = rng.choice((*odd, state[name].double(), state[name].to(torch.complex64), state[name].half()))
            if rng.random() < 0.3:
                del state[name]
        content = rng.choice(({"ema": state}, state, {"ema": None}, [state], {**state, 1: torch.zeros(1)}, {"ema": {}}))
        torch.save(content, scratch / "x.pt")
        self.input = (scratch / "x.pt").read_bytes()
        if rng.random() < 0.5:
            self.input = mutate(self.input, rng)
        (scratch / "x.pt").write_bytes(self.input)
        found, _ = read_checkpoint(scratch / "x.pt")
        convert_udit(found, "x.pt", sample_size=8)

    def matlab(self, rng: random.Random, scratch: Path) -> None:
        """MATLAB's files of SIDD, and HDF5 files of DND."""
        from scipy.io import savemat

        from iptv2_diffusion.data.real_noise import DND, sidd_validation_blocks

        for name in ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"):
            values = rng.choice((np.zeros((1, 2, 4, 4, 3), np.uint8), np.zeros(3), "x", {"a": 1}))
            savemat(scratch / f"{name}.mat", {name: values}, do_compression=rng.random() < 0.5)
            self.input = mutate((scratch / f"{name}.mat").read_bytes(), rng)
            (scratch / f"{name}.mat").write_bytes(self.input)
        with contextlib.suppress(ValueError):
            list(sidd_validation_blocks(scratch))
        import h5py

        (scratch / "images_srgb").mkdir()
        with h5py.File(scratch / "info.mat", "w") as file:
            file["b"], file["s"] = np.array([[1.0, 1, 4, 4]]).T, np.array([[0.1]])
            for name, target in (("boundingboxes", "b"), ("sigma_srgb", "s")):
                file.create_dataset(f"info/{name}", data=np.array([[file[target].ref]], h5py.ref_dtype))
        with h5py.File(scratch / "images_srgb" / "0001.mat", "w") as file:
            file["InoisySRGB"] = np.zeros((3, 8, 8), np.float32)
        path = rng.choice((scratch / "info.mat", scratch / "images_srgb" / "0001.mat"))
        self.input = mutate(path.read_bytes(), rng)
        path.write_bytes(self.input)
        data = DND(scratch)
        for index in range(len(data)):
            data.crops(index)

    def single(self, rng: random.Random, scratch: Path) -> None:
        """A restorer as one file, whose description or header is changed."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from iptv2_diffusion.pipelines.single_file import DESCRIPTION, build_restorer, save_single_file

        path = self.scratch / "restorer.safetensors"
        if not path.exists():
            save_single_file(self.pipeline.model, path)
        weights = load_file(path)
        choice = rng.randrange(3)
        if choice == 0:
            text = bytes(weights[DESCRIPTION].tolist()).decode().replace(", ", ",\n")
            self.input = mutate_text(text, rng).encode("utf-8", "replace")
            weights[DESCRIPTION] = torch.frombuffer(bytearray(self.input or b" "), dtype=torch.uint8)
        elif choice == 1:
            del weights[DESCRIPTION]
            name = rng.choice(sorted(weights))
            weights[name] = rng.choice((torch.tensor(1.0), torch.zeros(2, 0), torch.zeros(1, 1, 1, 1, 1)))
            self.input = name.encode()
        else:
            self.input = mutate_safetensors(path.read_bytes(), rng)
            (scratch / "x.safetensors").write_bytes(self.input)
            try:
                weights = load_file(scratch / "x.safetensors")
            except (SafetensorError, OSError):
                return
        build_restorer(weights)

    # -----------------------------------------------------------------------------------------------------------------
    # Command lines and the web page

    def line(self, rng: random.Random, scratch: Path) -> None:
        """Options of every command, parsed."""
        import dataclasses

        from iptv2_diffusion.commands import generate
        from iptv2_diffusion.evaluation.generation_options import GenerationConfig
        from iptv2_diffusion.pipelines import convert_cli, export_cli, restore_cli
        from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
        from iptv2_diffusion.recipes.restoration.config import RestorationConfig
        from iptv2_diffusion.recipes.vae.config import VAEConfig
        from iptv2_diffusion.training.parsing import parse_config

        config = rng.choice((LDMConfig, RestorationConfig, VAEConfig, GenerationConfig, None))
        if config is not None:
            options = [f"--{field.name}" for field in dataclasses.fields(config)]
            words = nasty_line(rng, [*options, "--config"], ("emoji64", "auto", "tiny", "train"))
            self.input = repr((config.__name__, words)).encode()
            parse_config(config, words)
            return
        command = rng.choice((generate, convert_cli, export_cli, restore_cli))
        options = [
            "--sigma",
            "--task",
            "--tile",
            "--vae",
            "--format",
            "--seed",
            "-n",
            "-o",
            "--steps",
            "--guidance-scale",
            "--bits",
            "--resolution",
        ]
        words = nasty_line(rng, options, ("udit", "auto", "x.png", "x.onnx", "8"))
        self.input = repr((command.__name__, words)).encode()
        with contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):
            command.parse(words)

    def drawn(self, rng: random.Random, scratch: Path) -> None:
        """iptv2-generate with senseless numbers, up to its files."""
        from iptv2_diffusion.commands import generate

        numbers = ("0", "-1", "1", "2", "3", "nan", "inf", "1e300", "99999999999999999999", "0.5", "7", "16", "24")
        options = ("--seed", "--steps", "--guidance-scale", "--height", "--width", "--grid", "--lora", "--device")
        words = [rng.choice(("0", "1", "a", "-1", "99", "²", "zebra")) for _ in range(rng.randrange(0, 3))]
        words += ["-n", rng.choice(("1", "2")), "--steps", rng.choice(("1", "2")), "-o", str(scratch / "out")]
        for option in rng.sample(options, rng.randrange(0, 3)):
            words += [option, str(scratch / "x.png") if option == "--grid" else rng.choice(numbers)]
        self.input = repr(words).encode()
        words += ["--pipeline", str(self.folders[rng.choice(("iptv2", "dit"))])]
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):
            generate.main(words)

    def page(self, rng: random.Random, scratch: Path) -> None:
        """The web page's functions with odd settings and photographs."""
        from iptv2_diffusion.pipelines.app.actions import RestoreSettings, noise_level, restore

        self.input = mutate(sound_images(rng), rng) if rng.random() < 0.6 else sound_images(rng)
        path = scratch / rng.choice(("a.png", "a", "a.jpg.exe", "ü [1].tif"))
        path.write_bytes(self.input)
        numbers = (None, 0, 5, -1, 300, float("nan"), float("inf"), 1e300)
        strength = rng.choice((0, 1, 0.5, 2, float("nan")))
        strength = rng.choice((0, 1, 0.5, 2, float("nan")))
        settings = RestoreSettings(rng.choice(numbers), rng.choice((None, 0, -1, 9)), strength, rng.choice((8, 16)))
        if rng.random() < 0.3:
            noise_level(str(path), 40_000)
        restore(self.pipeline, str(path), settings, 40_000, str(scratch), lambda item: None)
