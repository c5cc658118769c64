"""The restoration pipeline: inputs of any kind, no seams, memory, bad input."""

import io
import itertools

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from script_loading import load_script

from iptv2_diffusion import IPTV2RestorationPipeline, create_model
from iptv2_diffusion.models.activations import activation_bytes_per_pixel
from iptv2_diffusion.pipelines.noise_estimation import estimate_sigma
from iptv2_diffusion.pipelines.tiling import blending, starts


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of("focal")  # as restoration-nano


def pipeline_of(*attention_pattern):
    """A model that changes its input; granularity 16."""
    torch.manual_seed(0)
    model = create_model("restoration-tiny", attention_pattern=attention_pattern, sigma_conditioning="map")
    torch.nn.init.normal_(model.head.weight, std=0.02)
    pipeline = IPTV2RestorationPipeline(model.fuse())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photograph(height, width, channels=3):
    """A smooth image with edges, (H, W, C) float32 in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [
        0.5 + 0.25 * np.sin(x / (7 + c)) * np.cos(y / 9) + 0.2 * ((x // 16 + y // 16) % 2) for c in range(channels)
    ]
    return np.stack(planes, axis=-1).clip(0, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


def test_tiles_leave_no_seam(pipe):
    """Tiles that keep the windows in place differ from the whole image only near borders, which are blended."""
    image = photograph(168, 200)
    whole = pipe(image, sigma=25, tile=None, output_type="np").images[0]
    tiled = pipe(image, sigma=25, tile=96, overlap=48, output_type="np").images[0]
    change = np.abs(whole - image).mean()  # what the model does at all
    assert change > 0.005
    difference = np.abs(whole - tiled)
    assert difference.max() < 0.2 * change
    # No step where a tile begins: the difference between neighbouring rows is the whole image's.
    steps = np.abs(np.diff(tiled, axis=0) - np.diff(whole, axis=0)).mean(axis=(1, 2))
    assert steps.max() < 0.02 * change


def test_tiles_of_a_global_model_leave_no_seam():
    """GGSA sees only its tile: the result differs (0.3 of the change here), but equally everywhere."""
    image, pipe = photograph(168, 200), pipeline_of("focal", "grid")
    whole = pipe(image, sigma=25, tile=None, output_type="np").images[0]
    tiled = pipe(image, sigma=25, tile=96, overlap=48, output_type="np").images[0]
    assert np.abs(tiled - whole).mean() < 0.5 * np.abs(whole - image).mean()
    steps = np.abs(np.diff(tiled, axis=0) - np.diff(whole, axis=0)).mean(axis=(1, 2))
    assert steps.max() < 1.4 * np.median(steps)
    halves = [pipe(image[s], sigma=25, tile=None, output_type="np").images[0] for s in (slice(80), slice(80, None))]
    abutting = np.abs(np.diff(np.concatenate(halves), axis=0) - np.diff(whole, axis=0)).mean(axis=(1, 2))
    assert abutting[79] > 1.2 * steps.max()  # the test can fail


def test_abutting_tiles_would_show(pipe):
    """The test above can fail: without blending, borders differ a hundredfold."""
    image = photograph(64, 128)
    whole = pipe(image, sigma=25, tile=None, output_type="np").images[0]
    halves = [pipe(image[:, s], sigma=25, tile=None, output_type="np").images[0] for s in (slice(64), slice(64, None))]
    assert np.abs(np.concatenate(halves, axis=1) - whole).max() > 0.2 * np.abs(whole - image).mean()


@pytest.mark.parametrize("length", [1, 64, 65, 100, 511, 1000])
@pytest.mark.parametrize(("side", "overlap"), [(64, 16), (96, 48)])
def test_tiles_cover_and_weights_sum_to_one(length, side, overlap):
    begins = starts(length, side, overlap, step=16)
    total = torch.zeros(length)
    for begin, weight in zip(begins, blending(begins, side, length), strict=True):
        assert begin % 16 == 0
        assert 0 < len(weight) <= side
        total[begin : begin + side] += weight
    torch.testing.assert_close(total, torch.ones(length))
    assert all(b + side - e >= overlap for b, e in itertools.pairwise(begins))


def test_the_automatic_tile_is_the_largest_within_the_memory_bound(pipe):
    step, needed = pipe.model.granularity, activation_bytes_per_pixel(pipe.model) / 1e9
    for side in (2 * step, 3 * step, 7 * step):
        bound = needed * side**2
        assert pipe.plan_tiles((3, 400, 300), "auto", memory=bound * 1.001)[0] == side
        assert pipe.plan_tiles((3, side, side), "auto", memory=bound * 1.001)[1:] == ([0], [0])
    with pytest.raises(ValueError, match=rf"memory is 1e-05 GB; the smallest tile of this model, {2 * step} pixels"):
        pipe(photograph(64, 64), sigma=25, memory=1e-5)
    image = photograph(100, 120)
    bounded = pipe(image, sigma=25, memory=needed * 64**2 * 1.001, output_type="np").images[0]
    assert np.array_equal(bounded, pipe(image, sigma=25, tile=64, output_type="np").images[0])


@pytest.mark.parametrize("config", [{"attention_pattern": ("focal",), "sigma_conditioning": "map"}, {"unshuffle": 1}])
def test_the_predicted_memory_is_what_the_allocator_gives_out(config):
    model = create_model("restoration-tiny", **config).fuse()
    image = torch.rand(1, 3, *2 * [4 * model.granularity])
    sigma = None if model.config.sigma_conditioning is None else 25
    with torch.no_grad():
        model(image, sigma)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(image, sigma)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert len(live) > 100
    peak = live.max() + image.nbytes
    assert activation_bytes_per_pixel(model) * image[0, 0].numel() == pytest.approx(peak, rel=0.1)


def test_out_of_memory_falls_back_to_smaller_tiles(pipe, monkeypatch):
    forward, sizes = pipe.model.forward, []

    def limited(image, *args, **kwargs):
        sizes.append(image.shape[-1])
        if image.shape[-1] > 64:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
        return forward(image, *args, **kwargs)

    monkeypatch.setattr(pipe.model, "forward", limited)
    with pytest.warns(UserWarning, match="tiles of 160 pixels; continuing with 80"):
        result = pipe(photograph(160, 160), sigma=25, tile=160, overlap=96, output_type="np").images[0]  # 96: too large
    assert sizes[0] == 160
    assert max(sizes[2:]) <= 64
    assert result.shape == (160, 160, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs


def test_the_same_picture_in_every_form(pipe, tmp_path):
    array = (photograph(20, 30) * 255).round().astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    forms = [
        array,
        array / np.float32(255),
        torch.from_numpy(array).permute(2, 0, 1),
        Image.fromarray(array),
        str(tmp_path / "picture.png"),
        tmp_path / "picture.png",
        array.astype(np.uint16) * 257,
    ]
    results = pipe(forms, sigma=10, output_type="np").images
    assert results.shape == (len(forms), 20, 30, 3)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-6)


def test_sizes_may_differ_and_each_image_has_its_own_sigma(pipe):
    images = [photograph(9, 17), photograph(33, 21)]
    both = pipe(images, sigma=[5, 50], output_type="pt")
    assert [tuple(i.shape) for i in both.images] == [(3, 9, 17), (3, 33, 21)]
    assert both.sigmas == [5, 50]
    torch.testing.assert_close(both.images[1], pipe(images[1], sigma=50, output_type="pt").images[0])


def test_alpha_and_gray_are_kept(pipe):
    alpha = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray((photograph(16, 16) * 255).astype(np.uint8))
    picture.putalpha(Image.fromarray(alpha))
    result = pipe(picture, sigma=10).images[0]
    assert result.mode == "RGBA"
    assert np.array_equal(np.asarray(result)[..., 3], alpha)
    gray = pipe(Image.fromarray(alpha), sigma=10).images[0]
    assert gray.mode == "L"
    assert pipe(alpha, sigma=10, output_type="np").images.shape == (1, 16, 16, 1)


def test_colour_goes_through_a_gray_model_channel_by_channel():
    torch.manual_seed(0)
    model = create_model("restoration-tiny", in_channels=1)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    pipeline = IPTV2RestorationPipeline(model.eval())
    image = photograph(16, 16)
    result = pipeline(image, output_type="np").images[0]
    single = pipeline(image[..., 1], output_type="np").images[0]
    np.testing.assert_allclose(result[..., 1], single[..., 0], atol=1e-6)


def test_floats_beyond_the_range_are_not_clipped_at_the_input(pipe):
    image = photograph(16, 16)
    image[3, 3] = 1.5
    clipped = pipe(image.clip(0, 1), sigma=25, output_type="np").images[0]
    assert np.abs(pipe(image, sigma=25, output_type="np").images[0] - clipped).max() > 1e-3


def test_strength(pipe):
    image = photograph(16, 16)
    full, half, none = (pipe(image, sigma=25, strength=s, output_type="np").images[0] for s in (1, 0.5, 0))
    np.testing.assert_allclose(none, image, atol=1e-6)
    inside = (full > 0) & (full < 1)  # the output is clipped
    np.testing.assert_allclose(half[inside], ((image + full) / 2)[inside], atol=1e-6)


def test_self_ensemble_commutes_with_flips(pipe):
    image = photograph(16, 32)
    options = {"sigma": 25, "self_ensemble": True, "output_type": "np"}
    turned = pipe(np.ascontiguousarray(np.rot90(image)), **options).images[0]
    np.testing.assert_allclose(np.rot90(turned, -1), pipe(image, **options).images[0], atol=1e-5)


@pytest.mark.parametrize("sigma", [5.0, 25.0, 50.0])
def test_the_noise_level_is_estimated(pipe, sigma):
    clean = torch.from_numpy(photograph(128, 128)).permute(2, 0, 1)
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * sigma / 255
    assert abs(estimate_sigma(noisy) / sigma - 1) < 0.1
    assert abs(pipe(noisy, output_type="np").sigmas[0] / sigma - 1) < 0.1


@pytest.mark.parametrize("sigma", [0, 5, 15, 25, 50])
def test_the_noise_level_of_photographs_is_estimated(sigma):
    """Texture is not taken for noise: within 12 % at σ 5, 8 % from σ 15 on, on the photographs of the benchmark."""
    photographs = load_script("eval/restoration_benchmark.py").test_photographs()
    for index, photograph in enumerate(photographs.values()):
        noise = np.random.default_rng(1000 * sigma + index).normal(0, sigma, photograph.shape)
        found = estimate_sigma(torch.from_numpy((photograph + noise) / 255).float().permute(2, 0, 1))
        assert found < 2 if sigma == 0 else abs(found / sigma - 1) < (0.08 if sigma > 5 else 0.125)


def test_clipped_backgrounds_do_not_hide_the_noise():
    """A scan: three quarters are white, where clipping keeps only one side of the noise, and the rest is gray."""
    image = torch.ones(3, 256, 256)
    image[:, 160:, 32:224] = 0.5
    noisy = image + torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * 20 / 255
    eight_bits = (noisy.clamp(0, 1) * 255).round() / 255
    assert abs(estimate_sigma(eight_bits) / 20 - 1) < 0.05
    assert estimate_sigma(torch.full((3, 64, 64), 0.5)) == 0
    for shape in ((3, 30, 200), (3, 200, 17), (1, 2, 3), (3, 1, 1)):  # less than a square of 32
        assert 0 <= estimate_sigma(torch.rand(shape)) < 255
    strip = 0.5 + 20 / 255 * torch.randn(3, 30, 400, generator=torch.Generator().manual_seed(0))
    assert abs(estimate_sigma(strip) / 20 - 1) < 0.05


def test_the_bar_counts_tiles(pipe, monkeypatch):
    """One step per tile and rotation of every image, and as many as announced."""
    bars, progress_bar = [], pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: bars.append(progress_bar(total=total)) or bars[-1])
    pipe.set_progress_bar_config(disable=False, file=io.StringIO())
    pipe([photograph(64, 96), photograph(32, 32)], sigma=25, tile=48, overlap=16, self_ensemble=True)
    pipe.set_progress_bar_config(disable=True)
    assert bars[0].total == bars[0].n == 8 * (2 * 3 + 1)


def test_a_turned_photograph_comes_out_upright(pipe, tmp_path):
    upright = Image.fromarray((photograph(24, 40) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    expected = pipe(upright, sigma=25, output_type="np").images
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert np.array_equal(pipe(image, sigma=25, output_type="np").images, expected)


@pytest.mark.parametrize("sigma", [np.float32(25), np.array(25.0), torch.tensor(25.0), [25], "25"])
def test_forms_of_a_noise_level(pipe, sigma):
    image = torch.rand(3, 16, 16)
    assert pipe(image, sigma=sigma).sigmas == [25.0]


def test_half_precision_tensors(pipe):
    image = torch.rand(1, 3, 16, 16)
    for dtype in (torch.bfloat16, torch.float16):
        expected = pipe(image.to(dtype).float(), sigma=25, output_type="pt").images
        assert torch.equal(pipe(image.to(dtype), sigma=25, output_type="pt").images, expected)


def test_save_and_load(pipe, tmp_path, capfd):
    pipe.register_to_config(sigma_range=[5, 55])
    pipe.save_pretrained(tmp_path)
    image = photograph(16, 16)
    expected = pipe(image, sigma=25, output_type="np").images
    for cls in (IPTV2RestorationPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, IPTV2RestorationPipeline)
        assert np.array_equal(loaded(image, sigma=25, output_type="np").images, expected)
        assert loaded.config.sigma_range == [5, 55]
    assert "Expected types" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((0, 5, 3), np.float32), {}, r"\(0, 5, 3\)"),
        (np.zeros((5, 5, 7), np.float32), {}, "7 channels"),
        (np.zeros((5, 5, 3), np.int64), {}, "int64 is ambiguous"),
        (np.full((5, 5, 3), np.nan, np.float32), {}, "NaN"),
        (np.full((5, 5, 3), 200.0, np.float32), {}, r"floats up to 200; give floats in \[0, 1\]"),
        (Image.fromarray(np.full((5, 5), 200.0, np.float32)), {}, "floats up to 200"),
        ([], {}, "empty"),
        (3, {}, "int is not an image"),
        (np.zeros((5, 5, 3), np.uint8), {"sigma": 300}, "sigma is 300"),
        (np.zeros((5, 5, 3), np.uint8), {"sigma": [1, 2]}, "2 noise levels for 1 images"),
        (np.zeros((5, 5, 3), np.uint8), {"tile": 8}, "at least 32"),
        (np.zeros((5, 5, 3), np.uint8), {"tile": 32, "overlap": 40}, "overlap is 48, but the tile is 32"),
        (np.zeros((5, 5, 3), np.uint8), {"strength": 2}, "strength is 2"),
        (np.zeros((5, 5, 3), np.uint8), {"output_type": "latent"}, "latent"),
    ],
)
def test_bad_input_is_named(pipe, image, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(image, **{"sigma": 25, **options})


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg", "absent.png"])
def test_unreadable_files_are_named(pipe, tmp_path, name):
    if name != "absent.png":
        path = tmp_path / name
        Image.fromarray((photograph(64, 64) * 255).astype(np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=name):
        pipe(tmp_path / name, sigma=25)
