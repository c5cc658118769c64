"""Model cards of trainings and of the shipped weights, and the upload to a Hub on this machine."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iptv2_diffusion import IPTV2RestorationPipeline
from iptv2_diffusion.commands import train_restoration, train_vae
from iptv2_diffusion.training.errors import ConfigError, UserError
from iptv2_diffusion.training.model_card import CardContents, card_data, kind_of, last_metrics
from iptv2_diffusion.training.options import TrainingConfig

ROOT = Path(__file__).parents[2]
# The Hub's names of tasks that our models solve
TASKS = {"unconditional-image-generation", "image-to-image"}


def check(card: ModelCard) -> ModelCardData:
    """Check what the Hub's validation asks of metadata, offline; return them."""
    data = card.data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag in TASKS
    assert all(isinstance(tag, str) and tag for tag in data.tags)
    assert data.license is None or data.license == data.license.lower()
    for result in data.eval_results or []:
        assert result.dataset_name
        assert result.dataset_type
        assert isinstance(result.metric_value, float)
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))  # what is written is read back
    assert again.to_dict() == data.to_dict()
    return data


@pytest.mark.parametrize("path", sorted((ROOT / "assets").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_a_shipped_card_has_metadata_and_pictures(path):
    card = ModelCard.load(path)
    data = check(card)
    assert data.license == "apache-2.0"
    assert "ipt-v2" in data.tags or "vae" in data.tags
    pictures = [line.split("](")[1].split(")")[0] for line in card.text.splitlines() if line.startswith("![")]
    assert pictures
    assert all((path.parent / picture).is_file() for picture in pictures)


@pytest.fixture
def pictures(tmp_path):
    y, x = np.mgrid[:80, :80].astype(np.float32)
    (tmp_path / "photos").mkdir()
    for seed in range(6):
        waves = [128 + 90 * np.sin(x / (5 + seed)) * np.cos(y / (6 + channel)) for channel in range(3)]
        Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(tmp_path / f"photos/{seed}.png")
    return tmp_path / "photos"


def restore(pictures, output, *words, steps=2):
    """Train a tiny restorer in this process; return the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = {
        "output_dir": output, "data": pictures, "heldout": pictures, "cache_dir": pictures.parent / "cache",
        "model": "restoration-tiny", "patch_sizes": "16", "batch_size": 4, "max_train_steps": steps,
        "heldout_size": 32, "heldout_images": 2, "lr_schedule": "constant", "num_threads": 1, "preview_every": 1,
        "eval_every": 1, "checkpoint_every": 0, "degradations": "motion_blur", "motion_blur": "3,5",
        "model_overrides": '{"sigma_conditioning": null}', "report_to": "none",
    }  # fmt: skip
    return train_restoration.main([*(str(w) for pair in options.items() for w in (f"--{pair[0]}", pair[1])), *words])


def test_a_restorer_gets_a_card_with_metrics_and_a_picture(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/train_restoration.py", "--data", "my photos"])
    assert restore(pictures, tmp_path / "run", "--license", "mit", "--data_license", "cc-by-4.0") == 0
    folder = tmp_path / "run/pipeline"
    card = ModelCard.load(folder / "README.md")
    data = check(card)
    assert (data.license, data.pipeline_tag) == ("mit", "image-to-image")
    assert {"ipt-v2", "image-restoration"} <= set(data.tags)
    assert data.datasets is None  # a folder here is no data set of the Hub
    result = {r.metric_name: r for r in data.eval_results}["psnr_motionblur"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert result.metric_value == [row["psnr_motionblur"] for row in rows if "psnr_motionblur" in row][-1]
    assert (result.metric_type, result.dataset_name) == ("psnr", "photos")
    assert "accelerate launch train/train_restoration.py --data 'my photos'" in card.text
    assert "Licence of the data: cc-by-4.0." in card.text
    assert "Licence of the weights: mit." in card.text
    assert "![" in card.text
    assert Image.open(folder / "restored.png").size[0] > 90
    values = {}
    exec(card.text.split("```python\n")[1].split("```")[0].replace("photo.png", str(pictures / "0.png")), values)
    assert values["image"].size == (80, 80)

    # a second run replaces the card, and keeps what a user has put beside it
    (folder / "notes.txt").write_text("mine")
    assert restore(pictures, tmp_path / "run", steps=3) == 0
    text = (folder / "README.md").read_text()
    assert "3 steps of 4 samples" in text
    assert "Licence of the data: unknown." in text
    assert check(ModelCard(text)).license is None
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_card_of_the_users_stays(pictures, tmp_path):
    assert restore(pictures, tmp_path / "run", "--dry_run") == 0
    assert (tmp_path / "run/dry_run/pipeline/README.md").is_file()
    (tmp_path / "run/pipeline").mkdir()
    (tmp_path / "run/pipeline/restored.png").write_text("mine")
    assert restore(pictures, tmp_path / "run") == 0
    assert (tmp_path / "run/pipeline/restored.png").read_text() == "mine"
    assert (tmp_path / "run/pipeline/README.md").is_file()


def test_a_vae_gets_a_card(pictures, tmp_path):
    options = {
        "output_dir": tmp_path / "vae", "data": pictures, "heldout_split": "none", "heldout_fraction": "0.3",
        "resolution": 16, "block_out_channels": "8,16", "norm_num_groups": 4, "batch_size": 4, "max_train_steps": 1,
        "report_to": "tensorboard", "num_threads": 1, "eval_every": 0, "preview_every": 0,
    }  # fmt: skip
    assert train_vae.main([str(word) for pair in options.items() for word in (f"--{pair[0]}", pair[1])]) == 0
    card = ModelCard.load(tmp_path / "vae/vae/README.md")
    [result] = check(card).eval_results
    assert (result.metric_name, result.metric_type) == ("heldout_psnr", "psnr")
    assert 5 < result.metric_value < 40
    assert (tmp_path / "vae/vae/reconstructions.png").is_file()
    code = card.text.split("```python\n")[1].split("```")[0]
    values = {"images": torch.zeros(1, 3, 16, 16)}
    exec(code, values)
    assert values["latents"].shape == (1, 4, 8, 8)
    assert values["images"].shape == (1, 3, 16, 16)
    shown = logged(tmp_path / "vae", "reconstructions", step=1)
    assert np.array_equal(shown, np.asarray(Image.open(tmp_path / "vae/reconstructions.png").convert("RGB")))


def logged(folder, name, step):
    """A picture of TensorBoard's event files, (H, W, 3)."""
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0}).Reload()
    [event] = [event for event in events.Images(name) if event.step == step]
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def test_previews_and_results_reach_tensorboard(pictures, tmp_path):
    assert restore(pictures, tmp_path / "run", "--report_to", "tensorboard", steps=3) == 0
    for name, step, path in (
        ("preview", 1, "previews/step-00000001.png"),
        ("preview", 2, "previews/step-00000002.png"),
        ("restored", 3, "restored.png"),
    ):
        picture = np.asarray(Image.open(tmp_path / "run" / path).convert("RGB"))
        assert np.array_equal(logged(tmp_path / "run", name, step), picture)
        assert picture.std() > 10


def test_what_is_a_name_on_the_hub(tmp_path):
    """Data and base models are named in the metadata only if they are there."""

    class Config(TrainingConfig):
        data = "someone/photos"

    contents = CardContents(summary="", task="image-to-image", usage="", metrics={"kid": 1.0}, base_model="me/base")
    data = card_data("title", Config(), contents)
    assert (data.datasets, data.base_model) == (["someone/photos"], "me/base")
    assert data.eval_results[0].dataset_type == "someone/photos"
    for name in ("assets/iptv2-emoji64", "emoji64", None):
        assert (
            card_data("title", Config(), CardContents(summary="", task="", usage="", base_model=name)).base_model
            is None
        )
    assert [kind_of(name) for name in ("psnr_sigma25", "heldout_loss", "kid", "other")] == [
        "psnr",
        "loss",
        "kid",
        "other",
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kid": 2.0, "loss": 1}\n{"step": 2, "kid": null}\n')
    assert last_metrics(tmp_path, "kid|heldout_loss") == {"kid": 2.0}


# --------------------------------------------------------------------------------------------------------------------
# Upload


def test_the_result_is_uploaded_with_its_card(pictures, tmp_path, hub, capfd):
    assert restore(pictures, tmp_path / "run", "--push_to_hub", "us/blurred", "--hub_private") == 0
    files = hub.repositories["us/blurred"]
    assert {"README.md", "model_index.json", "model/diffusion_pytorch_model.safetensors", "restored.png"} <= set(files)
    assert hub.private["us/blurred"] is True
    data = check(ModelCard(files["README.md"].decode()))
    assert data.model_name == "blurred"
    assert "from_pretrained('us/blurred')" in files["README.md"].decode()
    assert f"uploaded {tmp_path / 'run/pipeline'} to {hub.address}/us/blurred" in capfd.readouterr().out
    for name, content in files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    restorer = IPTV2RestorationPipeline.from_pretrained(tmp_path / "downloaded")
    assert restorer(str(pictures / "0.png")).images[0].size == (80, 80)
    # a run from this run's configuration does not upload over it
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["push_to_hub"] is False


def test_the_name_is_that_of_the_folder_and_a_dry_run_uploads_nothing(pictures, tmp_path, hub):
    assert restore(pictures, tmp_path / "my-run", "--push_to_hub", "--dry_run") == 0
    assert hub.repositories == {"me/my-run": {}}


def test_a_failed_upload_says_how_to_repeat_it(pictures, tmp_path, hub):
    hub.refuse = 507
    with pytest.raises(
        UserError, match=r"its upload failed: .* the disk of the Hub is full; to repeat it, run hf upload me/run "
    ) as error:
        restore(pictures, tmp_path / "run", "--push_to_hub")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("offline", "push_to_hub needs the Hub, but HF_HUB_OFFLINE is set"),
        ("no token", r"push_to_hub needs a token of the Hub; run `hf auth login`, or set HF_TOKEN"),
        ("wrong token", r"push_to_hub cannot write to run: .*401"),
        ("wrong name", r"push_to_hub cannot write to a//b: "),
        ("no network", r"push_to_hub cannot write to run: .*"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_training(pictures, tmp_path, hub, monkeypatch, change, message):
    if change == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if change == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "absent"))
    if change == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    if change == "no network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    name = ["a//b"] if change == "wrong name" else []
    with pytest.raises(ConfigError, match=message) as error:
        restore(pictures, tmp_path / "run", "--push_to_hub", *name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_licence_is_an_identifier_of_the_hub(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"license is 'Apache 2.0'; use the Hub's identifier, such as apache-2.0"):
        restore(pictures, tmp_path / "run", "--license", "Apache 2.0")
