"""generate_samples.py: what images depend on, resumption, formats, and every kind of pipeline."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiTPipeline
from PIL import Image
from script_loading import load_script
from tiny_pipelines import KINDS, save_pipeline

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.evaluation.sampling import label_of
from iptv2_diffusion.training.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "generate_samples.py"
COUNT, STEPS = 21, 3


@pytest.fixture(scope="module")
def script():
    return load_script("eval/generate_samples.py")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: save_pipeline(folder / kind, kind) for kind in KINDS}


def words(pipeline, output, *options):
    fixed = ["--pipeline", pipeline, "--output_dir", output, "--num_samples", COUNT, "--num_inference_steps", STEPS]
    return [str(word) for word in (*fixed, "--guidance_scale", 1.5, *options)]


@pytest.fixture
def run(script, pipelines, tmp_path, monkeypatch):
    """Runs the script in this process; returns the folder."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name, *options, kind="iptv2"):
        assert script.main(words(pipelines[kind], tmp_path / name, *options)) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def reference(script, pipelines, tmp_path_factory):
    """An uninterrupted run of one process."""
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    folder = tmp_path_factory.mktemp("reference")
    assert script.main(words(pipelines["iptv2"], folder)) == 0
    return folder


def launch(pipeline, output, *options, processes=1):
    """The documented command, in a new process group."""
    launcher = ("--multi_gpu",) if processes > 1 else ("--cpu",)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", *launcher]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(SCRIPT)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command + words(pipeline, output, *options),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def images(folder):
    """Bytes of every file in images/ by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def pixels(folder):
    paths = sorted((folder / "images").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


class TestWhatAnImageDependsOn:
    def test_its_seed_and_label_as_in_a_call_of_the_pipeline(self, reference, pipelines):
        pipeline = IPTV2Pipeline.from_pretrained(pipelines["iptv2"])
        pipeline.transformer = pipeline.transformer.fuse()
        ours = pixels(reference)
        assert len(ours) == COUNT
        for index in (0, 7, 20):
            image = pipeline(
                index % 3,
                num_inference_steps=STEPS,
                guidance_scale=1.5,
                generator=generator_for(0, "image", index),
            ).images[0]
            assert np.abs(np.asarray(image).astype(int) - ours[index]).max() <= 1
        assert len(np.unique(ours, axis=0)) == COUNT

    def test_its_guidance_model(self, run, reference, pipelines, tmp_path):
        weak = pipelines["unconditional"]
        folder = run("guided", "--guidance_model", weak, "--num_samples", 3)
        pipeline = IPTV2Pipeline.from_pretrained(pipelines["iptv2"])
        pipeline.load_guidance_model(weak)
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.5, "generator": generator_for(0, "image", 1)}
        image = np.asarray(pipeline(1, **options).images[0]).astype(int)
        assert np.abs(image - pixels(folder)[1]).max() <= 1
        assert np.abs(image - pixels(reference)[1]).max() > 1
        with pytest.raises(ConfigError, match="guidance_files"):  # other images: not into the same folder
            run("guided", "--num_samples", 3)
        with pytest.raises(UserError, match=r"cannot load absent: no such folder here.*guidance model 'absent'"):
            run("other", "--guidance_model", "absent")
        with pytest.raises(UserError, match="the guidance model predicts epsilon, but the transformer flow"):
            run("other", "--guidance_model", pipelines["dit"])

    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_not_the_batch_size_to_the_last_byte(self, batch_size, run, reference):
        assert images(run("other", "--batch_size", batch_size)) == images(reference)

    def test_the_group_size_by_rounding_alone(self, run, reference):
        difference = np.abs(pixels(run("groups", "--group_size", 3)) - pixels(reference))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3

    def test_not_the_number_of_processes_to_the_last_byte(self, pipelines, tmp_path, reference):
        process = launch(pipelines["iptv2"], tmp_path / "two", "--batch_size", 4, processes=2)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert images(tmp_path / "two") == images(reference)
        drawn = [json.loads(line) for f in (tmp_path / "two").glob("seconds-*.jsonl") for line in f.open()]
        assert len(list((tmp_path / "two").glob("seconds-*.jsonl"))) == 2
        assert sum(row["images"] for row in drawn) == 24  # three groups of eight, each drawn once

    def test_not_the_number_of_other_images(self, run, reference):
        folder = run("few", "--num_samples", 6)
        before = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
        assert run("few") == folder
        assert images(folder) == images(reference)
        assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())

    def test_the_seed(self, run, reference):
        assert not set(images(run("seed", "--seed", 1)).values()) & set(images(reference).values())


class TestResumption:
    def test_missing_and_damaged_images_alone_are_drawn(self, run, reference):
        folder = run("damaged")
        before = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
        lost = [folder / "images" / name for name in ("000003.png", "000004.png", "000019.png")]
        lost[0].unlink()
        lost[1].write_bytes(lost[1].read_bytes()[:-20])
        lost[2].write_bytes(b"")
        (folder / "images" / ".tmp-000009.png").write_bytes(b"left by a kill")
        run("damaged")
        assert images(folder) == images(reference)
        changed = {path for path, moment in before.items() if path.stat().st_mtime_ns != moment}
        assert changed == set(lost)

    def test_after_kill_9_no_image_is_missing_or_drawn_twice(self, pipelines, tmp_path, run, reference):
        """A run that many steps slow down is killed after some images; the same command finishes it."""
        many = ("--num_inference_steps", 20)
        folder = tmp_path / "killed"
        process = launch(pipelines["iptv2"], folder, *many, "--group_size", 2)
        deadline = time.monotonic() + 300
        while len(list(folder.glob("images/0*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in folder.glob("images/0*.png")}
        assert 3 <= len(before) < COUNT
        run("killed", *many, "--group_size", 2)
        assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
        assert images(folder) == images(run("undisturbed", *many, "--group_size", 2))
        assert sorted(images(folder)) == [f"{i:06d}.png" for i in range(COUNT)]

    def test_images_of_other_settings_are_not_added_to(self, run, reference):
        folder = run("mixed")
        with pytest.raises(ConfigError, match=r"guidance_scale is 1\.5 there, 2\.0 here; use another folder"):
            run("mixed", "--guidance_scale", 2)
        with pytest.raises(ConfigError, match="files is"):
            run("mixed", kind="dit")
        assert images(folder) == images(reference)
        run("mixed", "--guidance_scale", 2, "--overwrite")
        assert images(folder).keys() == images(reference).keys()
        assert not set(images(folder).values()) & set(images(reference).values())


class TestLabelsAndFormats:
    def test_npz_is_adms(self, reference):
        with np.load(reference / f"samples_{COUNT}x16x16x3.npz", allow_pickle=False) as archive:
            assert archive["arr_0"].dtype == np.uint8
            assert np.array_equal(archive["arr_0"], pixels(reference))
            assert archive["arr_1"].tolist() == [i % 3 for i in range(COUNT)]

    def test_random_labels_are_uniform_and_belong_to_the_index(self, script):
        config = script.SamplesConfig(labels="random", seed=3)
        labels = [label_of(config, i, 10) for i in range(5000)]
        counts = np.bincount(labels, minlength=10)
        assert ((counts - 500) ** 2 / 500).sum() < 27.9  # the 0.1 % quantile of chi-squared with 9 degrees
        assert labels != [label_of(script.SamplesConfig(labels="random", seed=4), i, 10) for i in range(5000)]

    def test_class_counts_set_the_shares_of_any_number_of_images(self, script):
        config = script.SamplesConfig(class_counts=[1, 2, 7])
        labels = [label_of(config, i, 3) for i in range(40)]
        for start in range(0, 40, 10):
            assert np.bincount(labels[start : start + 10]).tolist() == [1, 2, 7]
        assert labels[:5].count(2) in (3, 4)  # spread, not one class after another
        with pytest.raises(ConfigError, match="class_counts is 1,0,7; each must be at least 1"):
            script.SamplesConfig(class_counts=[1, 0, 7])
        with pytest.raises(ConfigError, match="class_counts adds up to 10000000000, more than 10000000"):
            script.SamplesConfig(class_counts=[10**10 - 2, 1, 1])

    def test_images_follow_their_labels(self, run, reference):
        null, random = pixels(run("null", "--labels", "none")), pixels(run("random", "--labels", "random"))
        with np.load(run("random", "--labels", "random") / f"samples_{COUNT}x16x16x3.npz") as archive:
            same = archive["arr_1"] == np.arange(COUNT) % 3
        assert 0 < same.sum() < COUNT
        differing = np.abs(random - pixels(reference)).max(axis=(1, 2, 3)) > 1
        assert np.array_equal(differing, ~same)
        assert (np.abs(null - pixels(reference)).max(axis=(1, 2, 3)) > 1).all()

    def test_classes_are_chosen_by_name_or_number(self, run):
        with np.load(run("some", "--labels", "c,0", kind="dit") / f"samples_{COUNT}x16x16x3.npz") as archive:
            assert archive["arr_1"].tolist() == [2, 0] * (COUNT // 2) + [2]
        with pytest.raises(ConfigError, match="unknown class name 'd'; the nearest of 3 names: "):
            run("other", "--labels", "d", kind="dit")

    def test_unconditional_pipelines_have_no_labels(self, run):
        folder = run("unconditional", kind="unconditional")
        with np.load(folder / f"samples_{COUNT}x16x16x3.npz") as archive:
            assert archive.files == ["arr_0"]
        assert len(np.unique(pixels(folder), axis=0)) == COUNT


class TestPipelinesAndSchedulers:
    def test_diffusers_dit_gives_what_its_own_pipeline_gives(self, run, pipelines):
        folder = run("dit", "--num_samples", 4, kind="diffusers-dit")
        theirs = DiTPipeline.from_pretrained(pipelines["diffusers-dit"])
        theirs.set_progress_bar_config(disable=True)
        seeds = [generator_for(0, "image", i) for i in range(4)]
        result = theirs([0, 1, 2, 3], guidance_scale=1.5, num_inference_steps=STEPS, generator=seeds, output_type="pil")
        expected = np.stack([np.asarray(image) for image in result.images]).astype(int)
        assert np.abs(pixels(folder) - expected).max() <= 1
        assert json.loads((folder / "generation.json").read_text())["recipe"]["num_classes"] == 1000

    def test_dit_of_train_ldm_samples_with_a_learned_variance(self, run):
        saved, ddpm = run("saved", kind="dit"), run("ddpm", "--scheduler", "ddpm", kind="dit")
        assert images(saved) == images(ddpm)
        recipe = json.loads((ddpm / "generation.json").read_text())["recipe"]
        assert recipe["scheduler_config"]["variance_type"] == "learned_range"
        assert recipe["gmacs"] > 0
        others = [run(name, "--scheduler", name, kind="dit") for name in ("ddim", "dpm++", "euler-ancestral")]
        assert len({images(folder)["000000.png"] for folder in (saved, *others)}) == 4

    def test_a_scheduler_for_another_target_is_refused(self, run):
        with pytest.raises(ConfigError, match="scheduler ddpm does not fit a denoiser of flow matching"):
            run("wrong", "--scheduler", "ddpm")
        with pytest.raises(ConfigError, match="scheduler flow-heun does not fit a denoiser of noise; use one of ddpm"):
            run("wrong", "--scheduler", "flow-heun", kind="dit")

    def test_a_guidance_interval_acts_in_between(self, run, reference):
        folder = run("interval", "--guidance_interval", "0.5,1")
        assert not set(images(folder).values()) & set(images(reference).values())
        with pytest.raises(ConfigError, match=r"guidance_interval is 0\.5,0\.2"):
            run("interval", "--guidance_interval", "0.5,0.2")

    def test_a_folder_without_a_pipeline_is_reported_in_one_line(self, script, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError) as caught:
            script.main(words(tmp_path / "empty", tmp_path / "out"))
        assert "\n" not in str(caught.value)


def test_a_misspelt_folder_is_one_line(script, tmp_path):
    with pytest.raises(UserError, match="cannot load asets/emoji: no such folder here, and from the Hub: "):
        script.main(words("asets/emoji", tmp_path / "out"))


class TestWhatIsNotOurs:
    def test_a_stray_image_is_not_counted(self, script, pipelines, tmp_path):
        (tmp_path / "s" / "images").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "s" / "images" / "000000.png")
        with pytest.raises(UserError, match="has no record of generated images and holds 1 entries") as caught:
            script.main(words(pipelines["iptv2"], tmp_path / "s", "--num_samples", 2))
        assert "\n" not in str(caught.value)
        assert Image.open(tmp_path / "s" / "images" / "000000.png").size == (32, 32)

    def test_overwrite_deletes_ours_alone(self, run):
        folder = run("t", "--num_samples", 2)
        Image.new("RGB", (9, 9)).save(folder / "images" / "holiday.png")
        run("t", "--num_samples", 2, "--overwrite", "--guidance_scale", 2)
        assert sorted(p.name for p in (folder / "images").iterdir()) == ["000000.png", "000001.png", "holiday.png"]

    def test_what_is_not_finite_is_left_out_and_named(self, script, pipelines, tmp_path):
        pipeline = IPTV2Pipeline.from_pretrained(pipelines["iptv2"])
        pipeline.transformer.proj_out.weight.data.mul_(float("nan"))
        pipeline.save_pretrained(tmp_path / "nan")
        expected = r"2 images are missing, for example 0: .*step 1 of 3: the model returns NaN or infinity in float32"
        with pytest.raises(UserError, match=expected):
            script.main(words(tmp_path / "nan", tmp_path / "out", "--num_samples", 2))
        assert not list((tmp_path / "out" / "images").iterdir())


def listen_to_ctrl_c():
    """In the child: undo that a shell in the background makes its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_sampling_reports_progress_and_the_same_command_resumes(script, pipelines, tmp_path, monkeypatch):
    options = ("--num_samples", 160)
    command = [sys.executable, str(SCRIPT), *words(pipelines["iptv2"], tmp_path / "out", *options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=listen_to_ctrl_c, **pipes)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("images/0*.png")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "of 160 images; run the same command to continue" in output
    there = images(tmp_path / "out")
    assert 0 < len(there) < 160
    assert pixels(tmp_path / "out").shape == (len(there), 16, 16, 3)  # all of them complete
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert script.main(command[2:]) == 0
    whole = images(tmp_path / "out")
    assert len(whole) == 160
    assert {name: whole[name] for name in there} == there
