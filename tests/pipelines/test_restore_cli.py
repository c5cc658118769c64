"""iptv2-restore: files and folders, resumption, inputs left alone, metadata kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from iptv2_diffusion import IPTV2RestorationPipeline, create_model
from iptv2_diffusion.data.sixteen_bit import is_16_bit, read_16_bit, write_16_bit
from iptv2_diffusion.pipelines.restore_cli import CommandError, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "sub/b.jpg"):
        Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / name)
    return folder


def test_a_folder_keeps_its_structure_and_the_command_resumes(model, pictures, tmp_path, capsys):
    command = [str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "25"]
    assert main(command) == 0
    results = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in results} == {"a.png", "sub/b.jpg"}
    assert not np.array_equal(
        np.asarray(Image.open(tmp_path / "out/a.png")), np.asarray(Image.open(pictures / "a.png"))
    )
    (tmp_path / "out/sub/b.jpg").unlink()
    assert main(command) == 0
    assert "1 of 2 are in" in capsys.readouterr().out
    assert (tmp_path / "out/sub/b.jpg").is_file()
    assert (tmp_path / "out/a.png").stat().st_mtime_ns == results[tmp_path / "out/a.png"]


def test_a_picture_is_restored_to_a_file_of_another_name(model, pictures, tmp_path, capsys):
    command = [str(pictures / "a.png"), "-o", str(tmp_path / "new/clean.jpg"), "--model", model, "--sigma", "25"]
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clean.jpg"]
    assert Image.open(tmp_path / "new/clean.jpg").format == "JPEG"
    with pytest.raises(CommandError, match=r"clean.jpg exists already; delete it, or choose another --output"):
        main(command)
    with pytest.raises(CommandError, match="exists already"):
        main([str(pictures / "a.png"), "-o", str(pictures / "a.png")])


def test_a_program_reads_the_results_as_json(model, pictures, tmp_path, capsys):
    command = [str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "25", "--json"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["output"] for row in rows] == [str(tmp_path / "out" / name) for name in ("a.png", "sub/b.jpg")]
    assert {row["sigma"] for row in rows} == {25.0}
    assert main(command) == 0  # a note about what is there goes to stderr
    assert capsys.readouterr().out == ""


def test_no_option_is_needed(pictures, monkeypatch, tmp_path):
    """The shipped denoiser, the folder `restored`."""
    monkeypatch.chdir(tmp_path)
    assert main([str(pictures / "a.png")]) == 0
    assert Image.open("restored/a.png").size == (20, 24)


def test_metadata_is_kept(model, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.jpg", exif=exif, icc_profile=profile)
    assert main([str(tmp_path / "a.jpg"), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]) == 0
    with Image.open(tmp_path / "out/a.jpg") as result:
        assert result.getexif()[0x010F] == "a camera"
        assert result.info["icc_profile"] == profile


@pytest.mark.parametrize(("suffix", "channels"), [(".png", 1), (".png", 4), (".tif", 2), (".tif", 3)])
def test_16_bits_are_kept(model, tmp_path, suffix, channels):
    """With --strength 0 the image comes back upright, with all of its 65,536 levels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif.update({0x010F: "a camera", 0x0112: 6})
    image = np.random.default_rng(0).integers(0, 65536, (20, 24, channels), np.uint16)
    write_16_bit(image, tmp_path / f"a{suffix}", profile, exif.tobytes())
    command = [str(tmp_path / f"a{suffix}"), "--model", model, "--sigma", "25", "-o"]
    assert main([*command, str(tmp_path / "same"), "--strength", "0"]) == 0
    assert np.array_equal(read_16_bit(tmp_path / f"same/a{suffix}"), np.rot90(image, -1))
    if channels != 2:  # Pillow does not open it
        with Image.open(tmp_path / f"same/a{suffix}") as result:
            assert result.getexif()[0x010F] == "a camera"
            assert result.getexif()[0x0112] == 1
            assert result.info["icc_profile"] == profile

    assert main([*command, str(tmp_path / "restored")]) == 0
    restored = read_16_bit(tmp_path / f"restored/a{suffix}")
    assert not np.array_equal(restored, image)
    assert np.any(restored % 257)  # not 8 bits stretched
    assert main([*command, str(tmp_path / "short"), "--bits", "8"]) == 0
    assert not is_16_bit(tmp_path / f"short/a{suffix}")


def test_an_8_bit_tiff_keeps_its_texts(model, tmp_path):
    exif = Image.Exif()
    exif.update({0x010F: "a camera", 0x0112: 6})
    Image.new("RGB", (16, 24), "red").save(tmp_path / "a.tif", exif=exif, compression="tiff_lzw")
    assert main([str(tmp_path / "a.tif"), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]) == 0
    with Image.open(tmp_path / "out/a.tif") as result:
        assert (result.mode, result.size) == ("RGB", (24, 16))
        assert (result.getexif()[0x010F], result.getexif()[0x0112]) == ("a camera", 1)


def test_a_turned_photograph_comes_out_upright(model, tmp_path):
    """The image is rotated once: its EXIF no longer has the orientation and keeps the rest."""
    exif = Image.Exif()
    exif.update({0x010F: "a camera", 0x0112: 8})
    photograph = Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 20).convert("RGB")
    photograph.save(tmp_path / "a.jpg", exif=exif, quality=95)
    command = [str(tmp_path / "a.jpg"), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]
    assert main([*command, "--strength", "0"]) == 0
    with Image.open(tmp_path / "out/a.jpg") as result:
        assert (result.getexif()[0x010F], result.getexif()[0x0112]) == ("a camera", 1)
        difference = np.asarray(result, dtype=float) - np.asarray(photograph.transpose(Image.Transpose.ROTATE_90))
        assert np.abs(difference).mean() < 3


def test_pictures_of_several_frames_are_not_cut_to_one(model, tmp_path, capsys):
    frames = [Image.new("RGB", (16, 16), name) for name in ("red", "blue")]
    for name in ("a.tif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert main([str(tmp_path), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]) == 1
    assert capsys.readouterr().err.count("it has 2 frames; save each as a separate image") == 2


def test_jpeg_cannot_have_16_bits(model, pictures, tmp_path, capsys):
    assert main([str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "9", "--bits", "16"]) == 1
    assert "b.jpg cannot have 16 bits" in capsys.readouterr().err
    assert is_16_bit(tmp_path / "out/a.png")


def test_inputs_are_never_overwritten(model, pictures):
    with pytest.raises(CommandError, match="would overwrite an input"):
        main([str(pictures), "-o", str(pictures / "sub" / ".."), "--model", model])


def test_namesakes_are_refused(model, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other/a.png")
    inputs = [str(pictures / "a.png"), str(tmp_path / "other/a.png")]
    with pytest.raises(CommandError, match=r"would both become .*a\.png"):
        main([*inputs, "-o", str(tmp_path / "out"), "--model", model])


def test_broken_pictures_do_not_stop_the_others(model, pictures, tmp_path, capsys):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(whole[:100])
    (pictures / "huge.ppm").write_bytes(b"P6 20000 20000 255\n")
    (pictures / "chunk.png").write_bytes(whole[:33] + (100).to_bytes(4, "big") + whole[37:])  # its pixels end too early
    assert main([str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "25"]) == 1
    told = capsys.readouterr().err
    assert "a.png cannot be read" in told
    assert "chunk.png cannot be read as an image: broken PNG file" in told
    assert "huge.ppm cannot be read as an image: Image size (400000000 pixels) exceeds limit" in told
    assert (tmp_path / "out/sub/b.jpg").is_file()
    assert not (tmp_path / "out/a.png").exists()


def test_an_image_that_does_not_fit_in_memory_does_not_stop_the_others(model, pictures, tmp_path, capsys):
    """The limit of address space is real, and only the larger image exceeds it."""
    Image.new("RGB", (6000, 6000), "gray").save(pictures / "large.png")
    code = """
import resource, sys, torch
from iptv2_diffusion import IPTV2RestorationPipeline
from iptv2_diffusion.pipelines.restore_cli import main
torch.set_num_threads(1)
IPTV2RestorationPipeline.from_pretrained(sys.argv[-1])  # libraries are in memory before the limit is set
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, -1))
sys.exit(main(sys.argv[1:]))
"""
    command = [str(pictures), "-o", str(tmp_path / "out"), "--sigma", "25", "--tile", "none", "--model", model]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "large.png failed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["a.png", "b.jpg"]


def test_a_task_that_the_model_lacks_is_named(pictures, tmp_path, capsys):
    IPTV2RestorationPipeline(create_model("restoration-tiny", num_tasks=2).fuse()).save_pretrained(tmp_path / "tasks")
    command = [str(pictures / "a.png"), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "tasks"), "--task", "5"]
    assert main(command) == 1
    assert "task is 5; this model has tasks 0 to 1" in capsys.readouterr().err


def test_webp_is_lossless_and_the_profile_of_cmyk_is_dropped(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    Image.new("CMYK", (16, 16)).save(tmp_path / "b.jpg", icc_profile=b"a profile of four channels")
    inputs = [str(tmp_path / "a.webp"), str(tmp_path / "b.jpg")]
    options = ["-o", str(tmp_path / "out"), "--model", model, "--sigma", "5", "--strength", "0"]
    assert main([*inputs, *options]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/a.webp")), pixels)
    with Image.open(tmp_path / "out/b.jpg") as result:
        assert (result.mode, "icc_profile" in result.info) == ("RGB", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.png", "-o", "out", "--model", "m"], "absent.png does not exist"),
        (["{in}/a.png", "-o", "{in}/a.png/out", "--model", "m"], "cannot write to"),
        (["{in}/a.png", "-o", "{in}/out", "--model", "{in}"], "cannot load"),
        (["{in}/a.png", "-o", "{in}/out", "--model", "{in}/absent"], "absent: no such folder, and from the Hub"),
        (
            ["{in}/a.png", "-o", "{in}/out", "--model", "assets/iptv2-emoji64"],
            "holds a IPTV2Pipeline, not an",
        ),
        (["{in}", "-o", "{in}/out", "--model", "{model}", "--device", "gpu"], "--device gpu: "),
        (["{in}", "-o", "{in}/out", "--model", "{model}", "--sigma", "-3"], "sigma is -3; it must be in"),
        (
            ["{in}", "-o", "{in}/out", "--model", "{model}", "--tile", "5"],
            "tile is 5; this model needs",
        ),
        (["{in}", "-o", "{in}/out", "--model", "{model}", "--memory", "0"], "memory is 0 GB; the smallest tile"),
    ],
)
def test_bad_commands(model, pictures, arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(CommandError, match=message) as caught:
        main([argument.replace("{in}", str(pictures)).replace("{model}", model) for argument in arguments])
    assert "\n" not in str(caught.value)


def test_hidden_files_are_not_inputs(model, pictures, tmp_path):
    (pictures / "sub/._b.jpg").write_bytes(b"what macOS leaves beside a file")
    assert main([str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]) == 0


def test_links_to_nothing_fail_alone_and_pipes_are_refused(model, pictures, tmp_path, capsys):
    (pictures / "gone.png").symlink_to(tmp_path / "absent.png")
    (pictures / "circle.png").symlink_to("circle.png")
    os.mkfifo(pictures / "pipe.png")
    assert main([str(pictures), "-o", str(tmp_path / "out"), "--model", model, "--sigma", "5"]) == 1
    told = capsys.readouterr().err
    assert "gone.png failed" in told
    assert "circle.png failed" in told
    assert "2 of " in told
    for name in ("gone.png", "circle.png", "pipe.png"):
        with pytest.raises(CommandError, match=f"{name} is neither a file nor a folder, or is a broken link"):
            main([str(pictures / name), "-o", str(tmp_path / "out"), "--model", model])


@pytest.mark.slow
def test_a_picture_of_24_megapixels_stays_under_4_gb(tmp_path):
    """The shipped denoiser, as the command line runs it."""
    y, x = np.mgrid[:4000, :6000].astype(np.float32)
    picture = np.stack([127 + 100 * np.sin(x / (40 + c)) * np.cos(y / 50) for c in range(3)], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "large.png")
    code = """
import sys
from iptv2_diffusion.memory import peak_bytes
from iptv2_diffusion.pipelines.restore_cli import main
print("failed" if main(sys.argv[1:]) else peak_bytes())
"""
    words = [str(tmp_path / "large.png"), "-o", str(tmp_path / "out"), "--sigma", "25"]
    command = [sys.executable, "-c", code, *words, "--model", str(ROOT / "assets/iptv2-denoise-color")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout.split()[-1]) < 4e9
    with Image.open(tmp_path / "out/large.png") as result:
        assert result.size == (6000, 4000)
