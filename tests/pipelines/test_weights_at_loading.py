"""Incomplete, foreign and misshapen weights are refused at loading, with their names, by every loading function."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from tiny_pipelines import save_pipeline

from iptv2_diffusion import IPTV2Pipeline, IPTV2RestorationPipeline, create_model
from iptv2_diffusion.models.loading import load_whole
from iptv2_diffusion.pipelines.restore_cli import CommandError, main

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = create_model("restoration-tiny", sigma_conditioning="map")
    IPTV2RestorationPipeline(model).save_pretrained(folder / "restorer")
    return {kind: save_pipeline(folder / kind, kind) for kind in ("iptv2", "dit")} | {"restorer": folder / "restorer"}


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a pipeline in which `change` has changed a component's weights."""

    def damaged(kind, component, change):
        shutil.copytree(saved[kind], tmp_path / kind)
        path = tmp_path / kind / component / WEIGHTS
        weights = load_file(path)
        weights = change(weights) or weights
        save_file(weights, path, metadata={"format": "pt"})
        return tmp_path / kind

    return damaged


def without_one(weights):
    weights.pop(sorted(weights)[3])


COMPONENTS = [("iptv2", "transformer"), ("iptv2", "vae"), ("dit", "transformer"), ("dit", "vae"), ("restorer", "model")]


@pytest.mark.parametrize(("kind", "component"), COMPONENTS)
@pytest.mark.parametrize("loader", [DiffusionPipeline, None])
def test_a_missing_weight_is_named(damaged, kind, component, loader):
    folder = damaged(kind, component, without_one)
    missing = sorted(load_file(folder / component / WEIGHTS))  # the name that is not there is not among these
    cls = loader or (IPTV2RestorationPipeline if kind == "restorer" else IPTV2Pipeline)
    with pytest.raises(ValueError, match=r"1 weight \(.+\) is missing.*download or save it again") as caught:
        cls.from_pretrained(folder)
    name = str(caught.value).split("1 weight (")[1].split(")")[0]
    assert name not in missing
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"module.{k}": v for k, v in w.items()}, r"saved from a wrapped model \(DataParallel\)"),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "saved from a compiled model"),
        (
            lambda w: {f"{k[:-7]}.lora_A.weight": v for k, v in w.items() if k.endswith("weight")},
            r"an adapter \(LoRA\)",
        ),
        (lambda w: w.update(surplus=torch.zeros(1)), r"1 weight \(surplus\) is unexpected"),
        (lambda w: w.update({sorted(w)[0]: torch.zeros(5, 7)}), r"misshapen, .* is \[5, 7\], not"),
    ],
)
@pytest.mark.parametrize(("kind", "component"), [("iptv2", "transformer"), ("restorer", "model")])
def test_what_the_file_seems_to_be_instead(damaged, kind, component, change, message):
    folder = damaged(kind, component, change)
    with pytest.raises(ValueError, match=message) as caught:
        DiffusionPipeline.from_pretrained(folder)
    assert len(str(caught.value)) < 700
    with pytest.raises(ValueError, match=message):
        create_model(str(folder / component))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(("kind", "component"), COMPONENTS)
def test_whole_and_complex_numbers_are_no_weights(damaged, kind, component, dtype):
    def cast_one(weights):
        name = sorted(weights)[0]
        weights[name] = weights[name].to(dtype)

    folder = damaged(kind, component, cast_one)
    with pytest.raises(ValueError, match=r"safetensors: 1 weight \(.*\) is stored as [IUBC]\w+, not as floats"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_floats_of_every_width_load(damaged, dtype):
    folder = damaged("iptv2", "transformer", lambda weights: {k: v.to(dtype) for k, v in weights.items()})
    assert DiffusionPipeline.from_pretrained(folder).transformer.dtype == torch.float32


def test_the_weights_of_another_component_are_recognised(saved, damaged):
    vae = load_file(Path(saved["iptv2"]) / "vae" / WEIGHTS)
    with pytest.raises(ValueError, match="the file seems to be the weights of a VAE"):
        IPTV2Pipeline.from_pretrained(damaged("iptv2", "transformer", lambda _: vae))


def test_a_foreign_vae_is_refused(saved, damaged):
    dit = load_file(Path(saved["dit"]) / "transformer" / WEIGHTS)
    folder = damaged("dit", "vae", lambda _: dit)
    with pytest.raises(ValueError, match="weights of this AutoencoderKL are incomplete"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="weights of a DiT"):
        load_whole(AutoencoderKL, str(folder / "vae"))


def test_fused_weights_under_an_unfused_config_are_recognised(damaged):
    torch.manual_seed(0)
    fused = create_model("restoration-tiny", sigma_conditioning="map").fuse().state_dict()
    with pytest.raises(ValueError, match=r"config.json says unfused \(training\): the file may hold the fused form"):
        IPTV2RestorationPipeline.from_pretrained(damaged("restorer", "model", lambda _: fused))


def test_the_command_line_refuses_in_one_line_before_any_picture(damaged, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    command = [str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--sigma", "5", "--model"]
    with pytest.raises(CommandError, match=r"cannot load .*1 weight .* is missing") as caught:
        main([*command, str(damaged("restorer", "model", without_one))])
    assert "\n" not in str(caught.value)


def test_whole_weights_load_as_before(saved):
    for kind in ("iptv2", "dit"):
        assert isinstance(DiffusionPipeline.from_pretrained(saved[kind]), IPTV2Pipeline)
    model, info = type(create_model("restoration-tiny")).from_pretrained(
        Path(saved["restorer"]) / "model", output_loading_info=True
    )
    assert info["missing_keys"] == []
    assert isinstance(model, torch.nn.Module)
