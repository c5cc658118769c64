"""The page's actions without Gradio: seeds, settings in files, cancelling, 16 bits."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from iptv2_diffusion.data.sixteen_bit import read_16_bit, write_16_bit
from iptv2_diffusion.pipelines.app.actions import (
    GenerateSettings,
    RestoreSettings,
    compare,
    generate,
    noise_level,
    read_upload,
    restore,
    save_images,
    scheduler_names,
)
from iptv2_diffusion.pipelines.app.jobs import Cancelled, Jobs
from iptv2_diffusion.pipelines.app.model_list import find_models
from iptv2_diffusion.pipelines.command_line import CommandError

PIXELS = 1_000_000


@pytest.fixture(scope="module")
def models(model_folder):
    return find_models([model_folder])


def silent(item):
    pass


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_pipelines_are_sorted_by_what_they_do(models, model_folder, tmp_path):
    assert set(models.generators) == {"iptv2", "dit"}
    assert set(models.restorers) == {"denoise", "two-tasks"}
    assert set(find_models([model_folder / "dit"]).generators) == {"dit"}
    with pytest.raises(CommandError, match="contains no pipeline folder"):
        find_models([tmp_path])
    with pytest.raises(CommandError, match="is not a folder"):
        find_models([tmp_path / "absent"])


def test_an_image_is_made_again_from_the_settings_in_its_file(models, tmp_path):
    settings = GenerateSettings((2, 0), number=2, seed=5, steps=3, guidance_scale=2.0)
    images = generate(models("iptv2"), settings, silent)
    paths = save_images(images, "iptv2", settings, str(tmp_path))
    with Image.open(paths[3]) as image:
        saved = json.loads(image.text["parameters"])
    assert (saved.pop("model"), saved["labels"], saved["seed"]) == ("iptv2", [0], 8)
    again = generate(models("iptv2"), GenerateSettings(**saved), silent)
    assert np.abs(pixels(again)[0].astype(int) - pixels(images)[3]).max() <= 1
    assert len({image.tobytes() for image in images}) == 4


def test_progress_and_previews_are_reported(models):
    told = []
    images = generate(models("dit"), GenerateSettings((1,), number=5, steps=3), told.append)
    assert [(step, steps) for step, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert len(told[0][2]) == 4
    assert told[0][2][0].size == images[0].size


@pytest.mark.parametrize("model", ["iptv2", "dit"])
def test_every_scheduler_that_is_offered_runs(models, model):
    pipeline = models(model)
    saved = pipeline.scheduler
    for name in scheduler_names(pipeline):
        generate(pipeline, GenerateSettings((1,), number=1, steps=3, scheduler=name), silent)
        assert pipeline.scheduler is saved
    with pytest.raises(ValueError, match="DDPM does not fit"):
        generate(pipeline, GenerateSettings(scheduler="DDPM"), silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GenerateSettings((0, 1, 2), number=30), "90 images were requested; choose 1 to 64"),
        (GenerateSettings(seed=-1), "seed is -1"),
        (GenerateSettings((7,)), "class label 7 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(models, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(models("iptv2"), settings, silent)


def photograph(path):
    write_16_bit(np.random.default_rng(0).integers(0, 65536, (40, 48, 3), np.uint16), path)
    return str(path)


def test_restored_files_have_the_requested_bits(models, tmp_path):
    source, tiles = photograph(tmp_path / "a.png"), []
    for bits, strength in ((16, 0.0), (16, 1.0), (8, 1.0)):
        settings = RestoreSettings(25.0, strength=strength, bits=bits)
        before, after, file, line = restore(models("denoise"), source, settings, PIXELS, str(tmp_path), tiles.append)
        assert "48 × 40 pixels; σ 25" in line
        assert np.array_equal(np.asarray(before), np.asarray(after)) == (strength == 0)
        assert file.endswith("a-restored.png")
        if bits == 8:
            assert np.asarray(Image.open(file)).dtype == np.uint8
        else:
            assert np.array_equal(read_16_bit(file), read_16_bit(source)) == (strength == 0)
    assert tiles == [(1, 1)] * 3


def test_a_blind_model_of_two_tasks(models, tmp_path):
    source = photograph(tmp_path / "a.png")
    results = [
        restore(models("two-tasks"), source, RestoreSettings(9.0, task), PIXELS, str(tmp_path), silent)
        for task in (0, 1)
    ]
    assert not np.array_equal(*(np.asarray(after) for _, after, _, _ in results))
    assert "σ" not in results[0][3]


def test_the_noise_level_is_estimated(tmp_path):
    noisy = 128 + 20 * np.random.default_rng(0).standard_normal((128, 128, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    assert noise_level(str(tmp_path / "a.png"), PIXELS)[1] == pytest.approx(20, rel=0.1)


def test_uploads_that_are_not_images_are_refused_without_the_server_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^a\.png cannot be read as an image"):
        read_upload(str(tmp_path / "a.png"), PIXELS)
    Image.new("RGB", (50, 40)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"^b\.png cannot be read as an image: .*2000 pixels"):
        read_upload(str(tmp_path / "b.png"), 1000)
    with pytest.raises(ValueError, match="there is no photograph;"):
        read_upload(None, PIXELS)


def test_a_comparison_counts_each_model(models, tmp_path):
    sides = [compare(models(name), GenerateSettings((0, 1), number=3, steps=2), silent) for name in ("iptv2", "dit")]
    assert [side.image.size for side in sides] == [(48, 32)] * 2
    assert len({side.parameters for side in sides}) == len({side.macs for side in sides}) == 2
    picture = read_upload(photograph(tmp_path / "a.png"), PIXELS)
    restorer = compare(models("denoise"), (picture, RestoreSettings(25.0)), silent)
    assert restorer.image.size == (48, 40)
    assert min(restorer.macs, restorer.seconds) > 0


def test_a_cancelled_job_stops_and_the_next_one_runs(models):
    jobs, steps = Jobs(), []
    running = jobs.run("me", lambda report: generate(models("iptv2"), GenerateSettings(steps=100), report))
    steps.append(next(running))
    jobs.cancel("somebody else")
    steps.append(next(running))
    jobs.cancel("me")
    with pytest.raises(Cancelled):
        steps.extend(running)
    assert len(steps) < 100
    *_, images = jobs.run("me", lambda report: generate(models("iptv2"), GenerateSettings(steps=1), report))
    assert len(images) == 4


def test_a_job_whose_reader_is_gone_stops():
    jobs, stopped = Jobs(), threading.Event()

    def work(report):
        try:
            while True:
                report(1)
        except Cancelled:
            stopped.set()
            raise

    running = jobs.run("me", work)
    next(running)
    running.close()
    assert stopped.wait(10)


def test_the_error_of_a_job_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(Jobs().run("me", lambda report: 1 / 0))
