"""ONNX files of tiny models agree with the models at every size; wrong options are refused."""

import json

import pytest
import torch
from kl_vae import make_kl_vae

from iptv2_diffusion import IPTV2RestorationModel, IPTV2Transformer2DModel
from iptv2_diffusion.pipelines import export_cli, onnx_export
from iptv2_diffusion.pipelines.command_line import CommandError

needs_onnx = pytest.mark.skipif(
    any(onnx_export.importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="onnx and onnxruntime are not installed: pip install 'iptv2-diffusion[export]'",
)
SMALL = {"channels": 16, "layers_per_stage": (1, 1, 1), "num_attention_heads": 2, "window_size": 4}


def flat_restorer():
    """One level and one attention: exported in a second."""
    options = {"layers_per_stage": (1,), "attention_pattern": ("focal",), "num_attention_heads": 1}
    return IPTV2RestorationModel(**{**SMALL, **options})


def denoiser():
    return IPTV2Transformer2DModel(16, num_class_embeds=3, conditioning_dim=32, grid_stride=(2, 1), **SMALL)


def mapped_restorer():
    return IPTV2RestorationModel(
        unshuffle=2, sigma_conditioning="map", grid_size=4, **{**SMALL, "layers_per_stage": (1,)}
    )


def tasked_restorer():
    options = {"attention_pattern": ("focal",), "conditioning_dim": 16, "layers_per_stage": (1,)}
    return IPTV2RestorationModel(in_channels=1, sigma_conditioning="vector", num_tasks=2, **{**SMALL, **options})


def vae():
    return make_kl_vae(8, 8, norm_num_groups=4)


def saved(make, folder):
    """A folder with the model, whose weights differ from the zeros of the initialisation."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@needs_onnx
@pytest.mark.parametrize("make", [denoiser, mapped_restorer, tasked_restorer, vae])
def test_the_command_writes_a_graph_for_all_sizes_and_checks_it(make, tmp_path, capsys):
    folder = saved(make, tmp_path / "model")
    assert export_cli.main([str(folder), str(tmp_path / "model.onnx"), "--check"]) == 0
    assert capsys.readouterr().out.count("largest difference") == 7
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".onnx"] == ["model.onnx"]


@needs_onnx
def test_the_check_refuses_the_graph_of_another_model(tmp_path, monkeypatch):
    folder = saved(flat_restorer, tmp_path / "model")
    export = onnx_export.export_onnx

    def disturbed(graph, path):
        export(graph, path)
        graph.module.model.head.bias.add_(1e-3)

    monkeypatch.setattr(onnx_export, "export_onnx", disturbed)
    with pytest.raises(CommandError, match=r"differs from the model by 1\.0e-03"):
        export_cli.main([str(folder), str(tmp_path / "model.onnx"), "--check"])
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out.onnx"], "has no config.json; give the folder"),
        (["unet", "out.onnx"], "holds a UNet2DModel"),
        (["unet", "out.onnx", "--part", "denoiser"], "is not a pipeline"),
        (["pipeline", "out.onnx", "--part", "restorer"], "choose --part denoiser or vae-decoder"),
        (["unet", "nowhere/out.onnx"], "its folder does not exist"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name, kind in (
        ("unet", "config.json", "UNet2DModel"),
        ("pipeline", "model_index.json", "IPTV2Pipeline"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(CommandError, match=message):
        export_cli.main(arguments)


@pytest.mark.parametrize("options", [["out.pt"], ["out.pt", "--format", "onnx"], ["out.onnx", "--sigma", "5"]])
def test_options_that_do_not_fit(options, capsys):
    with pytest.raises(SystemExit):
        export_cli.parse(["model", *options])
    assert "error" in capsys.readouterr().err


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"iptv2-diffusion\[export\]"):
        onnx_export.require("a_package_that_is_not_there")


def test_weights_beyond_the_limit_of_a_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    monkeypatch.setattr(onnx_export, "require", lambda package: None)
    with pytest.raises(ValueError, match="an ONNX file holds at most"):
        onnx_export.export_onnx(onnx_export.graph_of(denoiser()), tmp_path / "out.onnx")
