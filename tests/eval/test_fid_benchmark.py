"""fid_benchmark.py end to end on tiny pipelines, with EfficientNet-Lite0 and with an Inception of random weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from script_loading import load_script
from tiny_pipelines import save_pipeline

from iptv2_diffusion.evaluation.feature_extractors import efficientnet_lite0, extract_features, inception_v3
from iptv2_diffusion.evaluation.generation_metrics import (
    frechet_distance,
    frechet_distance_pca,
    half_half_floor,
    inception_score,
    kid,
    precision_recall,
    statistics,
)
from iptv2_diffusion.evaluation.sample_folder import SampleFolder
from iptv2_diffusion.models.presets import PRESETS
from iptv2_diffusion.training.errors import ConfigError, UserError
from iptv2_diffusion.training.parsing import parse_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "fid_benchmark.py"
COUNT = 12


@pytest.fixture(scope="module")
def script():
    return load_script("eval/fid_benchmark.py")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """`photos/*.png`, the same in `reference.npz`, a run of train_ldm.py, a DiT, and Inception's random weights."""
    folder, random = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    pictures = random.integers(0, 256, (COUNT + 2, 16, 16, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "photos" / f"{index:02d}.png")
    np.savez(folder / "reference.npz", arr_0=pictures)
    save_pipeline(folder / "run" / "pipeline")
    rows = [{"step": 10, "seconds": 36.0}, {"step": 40, "seconds": 1800.0}, {"step": 40, "heldout_loss": 1.0}]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_pipeline(folder / "dit", "dit")
    return folder


def arguments(ground, output, models, *options):
    config = {
        "models": models,
        "num_samples": COUNT,
        "num_inference_steps": 2,
        "reference": str(ground / "photos"),
        "resolution": 16,
        "pca_components": 3,
        "repeats": 3,
        "allow_small_n": True,
        "extractors": ["efficientnet-lite0@32"],
        "output_dir": str(output),
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *map(str, options)]


@pytest.fixture(scope="module")
def scored(script, ground, tmp_path_factory):
    """Two models against the folder."""
    pytest.importorskip("efficientnet_lite_pytorch")
    models = [
        {"pipeline": str(ground / "run" / "pipeline")},
        {"name": "dit", "pipeline": str(ground / "dit"), "guidance_scale": 2.0, "training_steps": 7},
    ]
    output = tmp_path_factory.mktemp("scored") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert script.main(arguments(ground, output, models, "--published", "true")) == 0
    return output


class TestResults:
    def test_figures_are_those_of_the_metrics_on_the_saved_images(self, scored, ground):
        results = json.loads((scored / "results.json").read_text())
        extractor = efficientnet_lite0(32)
        photos = [np.asarray(Image.open(path)) for path in sorted((ground / "photos").iterdir())]
        real = extractor(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2))
        for row in results["models"]:
            images = [np.asarray(Image.open(scored / row["name"] / "images" / f"{i:06d}.png")) for i in range(COUNT)]
            fake = extractor(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
            scores = row["scores"]["efficientnet-lite0@32"]
            assert scores["fd"] == pytest.approx(frechet_distance(fake, real), rel=1e-4)
            assert scores["fd_pca"] == pytest.approx(frechet_distance_pca(fake, real, 3), rel=1e-4)
            assert scores["kid"] == pytest.approx(kid(fake, real), rel=1e-4)
            assert (scores["precision"], scores["recall"]) == pytest.approx(precision_recall(fake, real))
            assert all(scores[f"{name}_error"] > 0 for name in ("fd", "fd_pca", "kid"))
        floor = results["floor"]["efficientnet-lite0@32"]
        assert floor["fd"] == pytest.approx(half_half_floor(real), rel=1e-4)
        assert floor["kid"] == pytest.approx(half_half_floor(real, kid), rel=1e-4)

    def test_results_state_what_determines_them(self, scored):
        results = json.loads((scored / "results.json").read_text())
        ours, dit = results["models"]
        assert (ours["name"], ours["training_steps"], ours["training_hours"]) == ("run-cfg1", 40, 0.5)
        assert (dit["name"], dit["training_steps"], dit["training_hours"]) == ("dit", 7, None)
        assert (ours["guidance_scale"], dit["guidance_scale"]) == (1.0, 2.0)
        recipe = dit["generation"]["recipe"]
        assert recipe["scheduler_config"]["variance_type"] == "learned_range"
        assert {"seed", "num_inference_steps", "files", "device"} <= recipe.keys()
        assert results["extractors"]["efficientnet-lite0@32"]["sha256"].startswith("57934424")
        assert "bilinear with antialias to 32" in results["extractors"]["efficientnet-lite0@32"]["preprocessing"]
        assert results["reference"]["count"] == COUNT + 2
        assert len(results["reference"]["sha256"]) == 64
        assert {"torch", "torch-fidelity", "diffusers"} <= results["versions"].keys()

    def test_table_and_plot(self, scored):
        text = (scored / "results.md").read_text()
        assert "FD (efficientnet-lite0@32)" in text
        assert "FID" not in text
        assert "| run-cfg1 |" in text
        assert "Floor of FD (efficientnet-lite0@32), half of the reference against the other (7 images each)" in text
        assert Image.open(scored / "fid.png").width > 1000  # over GMACs and over hours

    def test_a_second_run_reuses_the_images(self, scored, script, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        before = {path: path.stat().st_mtime_ns for path in scored.rglob("*.png") if path.name != "fid.png"}
        first = json.loads((scored / "results.json").read_text())
        assert script.main(["--config", str(scored.parent / "out.yaml")]) == 0
        second = json.loads((scored / "results.json").read_text())
        assert [row["scores"] for row in second["models"]] == [row["scores"] for row in first["models"]]
        assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
        assert len(before) == 2 * COUNT


@pytest.mark.slow
def test_inception_scores_against_stored_statistics(script, ground, tmp_path, monkeypatch):
    """FID and sFID against the statistics in an ADM file, KID and recall against its images."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    extractor = inception_v3(tmp_path / "inception.pth")
    images = np.load(ground / "reference.npz")["arr_0"][:6]
    real = extractor.outputs(torch.from_numpy(images).permute(0, 3, 1, 2))
    stored = {head: statistics(real[head] + 0.1 * real[head].std()) for head in ("pool", "spatial")}
    named = {"mu": stored["pool"].mean, "sigma": stored["pool"].covariance}
    named |= {"mu_s": stored["spatial"].mean, "sigma_s": stored["spatial"].covariance}
    np.savez(tmp_path / "adm.npz", arr_0=images, **{key: value.numpy() for key, value in named.items()})
    options = ["--reference", tmp_path / "adm.npz", "--extractors", "inception", "--repeats", 0, "--num_samples", 5]
    options += ["--inception_weights", tmp_path / "inception.pth"]
    models = [{"name": "ours", "pipeline": str(ground / "run" / "pipeline")}]
    assert script.main(arguments(ground, tmp_path / "out", models, *options)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    fake = extract_features(extractor, SampleFolder(tmp_path / "out" / "ours").batches(5))
    scores = results["models"][0]["scores"]["inception-v3-compat@299"]
    assert scores["fd"] == pytest.approx(frechet_distance(fake["pool"], stored["pool"]), rel=1e-4)
    assert scores["sfid"] == pytest.approx(frechet_distance(fake["spatial"], stored["spatial"]), rel=1e-4)
    assert scores["kid"] == pytest.approx(kid(fake["pool"], real["pool"]), rel=1e-4, abs=1e-9)
    assert scores["inception_score"] == pytest.approx(inception_score(fake["logits"]), rel=1e-6)
    assert "fd_error" not in scores
    assert "| FID |" in (tmp_path / "out" / "results.md").read_text()
    assert results["reference"]["statistics"] == "stored in the file"


class TestRefusals:
    def run(self, script, ground, tmp_path, *options, models=()):
        return script.main(arguments(ground, tmp_path / "out", list(models), "--pipeline", ground / "dit", *options))

    def test_fewer_samples_or_references_than_features(self, script, ground, tmp_path):
        pytest.importorskip("efficientnet_lite_pytorch")
        with pytest.raises(ConfigError, match=r"12 samples of dit-cfg1 for 1280 features .* --allow_small_n"):
            self.run(script, ground, tmp_path, "--allow_small_n", "false")
        with pytest.raises(ConfigError, match="14 references for 1280 features"):
            self.run(script, ground, tmp_path, "--allow_small_n", "false", "--num_samples", 1281)
        with pytest.raises(ConfigError, match="there are 3 images to compare; use at least 4"):
            self.run(script, ground, tmp_path, "--num_samples", 3)
        with pytest.raises(ConfigError, match=f"pca_components is 14, but {COUNT + 2} references of .* allow 13"):
            self.run(script, ground, tmp_path, "--pca_components", 14)
        assert not (tmp_path / "out").exists()  # refused before sampling

    def test_weights_that_are_not_here(self, script, ground, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(
            UserError, match=r"weights-inception-2015-12-05-6726825d\.pth .*6726825d0af5.*--inception_wei"
        ):
            self.run(script, ground, tmp_path, "--extractors", "inception")

    def test_unknown_options_encoders_and_equal_names(self, script, ground, tmp_path):
        with pytest.raises(ConfigError, match="unknown option 'guidance' in models; did you mean guidance_scale"):
            self.run(script, ground, tmp_path, models=[{"guidance": 2}])
        with pytest.raises(UserError, match="extractor is 'vgg'; use inception"):
            self.run(script, ground, tmp_path, "--extractors", "vgg")
        with pytest.raises(ConfigError, match="models share a name: a, a"):
            self.run(script, ground, tmp_path, models=[{"name": "a"}, {"name": "a"}])
        with pytest.raises(UserError, match="no such folder"):
            self.run(
                script, ground, tmp_path, "--extractors", "efficientnet-lite0@32", "--reference", tmp_path / "none"
            )


@pytest.mark.parametrize("size", [256, 512])
def test_configurations_of_imagenet_score_what_the_training_configurations_make(script, size):
    config = parse_config(script.BenchmarkConfig, ["--config", str(ROOT / f"configs/benchmark/imagenet{size}.yaml")])
    entries = config.entries()
    recipe = yaml.safe_load((ROOT / f"configs/imagenet{size}.yaml").read_text())
    folder = Path(recipe["output_dir"])
    assert folder.name == recipe["model"]
    sizes = ("s", "b", "l", "xl")
    trained = {folder.with_name(name) for k in sizes for name in (f"iptv2-{k}", f"dit-{k}-2") if name in PRESETS}
    assert {Path(e.generation.pipeline).parent for e in entries} == trained
    assert len(trained) == 8
    assert sorted({e.generation.guidance_scale for e in entries}) == [1.0, 1.5]
    for entry in entries:
        g = entry.generation
        assert (g.num_samples, g.num_inference_steps, g.scheduler, g.labels) == (50_000, 250, "ddpm", "random")


@pytest.mark.parametrize("name", ["../esc", "/tmp/esc", "a/../../esc", ".."])
def test_names_that_leave_the_output_folder_are_refused(script, name):
    with pytest.raises(ConfigError, match="does not stay inside") as caught:
        script.BenchmarkConfig(models=[{"name": name}]).entries()
    assert "\n" not in str(caught.value)


def listen_to_ctrl_c():
    """In the child: undo that a shell in the background makes its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_scoring_leaves_the_images_and_no_traceback(ground, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    words = arguments(ground, tmp_path / "out", [{"pipeline": str(ground / "run" / "pipeline")}], "--repeats", 10**6)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words], env=environment, preexec_fn=listen_to_ctrl_c, **pipes
    )
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("out/*/images/*.png"))) < COUNT and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    presses = 0
    while process.poll() is None and presses < 60:  # a library's callback may swallow one
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        presses += 1
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "run the same command to continue" in output or "run the same command to continue" in output
    assert len(list(tmp_path.glob("out/*/images/*.png"))) == COUNT
    assert not (tmp_path / "out/results.json").exists()


def test_a_model_of_nan_is_one_line_and_no_picture(script, ground, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_pipeline(tmp_path / "broken")
    weights = tmp_path / "broken/transformer/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: value * float("nan") for name, value in state.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{COUNT} images are missing, for example 0: .* NaN or infinity in float32"):
        script.main(arguments(ground, tmp_path / "out", [{"pipeline": str(tmp_path / "broken")}]))
    assert not list(tmp_path.glob("out/*/images/*.png"))
    assert not (tmp_path / "out/results.json").exists()
