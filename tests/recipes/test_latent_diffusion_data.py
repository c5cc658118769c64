"""Data of a latent-diffusion run: the classes of its images, in memory and as a stream, and its VAE."""

import io
import tarfile

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel
from PIL import Image

from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.latent_diffusion.data import load_codec, load_images
from iptv2_diffusion.training.errors import ConfigError, UserError


def load(data, **options):
    return load_images(LDMConfig(data=str(data), output_dir="", resolution=8, **options), Accelerator())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_heldout_split_keeps_the_class_numbers_of_training(tmp_path, streaming):
    """val/ lacks the first class: on its own it would number b and c from 0."""
    for split, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            path = tmp_path / split / name / "x.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
    _, heldout, names = load(tmp_path, heldout_split="val", streaming=streaming)
    assert names == ["a", "b", "c"]
    assert sorted(heldout.labels) == [1, 2]


def test_class_numbers_of_a_stream_stay(tmp_path):
    """Shards do not name classes: their labels are numbers."""
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


def codec_of(vae, **options):
    return load_codec(LDMConfig(vae=str(vae), resolution=16, **options), torch.device("cpu"))


KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
DC = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
}


@pytest.mark.parametrize(
    ("kind", "config"), [(AutoencoderKL, KL), (AutoencoderTiny, TINY), (AutoencoderDC, DC)], ids=["kl", "tiny", "dc"]
)
@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_any_vae_of_diffusers_is_loaded_whole_from_its_folder(tmp_path, kind, config, subfolder):
    vae = kind(**config)
    vae.save_pretrained(tmp_path / (subfolder or ""))
    codec = codec_of(tmp_path, vae_subfolder=subfolder)
    assert type(codec.vae) is kind
    assert not codec.vae.training
    assert not any(p.requires_grad for p in codec.vae.parameters())
    saved = vae.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in codec.vae.state_dict().items())


def test_an_unsafe_vae_is_refused_in_one_line(tmp_path):
    AutoencoderKL(**KL).save_pretrained(tmp_path / "pickle", safe_serialization=False)
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "unet")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"_class_name": "NoSuchVAE"}')
    for name, told in (("pickle", "safetensors"), ("unet", "UNet2DModel; give a VAE"), ("unknown", "NoSuchVAE")):
        with pytest.raises(UserError, match=told) as caught:
            codec_of(tmp_path / name)
        assert "\n" not in str(caught.value)
