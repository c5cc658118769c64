"""iptv2-generate: images of chosen classes, by seed, with a grid, an adapter and one-line errors."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from kl_vae import make_kl_vae
from PIL import Image

from iptv2_diffusion import IPTV2Pipeline, create_model
from iptv2_diffusion.commands import generate
from iptv2_diffusion.training.adapters import adapter_state_dict, add_lora
from iptv2_diffusion.training.errors import UserError


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.manual_seed(0)
    vae = make_kl_vae(4, 4)
    model = create_model("tiny", num_class_embeds=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("pipeline")
    names = {0: "ant", 1: "bee", 2: "sea / lake"}
    IPTV2Pipeline(model, vae, FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(folder / "base")
    add_lora(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    IPTV2Pipeline.save_lora_weights(folder / "lora", adapter_state_dict(model))
    return folder / "base"


@pytest.fixture
def draw(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def draw(*words):
        return generate.main([*map(str, words), "--pipeline", str(pipeline), "--steps", "2"])

    return draw


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_depend_on_class_and_seed_alone(draw, tmp_path, capsys):
    assert draw("bee", 2, "-n", 3, "--seed", 5, "--grid", "out/sheet.png", "-o", "a", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert [(row["class"], row["seed"]) for row in written] == [
        *(("bee", seed) for seed in (5, 6, 7)),
        *(("sea / lake", seed) for seed in (5, 6, 7)),
    ]
    assert written[3]["file"] == "a/sea-lake-5.png"
    assert Image.open("a/bee-5.png").size == (16, 16)
    sheet = Image.open("out/sheet.png")
    assert sheet.size[0] > 3 * 64
    assert draw("bee", "-n", 1, "--seed", 7, "-o", "b") == 0
    assert abs(pixels("a/bee-7.png") - pixels("b/bee-7.png")).max() <= 1  # a different batch rounds differently
    assert abs(pixels("a/bee-7.png") - pixels("a/bee-6.png")).max() > 1
    assert capsys.readouterr().out == "1 images in b/\n"


def test_classes_are_listed(draw, capsys):
    assert draw("--list-classes") == 0
    assert capsys.readouterr().out.split("\n")[:2] == ["    0  ant", "    1  bee"]
    assert draw("--list-classes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["2"] == "sea / lake"


def test_an_adapter_changes_the_pictures(draw, pipeline):
    assert draw("bee", "-n", 1) == 0
    assert draw("bee", "-n", 1, "-o", "adapted", "--lora", pipeline.parent / "lora") == 0
    assert abs(pixels("generated/bee-0.png") - pixels("adapted/bee-0.png")).max() > 1


def test_from_an_image_and_a_mask(draw, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save("picture.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save("mask.png")
    assert draw("bee", "-n", 2, "--image", "picture.png", "--strength", 0, "-o", "same") == 0
    assert np.array_equal(pixels("same/bee-0.png"), pixels("same/bee-1.png"))  # the VAE's round trip
    assert draw("bee", "-n", 1, "--image", "picture.png", "-o", "changed") == 0
    assert abs(pixels("changed/bee-0.png") - pixels("same/bee-0.png")).max() > 1
    assert draw("bee", "-n", 2, "--image", "picture.png", "--mask", "mask.png", "-o", "inpainted") == 0
    drawn = pixels("inpainted/bee-1.png")
    assert np.array_equal(drawn[:, 8:], picture[:, 8:])
    assert not np.array_equal(drawn[:, :8], picture[:, :8])
    assert draw("bee", "-n", 1, "--image", "picture.png", "--height", 24, "--width", 32, "-o", "wide") == 0
    assert Image.open("wide/bee-0.png").size == (32, 24)


def test_a_guidance_model(draw, pipeline, tmp_path):
    torch.manual_seed(1)
    create_model("tiny", num_class_embeds=3).save_pretrained(tmp_path / "weak")
    assert draw("bee", "-n", 1) == 0
    assert draw("bee", "-n", 1, "-o", "guided", "--guidance-model", tmp_path / "weak") == 0
    assert abs(pixels("generated/bee-0.png") - pixels("guided/bee-0.png")).max() > 1
    create_model("tiny", num_class_embeds=5).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"cannot load .*other: the guidance model has 5 classes, but the transformer 3"
    ):
        draw("bee", "--guidance-model", tmp_path / "other")


@pytest.mark.parametrize("option", ["--mask", "--strength"])
def test_a_mask_and_a_strength_need_an_image(draw, capsys, option):
    with pytest.raises(SystemExit):
        draw("bee", option, "0.5")
    assert f"{option} needs the image to change: give --image FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bee", "--image", "absent.png"], "absent.png"),
        (["bee", "--image", "foreign/notes.txt"], "notes.txt"),
        (["bea"], "unknown class name 'bea'; the nearest of 3 names: "),
        (["3"], "class label 3 is out of range; the model has classes 0 to 2"),
        (["bee", "--height", "17"], "17"),
        (["bee", "--lora", "absent"], "cannot load absent: no such folder here"),
        (["bee", "--device", "gpu"], "gpu"),
        (["bee", "-o", "foreign"], "foreign"),
    ],
)
def test_errors_are_one_line(draw, tmp_path, words, message):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=message) as error:
        draw(*words)
    assert "\n" not in str(error.value)
    assert (tmp_path / "foreign/notes.txt").read_text() == "mine"


def test_what_cannot_be_written_is_refused_before_anything_is_drawn(draw, tmp_path, monkeypatch):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    monkeypatch.setattr(generate, "draw_batch", None)
    for words in (["-o", "foreign"], ["--grid", "sheet.xyz"], ["--grid", "sheet"], ["--grid", "foreign"]):
        with pytest.raises(UserError, match=r"foreign has no record|give the name of an image file"):
            draw("bee", *words)
    assert (tmp_path / "foreign/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("seed", [-1, 2**63 - 3, 10**30])
def test_seeds_out_of_range(draw, seed, capsys):
    with pytest.raises(SystemExit):
        draw("bee", "--seed", seed)
    assert "must be in [0, 2**63 - 4]" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_drawn(draw, monkeypatch):
    whole, drawn = generate.draw_batch, []

    def interrupted(*arguments):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(whole(*arguments))
        return drawn[0]

    monkeypatch.setattr(generate, "draw_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw("ant", "bee", "-n", 2)
    assert [pixels(f"generated/ant-{seed}.png").shape for seed in (0, 1)] == [(16, 16, 3)] * 2


def test_names_that_look_alike_or_are_long_get_files_of_their_own():
    names = {
        0: "a b",
        1: "a/b",
        2: "A b",
        3: "\u732b" * 300,
        None: "unlabelled",
        4: "..",
        5: "x\ny",
        6: "-r \U0001f98a",
    }
    stems = generate.file_stems(names)
    assert len({stem.casefold() for stem in stems.values()}) == len(names)
    assert stems[1] == "a-b-class-1"
    assert all(len(f"{stem}-{2**63}.png".encode()) < 255 for stem in stems.values())
    assert not any("/" in stem or "\n" in stem for stem in stems.values())
