"""iptv2-restore with hostile names, metadata, depths and folders: an error affects only its own image."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile_images import ODD_TAGS, encoded, garbage_exif, tiff

from iptv2_diffusion.data.image_files import read_image_file
from iptv2_diffusion.data.own_folder import RECORD
from iptv2_diffusion.pipelines.restore_cli import CommandError, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def restore(model, tmp_path):
    def restore(*inputs, output="out", options=("--strength", "0")):
        words = [os.fspath(path) for path in inputs]
        return main([*words, "-o", str(tmp_path / output), "--model", model, "--sigma", "5", *options])

    return restore


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    return path


def subprocess_of(model, *words, **environment):
    command = [sys.executable, "-c", "from iptv2_diffusion.pipelines.restore_cli import run; run()", *words]
    command += ["--model", model, "--sigma", "5"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class TestFolders:
    def test_a_folder_of_something_else_is_refused_and_not_touched(self, restore, tmp_path):
        mine = picture(tmp_path / "out" / "a.png", seed=1)
        before = mine.read_bytes()
        with pytest.raises(CommandError, match=r"has no record of restored pictures and holds 1 entries .* a\.png"):
            restore(picture(tmp_path / "a.png"))
        assert mine.read_bytes() == before
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png"]

    def test_an_empty_folder_with_desktop_files_is_accepted(self, restore, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
        assert restore(picture(tmp_path / "a.png")) == 0

    def test_a_foreign_file_in_our_folder_is_neither_counted_nor_overwritten(self, restore, tmp_path, capsys):
        assert restore(picture(tmp_path / "a.png")) == 0
        stranger = picture(tmp_path / "out" / "b.png", seed=5)
        before = stranger.read_bytes()
        assert restore(tmp_path / "a.png", picture(tmp_path / "b.png")) == 1
        told = capsys.readouterr()
        assert "1 of 2 are in" in told.out
        assert "b.png was not made here; move it away" in told.err
        assert stranger.read_bytes() == before

    def test_changed_files_are_kept_and_damaged_files_are_made_again(self, restore, tmp_path):
        for name in ("a.png", "b.png"):
            picture(tmp_path / "in" / name)
        assert restore(tmp_path / "in") == 0
        Image.new("RGB", (3, 3)).save(tmp_path / "out" / "a.png")  # retouched
        whole = (tmp_path / "out" / "b.png").read_bytes()
        (tmp_path / "out" / "b.png").write_bytes(whole[:50])
        assert restore(tmp_path / "in") == 0
        assert Image.open(tmp_path / "out" / "a.png").size == (3, 3)
        assert (tmp_path / "out" / "b.png").read_bytes() == whole


class TestNames:
    def test_names_as_long_as_the_disk_allows(self, restore, tmp_path, capsys):
        for length in (240, 249, 255):
            picture(tmp_path / "in" / ("x" * (length - 4) + ".png"))
        picture(tmp_path / "in" / "z.png")
        assert restore(tmp_path / "in") == 0
        assert len(list((tmp_path / "out").glob("*.png"))) == 4

    @pytest.mark.skipif(os.name == "nt", reason="names there are no bytes")
    def test_names_of_any_bytes_and_a_stdout_that_lacks_them(self, model, tmp_path):
        names = ["é.png", "日本.png", "a b'c\".png", "tab\t.png", "new\nline.png", "emoji😀.png", "[1].png", "-x.png"]
        for name in names:
            picture(tmp_path / "in" / name)
        os.rename(picture(tmp_path / "in" / "q.png"), os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
        process = subprocess_of(
            model, str(tmp_path / "in"), "-o", str(tmp_path / "out"), PYTHONIOENCODING="ascii", PYTHONUTF8="0"
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert len(os.listdir(os.fsencode(tmp_path / "out"))) == len(names) + 2  # with the record
        assert out.count(b"\n") == len(names) + 1
        assert b"failed" not in out + err

    def test_home_folders_in_every_option(self, model, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        os.symlink(model, tmp_path / "model")
        picture(tmp_path / "a.png")
        assert main(["~/a.png", "-o", "~/out", "--model", "~/model", "--sigma", "5"]) == 0
        assert (tmp_path / "out" / "a.png").is_file()


class TestMetadata:
    @pytest.mark.parametrize("form", ["jpg", "png", "webp"])
    def test_one_photographs_metadata_do_not_stop_the_batch(self, restore, tmp_path, form):
        image = Image.fromarray(np.kron(np.eye(4, 6), np.ones((8, 8))).astype(np.uint8) * 255).convert("RGB")
        kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form]
        for number, odd in enumerate(sorted(ODD_TAGS)):
            path = tmp_path / "in" / f"{number}.{form}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded(image, kind, exif=garbage_exif(6, ODD_TAGS[odd]), icc_profile=b"garbage" * 9))
        with pytest.warns(UserWarning, match="dropped"):
            assert restore(tmp_path / "in") == 0
        for path in (tmp_path / "out").glob(f"*.{form}"):
            with Image.open(path) as result:
                assert result.size == (32, 48)
                assert result.getexif().get(0x0112, 1) == 1

    def test_metadata_that_the_format_cannot_store_are_dropped_with_a_note(self, restore, tmp_path):
        exif = Image.Exif()
        exif[0x010E] = "y" * 70_000  # a PNG takes it, a JPEG takes 65,533 bytes
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=exif)
        (tmp_path / "a.png").rename(tmp_path / "a.jpg")  # read by its content, written by its name
        with pytest.warns(UserWarning, match=r"its exif cannot be written and is dropped"):
            assert restore(tmp_path / "a.jpg") == 0
        assert Image.open(tmp_path / "out" / "a.jpg").format == "JPEG"


class TestDepth:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_floats_come_back_as_floats_with_values_beyond_white(self, restore, tmp_path, dtype, channels):
        values = np.random.default_rng(0).uniform(-0.2, 1.6, (10, 12, channels)).astype(dtype)
        values[..., 3:] = values[..., 3:].clip(0, 1)
        photometric = "minisblack" if channels == 1 else "rgb"
        (tmp_path / "a.tif").write_bytes(tiff(values.squeeze(), photometric=photometric))
        assert restore(tmp_path / "a.tif") == 0
        result = read_image_file(tmp_path / "out" / "a.tif").pixels
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, values.astype(np.float32), atol=1e-3)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16])
    def test_integers_of_unknown_range_are_refused_by_name(self, restore, tmp_path, capsys, dtype):
        (tmp_path / "a.tif").write_bytes(tiff(np.full((8, 8), 90, dtype)))
        assert restore(tmp_path / "a.tif", picture(tmp_path / "b.png")) == 1
        told = capsys.readouterr().err
        assert f"{np.dtype(dtype)} pixels, whose range is not known" in told
        assert (tmp_path / "out" / "b.png").is_file()

    def test_hdr_is_refused_with_the_remedy(self, restore, tmp_path, capsys):
        (tmp_path / "a.tif").write_bytes(tiff(np.full((8, 8), 40.0, np.float32)))
        assert restore(tmp_path / "a.tif") == 1
        assert "floats from 40 to 40; floats must be in [0, 1], with 1 as white: scale them" in capsys.readouterr().err

    def test_the_limit_of_pixels_is_an_option(self, restore, tmp_path, capsys):
        path = picture(tmp_path / "a.png")
        assert restore(path, options=("--max-pixels", "191")) == 1
        assert "exceeds limit of 191 pixels; raise --max-pixels" in capsys.readouterr().err
        assert restore(path, options=("--max-pixels", "192")) == 0


class TestImpatience:
    def test_interrupted_twice_leaves_complete_images_and_resumes(self, model, tmp_path):
        rng = np.random.default_rng(0)
        (tmp_path / "in").mkdir()
        for number in range(6):
            Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
        words = [str(tmp_path / "in"), "-o", str(tmp_path / "out")]
        process = subprocess_of(model, *words)
        deadline = time.monotonic() + 200
        while not list((tmp_path / "out").glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, err = process.communicate(timeout=200)
        if process.returncode != 0:  # it may have been done already
            assert process.returncode in (130, -signal.SIGINT)
            assert b"Traceback" not in err
        for path in (tmp_path / "out").glob("*.png"):
            assert read_image_file(path).pixels.shape == (300, 300, 3)
        assert main([*words, "--model", model, "--sigma", "5"]) == 0
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*(f"{n}.png" for n in range(6)), RECORD]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit of file sizes")
    def test_a_full_disk_says_what_is_there(self, model, tmp_path):
        """The limit of a file's size is real: EFBIG, as for a full disk or quota."""
        picture(tmp_path / "in" / "a.png")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / "in/b.png")
        code = """
import resource, signal, sys
from iptv2_diffusion.pipelines import restore_cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
restore_cli.run()
"""
        words = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        assert "File too large; 1 of 2 images are complete: make room and run the same command" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [RECORD, "a.png"]
