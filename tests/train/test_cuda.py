"""On a GPU: the CPU's functions and gradients, half precision, compilation, graphs, and whole runs of two scripts.

Skipped if torch finds no GPU. docs/performance.md says which of these tests have been run, and on which card.
"""

import copy
import json
import os
import subprocess
import sys

import ldm_runs
import numpy as np
import pytest
import torch
from PIL import Image

from iptv2_diffusion import IPTV2Pipeline, IPTV2RestorationPipeline, create_model
from iptv2_diffusion.evaluation.timed_steps import Autocast
from iptv2_diffusion.training.cuda_graphs import GraphedModel
from iptv2_diffusion.training.logging import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
PRESETS = ["tiny", "emoji64-s", "restoration-tiny", "restoration-nano"]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN's default rounds to 10 bits


def make(name):
    """A model in which every parameter has an effect (gates and heads start at zero), and its inputs."""
    torch.manual_seed(0)
    model = create_model(name)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if name.startswith("restoration"):
        given = [torch.rand(2, 3, 64, 72)]
        if model.config.sigma_conditioning is not None:
            given.append(torch.tensor([5.0, 50.0]))
        return model, given
    side = model.config.sample_size
    return model, [torch.randn(2, 4, side, side), torch.tensor([10.0, 700.0]), torch.tensor([0, 3])]


def forward_and_gradients(model, given):
    sample = model(*given).sample
    sample.double().square().mean().backward()
    return sample.detach(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def on_gpu(model, given, memory_format=torch.channels_last):
    return copy.deepcopy(model).to("cuda", memory_format=memory_format), [x.cuda() for x in given]


def error(value, reference):
    value, reference = value.double().cpu(), reference.double().cpu()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("name", PRESETS)
def test_forward_and_gradients_are_the_cpus(name, memory_format):
    model, given = make(name)
    expected, gradients = forward_and_gradients(model, given)
    sample, found = forward_and_gradients(*on_gpu(model, given, memory_format))
    assert error(sample, expected) < 1e-4
    whole = torch.cat([g.flatten() for g in gradients.values()])
    assert error(torch.cat([found[k].flatten() for k in gradients]), whole) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", PRESETS)
def test_autocast_is_near_float32(name, dtype):
    model, given = on_gpu(*make(name))
    expected, gradients = forward_and_gradients(model, given)
    model.zero_grad()
    with torch.autocast("cuda", dtype):
        sample, found = forward_and_gradients(model, given)
    assert error(sample, expected) < 0.03
    whole = torch.cat([g.flatten() for g in gradients.values()])
    assert error(torch.cat([found[k].flatten() for k in gradients]), whole) < 0.1


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_fused_is_the_same_function(name):
    model, given = on_gpu(*make(name))
    assert error(model.fuse()(*given).sample, model(*given).sample) < 1e-4


@pytest.mark.parametrize("name", ["tiny", "restoration-tiny"])
def test_compiled_training_step_is_the_same(name):
    torch._dynamo.reset()
    model, given = on_gpu(*make(name))
    expected, gradients = forward_and_gradients(model, given)
    model.zero_grad()
    model.compile_repeated_blocks(dynamic=False)
    sample, found = forward_and_gradients(model, given)
    assert error(sample, expected) < 1e-3
    whole = torch.cat([g.flatten() for g in gradients.values()])
    assert error(torch.cat([found[k].flatten() for k in gradients]), whole) < 1e-2


def launch(script, *options):
    """`accelerate launch` as on a GPU machine, although other tests may have selected the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_processes", "1"]
    command += [str(ldm_runs.ROOT / "train" / script), *map(str, options)]
    done = subprocess.run(command, cwd=ldm_runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_generator_trains_resumes_and_draws(tmp_path, precision):
    ground = ldm_runs.lay_ground(tmp_path)
    options = f"--config {ground}/run.yaml --mixed_precision {precision} --kid_samples 0 --kid_every 0".split()
    printed = launch("train_ldm.py", *options, "--output_dir", tmp_path / "whole")
    assert "on cuda" in printed
    parts = (*options, "--output_dir", tmp_path / "parts", "--lr_schedule", "constant", "--max_train_steps")
    launch("train_ldm.py", *parts, 10)
    assert "resumed from" in launch("train_ldm.py", *parts, 30, "--cuda_graphs", precision != "no")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    assert all(np.isfinite(list(whole.values())))

    pipe = IPTV2Pipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    wanted = {"num_inference_steps": 2, "output_type": "np"}
    images = pipe([0, 1], generator=[torch.Generator().manual_seed(i) for i in range(2)], **wanted).images
    again = pipe.to("cuda")([0, 1], generator=[torch.Generator().manual_seed(i) for i in range(2)], **wanted).images
    assert np.abs(images - again).max() < 0.02


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", PRESETS)
def test_graphs_replay_the_same_steps(name, precision):
    """Five steps of SGD on changing inputs, one of them with another batch size, agree with the eager model."""
    model, given = on_gpu(*make(name))
    twin = copy.deepcopy(model)
    kind = {"no": "float32", "bf16": "bfloat16"}[precision]
    models = (GraphedModel(Autocast(model, "cuda", kind)), Autocast(twin, "cuda", kind))
    for step in range(5):
        batch = [x.roll(step, -1) if x.ndim == 4 else x for x in given]
        batch = [x[:1] for x in batch] if step == 3 else batch
        for call, owner in zip(models, (model, twin), strict=True):
            call(*batch, return_dict=False)[0].float().square().mean().backward()
            with torch.no_grad():
                for p in owner.parameters():
                    p -= 1e-3 * (torch.zeros_like(p) if p.grad is None else p.grad)
            owner.zero_grad(set_to_none=True)
    left, right = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, twin))
    start = torch.cat([p.detach().flatten() for p in make(name)[0].parameters()]).cuda()
    assert error(left - start, right - start) < (1e-3 if precision == "no" else 0.05)
    with torch.no_grad():
        assert error(model(*given).sample, twin(*given).sample) < (1e-4 if precision == "no" else 0.01)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_restorer_trains_and_restores(tmp_path, precision, graphs):
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((128, 96), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{number}.png")
    options = {
        "data": tmp_path / "photos", "heldout": tmp_path / "photos", "cache_dir": tmp_path / "cache",
        "patch_sizes": "16,32",
        "patch_steps": 30,
        "model": "restoration-tiny", "model_overrides": json.dumps({"sigma_conditioning": "map"}), "batch_size": 8,
        "noise": "25,25", "max_train_steps": 60, "learning_rate": 2e-3, "heldout_size": 64,
        "log_every": 1, "report_to": "none",
        "mixed_precision": precision, "cuda_graphs": graphs, "output_dir": tmp_path / "run",
    }  # fmt: skip
    printed = launch("train_restoration.py", *(word for key, value in options.items() for word in (f"--{key}", value)))
    assert "on cuda" in printed
    found = list(losses(tmp_path / "run").values())
    assert np.mean(found[-10:]) < 0.8 * np.mean(found[:10])

    pipe = IPTV2RestorationPipeline.from_pretrained(tmp_path / "run" / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = tmp_path / "photos/0.png"
    whole = pipe(picture, sigma=25, output_type="np", tile=None).images[0]
    pipe.to("cuda")
    for tile in (None, "auto", 64):
        assert np.abs(pipe(picture, sigma=25, output_type="np", tile=tile).images[0] - whole).max() < 0.02
