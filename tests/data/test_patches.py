"""Image stores, patches, degradations, and the layouts of the field's data sets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import noisy, photograph
from PIL import Image

from iptv2_diffusion.data import degradations as d
from iptv2_diffusion.data.pairs import LAYOUTS as LAYOUT_NAMES
from iptv2_diffusion.data.pairs import find_images, find_pairs
from iptv2_diffusion.data.patches import ImageStore, PatchSampler, read_image, transform
from iptv2_diffusion.data.sixteen_bit import write_16_bit


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def picture(seed, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def store(tmp_path):
    for seed in range(3):
        save(tmp_path / f"images/{seed}.png", picture(seed, 80 + seed, 96))
    return ImageStore(find_images(tmp_path / "images"), tmp_path / "cache", say=lambda line: None)


def test_a_store_holds_the_pixels_and_is_found_again(store, tmp_path):
    for seed, image in enumerate(store.images):
        assert np.array_equal(image, picture(seed, 80 + seed, 96))
    said = []
    again = ImageStore(store.files, tmp_path / "cache", say=said.append)
    assert not said
    assert np.array_equal(again.images[2], store.images[2])
    save(store.files[0], picture(9))
    ImageStore(store.files, tmp_path / "cache", say=said.append)
    assert len(said) == 1  # a changed file is decoded again


def test_a_store_holds_each_image_at_each_scale(tmp_path):
    files = [save(tmp_path / "colour.png", picture(0)), save(tmp_path / "other.png", picture(1, 64, 48))]
    store = ImageStore(files, tmp_path / "cache", scales=(1.0, 0.5), say=lambda line: None)
    assert [image.shape for image in store.images] == [(40, 56, 3), (20, 28, 3), (64, 48, 3), (32, 24, 3)]
    assert store.files == [files[0], files[0], files[1], files[1]]
    small = Image.fromarray(picture(1, 64, 48)).resize((24, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(store.images[3], np.asarray(small))
    gray = ImageStore(files, tmp_path / "cache", channels=1, scales=(0.5,), say=lambda line: None)
    assert gray.images[0].shape == (20, 28, 1)


def test_sixteen_bits_are_not_shrunk(tmp_path):
    write_16_bit(picture(0).astype(np.uint16) * 257, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 16 bits.*leave out scales"):
        ImageStore([tmp_path / "a.png"], tmp_path / "cache", scales=(1.0, 0.5), say=lambda line: None)


def test_patches_are_parts_of_the_images(store):
    sampler = PatchSampler(store)
    places = sampler.places(torch.rand(50, 3, generator=torch.Generator().manual_seed(0)), 24)
    clean, degraded = sampler.patches(places, 24)
    assert degraded is None
    for patch, (item, top, left) in zip(clean, places, strict=True):
        expected = store.images[item][top : top + 24, left : left + 24]
        assert np.array_equal((patch.permute(1, 2, 0) * 255).round().numpy(), expected)
    assert len({item for item, _, _ in places}) == 3


def test_textured_places_are_preferred(tmp_path):
    flat = np.full((64, 128, 3), 100, np.uint8)
    flat[:, 64:] = picture(0, 64, 64)
    store = ImageStore([save(tmp_path / "a.png", flat)], tmp_path / "cache", say=lambda line: None)
    uniforms = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    centres = [left + 8 for _, _, left in PatchSampler(store).places(uniforms, 16)]
    assert 0.85 < np.mean([c >= 64 for c in centres]) < 0.97  # weights 1 : 0.1
    alike = [left + 8 for _, _, left in PatchSampler(store, prefer_texture=False).places(uniforms, 16)]
    assert 0.4 < np.mean([c >= 64 for c in alike]) < 0.6


def test_the_eight_transforms_differ_and_keep_pairs_together():
    patch = torch.rand(1, 3, 8, 8)
    turned = transform(patch.repeat(8, 1, 1, 1), torch.arange(8))
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    assert all(torch.equal(t.flatten().sort().values, patch.flatten().sort().values) for t in turned)


def test_bad_images_are_named(tmp_path):
    path = save(tmp_path / "a/x.png", picture(0))
    whole = path.read_bytes()
    for damaged in (whole[:80], whole[:33] + (100).to_bytes(4, "big") + whole[37:]):  # the pixels' chunk too short
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.png cannot be read"):
            read_image(path)
    (tmp_path / "huge.ppm").write_bytes(b"P6 20000 20000 255\n")  # more than Pillow's limit
    with pytest.raises(ValueError, match=r"huge\.ppm cannot be read as an image: Image size \(400000000 pixels\)"):
        read_image(tmp_path / "huge.ppm")
    with pytest.raises(ValueError, match="holds no images"):
        find_images((tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        ImageStore([save(tmp_path / "b.png", picture(1)), path], tmp_path / "cache", say=lambda line: None)
    assert not list((tmp_path / "cache").iterdir())  # nothing half-decoded is left


def test_images_smaller_than_the_patch_are_padded_by_reflection(tmp_path):
    files = [save(tmp_path / name, picture(seed)) for seed, name in enumerate(("clean.png", "noisy.png"))]
    stores = [ImageStore([file], tmp_path / "cache", say=lambda line: None) for file in files]
    sampler = PatchSampler(*stores)
    assert (sampler.smaller_than(40), sampler.smaller_than(41)) == ([], [files[0]])
    places = sampler.places(torch.rand(20, 3), 64)
    assert set(places) == {(0, 0, 0)}
    for patch, store in zip(sampler.patches(places[:1], 64), stores, strict=True):
        expected = np.pad(store.images[0], ((0, 24), (0, 8), (0, 0)), "reflect")
        assert np.array_equal((patch[0] * 255).round().permute(1, 2, 0).numpy(), expected)


def test_pairs_of_different_sizes_name_both(tmp_path):
    stores = [
        ImageStore([save(tmp_path / f"{name}.png", picture(0, *size))], tmp_path / "cache", say=lambda line: None)
        for name, size in (("clean", (40, 40)), ("noisy", (40, 48)))
    ]
    with pytest.raises(ValueError, match=r"noisy\.png is 40x48 pixels but .*clean\.png is 40x40"):
        PatchSampler(*stores)


# ---------------------------------------------------------------------------------------------------------------------
# Degradations

DEGRADATIONS = [
    d.GaussianNoise(5, 55),
    d.GaussianBlur(0.5, 2),
    d.MotionBlur(3, 9),
    d.RainStreaks(0.002, 0.01),
    d.JPEGCompression(20, 90),
    d.Sequential(d.MotionBlur(3, 9), d.GaussianNoise(0, 10), d.JPEGCompression(50, 90)),
]


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=lambda x: type(x).__name__)
def test_degradations_are_functions_of_the_generator_and_lose_their_margin(degradation):
    clean = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, sigma = degradation(clean, torch.Generator().manual_seed(1))
    again, _ = degradation(clean, torch.Generator().manual_seed(1))
    other, _ = degradation(clean, torch.Generator().manual_seed(2))
    assert first.shape == (3, 3, 64 - 2 * degradation.margin, 64 - 2 * degradation.margin)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()
    assert sigma is None or sigma.shape == (3,)


def test_the_noise_has_the_returned_sigma():
    degraded, sigma = d.GaussianNoise(5, 55)(torch.zeros(8, 3, 128, 128), torch.Generator().manual_seed(0))
    torch.testing.assert_close(degraded.flatten(1).std(dim=1) * 255, sigma, rtol=0.02, atol=0)
    assert ((sigma >= 5) & (sigma <= 55)).all()


def test_kernels_sum_to_one_and_are_centred():
    generator = torch.Generator().manual_seed(0)
    for kernels in (
        d.gaussian_kernels(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]), 6),
        d.motion_kernels(torch.tensor([4.0, 9.0]), torch.rand(2, generator=generator), torch.tensor([0.0, 1.0]), 6),
    ):
        torch.testing.assert_close(kernels.sum(dim=(1, 2)), torch.ones(2))
        grid = torch.arange(-6.0, 7.0)
        assert (kernels.sum(dim=1) @ grid).abs().max() < 1e-3
        assert (kernels.sum(dim=2) @ grid).abs().max() < 1e-3


def test_a_straight_motion_is_a_box_filter():
    """A path of 8 pixels to the right spreads a point evenly over 8 columns of one row."""
    kernel = d.motion_kernels(torch.tensor([8.0]), torch.zeros(1), torch.zeros(1), 6, samples=4096)[0]
    expected = torch.zeros(13, 13)
    expected[6, 2:11] = F.conv1d(torch.ones(1, 1, 8), torch.tensor([[[0.5, 0.5]]]), padding=1)[0, 0] / 8
    torch.testing.assert_close(kernel, expected, atol=2e-3, rtol=0)


def test_rain_only_brightens():
    clean = torch.full((2, 3, 64, 64), 0.4)
    rainy, _ = d.RainStreaks(0.01, 0.01)(clean, torch.Generator().manual_seed(0))
    assert (rainy >= 0.4 - 1e-6).all()
    assert 0.01 < (rainy > 0.45).float().mean() < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: copies in their own layouts, made from photographs


def realblur(kind):
    scenes = [f"RealBlur-{kind}_ECC_IMCORR_centroid_itensity_ref/scene00{n}" for n in (1, 2)]
    return [(f"{scene}/blur/blur_1.png", f"{scene}/gt/gt_1.png") for scene in scenes]


def rain(name, suffix):
    return [(f"test/{name}/input/{n}.{suffix}", f"test/{name}/target/{n}.{suffix}") for n in (1, 2)]


LAYOUTS = {
    ("folders", "train"): [("input/a.png", "target/a.png"), ("input/s/b.jpg", "target/s/b.png")],
    ("folders", "test"): [("test/input/a.png", "test/target/a.png"), ("test/input/b.png", "test/target/b.png")],
    ("sidd", "train"): [
        (f"Data/000{n}_001_S6_00100_00060_3200_L/000{n}_NOISY_SRGB_010.PNG",
         f"Data/000{n}_001_S6_00100_00060_3200_L/000{n}_GT_SRGB_010.PNG") for n in (1, 2)
    ],
    ("gopro", "train"): [(f"train/GOPR0372_07_0{n}/blur/000047.png", f"train/GOPR0372_07_0{n}/sharp/000047.png")
                         for n in (0, 1)],
    ("gopro", "test"): [(f"test/GOPR0384_11_00/blur/{n}.png", f"test/GOPR0384_11_00/sharp/{n}.png") for n in (1, 2)],
    ("hide", "test"): [("test/test-close-ups/1fromGOPR.png", "GT/1fromGOPR.png"),
                       ("test/test-long-shot/2fromGOPR.png", "GT/2fromGOPR.png")],
    ("realblur_j", "train"): realblur("J"),
    ("realblur_r", "test"): realblur("R"),
    ("dpdd", "train"): [(f"train_c/source/1P0A{n}.png", f"train_c/target/1P0A{n - 1}.png") for n in (1235, 1237)],
    ("dpdd", "test"): [(f"test_c/source/1P0A{n}.png", f"test_c/target/1P0A{n - 1}.png") for n in (1235, 1237)],
    ("rain13k", "train"): [(f"train/Rain13K/input/{n}.jpg", f"train/Rain13K/target/{n}.jpg") for n in (1, 2)],
    ("rain13k", "test"): [(f"test/{s}/input/1.png", f"test/{s}/target/1.png") for s in ("Rain100L", "Test100")],
    ("test100", "test"): rain("Test100", "png"),
    ("rain100h", "test"): rain("Rain100H", "png"),
    ("rain100l", "test"): rain("Rain100L", "png"),
    ("test2800", "test"): rain("Test2800", "jpg"),
    ("test1200", "test"): rain("Test1200", "png"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"a.png b.png\n\nalone.png\n", "a line is 'alone.png'; it must name a sharp"), (b"\xff\xfe", "is not text")],
)
def test_a_list_of_pairs_that_is_none_is_named(tmp_path, content, told):
    (tmp_path / "RealBlur_J_train_list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"RealBlur_J_train_list\.txt.* {told}"):
        find_pairs("realblur_j", tmp_path)


def test_every_layout_has_a_copy():
    assert {layout for layout, _ in LAYOUTS} == set(LAYOUT_NAMES)


@pytest.mark.parametrize(("layout", "split"), LAYOUTS)
def test_layouts(tmp_path, layout, split):
    """The pairs are found, and each is a photograph and the same photograph with noise of σ 10."""
    pairs, deep = LAYOUTS[layout, split], layout == "dpdd"  # its files have 16 bits
    for index, names in enumerate(pairs):
        clean = photograph(index) * np.uint16(257) if deep else photograph(index)
        for name, image in zip(names, (noisy(clean, 10, index), clean), strict=True):
            if deep:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                write_16_bit(image, tmp_path / name)
            elif name.endswith("jpg"):
                save(tmp_path / name, image, quality=100, subsampling=0)
            else:
                save(tmp_path / name, image)
    if layout.startswith("realblur"):
        lines = [f"{clean} {degraded} 1 2 3" for degraded, clean in pairs]
        (tmp_path / f"RealBlur_{layout[-1].upper()}_{split}_list.txt").write_text("\n".join(lines) + "\n")
    found = find_pairs(layout, tmp_path, split)
    assert [(str(p.degraded.relative_to(tmp_path)), str(p.clean.relative_to(tmp_path))) for p in found] == sorted(pairs)

    stores = [
        ImageStore([getattr(pair, kind) for pair in found], tmp_path / "cache", say=lambda line: None)
        for kind in ("degraded", "clean")
    ]
    for degraded, clean in zip(*(store.images for store in stores), strict=True):
        error = (degraded.astype(np.float64) - clean) / stores[0].peak * 255
        assert 9 < error.std() < 11
    patches = PatchSampler(stores[1], stores[0]).patches([(1, 4, 8)], 32)
    assert all(patch.shape == (1, 3, 32, 32) and 0.1 < patch.max() <= 1 for patch in patches)

    if layout != "dpdd":  # in dpdd the order defines the pairs
        (tmp_path / pairs[0][1]).unlink()
        with pytest.raises(ValueError, match=r"no partner|holds no images|not a folder"):
            find_pairs(layout, tmp_path, split)


def test_layout_errors(tmp_path):
    with pytest.raises(ValueError, match="choose one of folders, sidd"):
        find_pairs("imagenet", tmp_path)
    with pytest.raises(ValueError, match=r"RealBlur_R_test_list\.txt does not exist"):
        find_pairs("realblur_r", tmp_path, "test")
    for name in ("source/1.png", "source/2.png", "target/1.png"):
        save(tmp_path / "test_c" / name, picture(0))
    with pytest.raises(ValueError, match="2 blurred and 1 sharp"):
        find_pairs("dpdd", tmp_path, "test")


def test_a_degradation_that_skips_some_samples():
    clean = torch.rand(400, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    noisy, sigma = d.Sometimes(d.GaussianNoise(20, 20), 0.3)(clean, torch.Generator().manual_seed(1))
    spared = (noisy == clean).flatten(1).all(dim=1)
    assert 0.6 < spared.float().mean() < 0.8
    assert torch.equal(spared, sigma == 0)
    blurred, none = d.Sometimes(d.GaussianBlur(1, 1), 0.5)(clean, torch.Generator().manual_seed(1))
    assert none is None
    assert blurred.shape == (400, 1, 6, 6)
    whole = (blurred == clean[..., 3:-3, 3:-3]).flatten(1).all(dim=1)
    assert 0.4 < whole.float().mean() < 0.6


def test_jpeg_blocks_start_at_any_pixel():
    """The grid of blocks of strong compression shows where it starts."""
    ramp = torch.linspace(0, 1, 48).expand(64, 1, 48, 48)
    degraded, _ = d.JPEGCompression(5, 5)(ramp, torch.Generator().manual_seed(0))
    assert degraded.shape == (64, 1, 32, 32)
    jumps = (degraded[..., 1:] - degraded[..., :-1]).abs().mean(dim=(1, 2))  # (64, 31)
    columns = {int(row.argmax()) % 8 for row in jumps}
    assert len(columns) > 4
