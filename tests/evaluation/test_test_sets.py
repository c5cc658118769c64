"""Test sets by name: found below a folder, paired by every naming scheme, with one published figure per level."""

from pathlib import Path

import pytest
from PIL import Image

from iptv2_diffusion.evaluation.test_sets import TEST_SETS, find_test_set, pairs_of


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.mark.parametrize(
    ("degraded", "clean"),
    [
        ("input/1.png", "target/1.png"),
        ("rainy/norain-1.png", "ground truth/norain-1.png"),
        ("rain-001.png", "norain-001.png"),
        ("007_in.png", "007_GT.png"),
        ("5dmark3_iso3200_1_real.png", "5dmark3_iso3200_1_mean.png"),
        ("Canon_chair_11_real.JPG", "Canon_chair_11_mean.JPG"),
    ],
)
def test_pairs_by_the_names_of_the_sets(tmp_path, degraded, clean):
    expected = {picture(tmp_path / degraded): picture(tmp_path / clean)}
    picture(tmp_path / "5dmark3_iso3200_1_ours.png")  # CC includes its authors' results
    assert pairs_of(tmp_path) == expected


def test_no_pairs_is_an_error_that_names_the_schemes(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images, none with a partner; expected input/ and target/"):
        pairs_of(tmp_path)


def test_a_set_is_found_in_any_case_and_depth(tmp_path):
    picture(tmp_path / "FFDNet/testsets/CBSD68/1.png")
    assert find_test_set("CBSD68", tmp_path) == tmp_path / "FFDNet/testsets/CBSD68"
    assert find_test_set("CBSD68", tmp_path / "FFDNet/testsets/CBSD68") == tmp_path / "FFDNet/testsets/CBSD68"
    with pytest.raises(FileNotFoundError, match=r"no folder called kodak24 in .*--root"):
        find_test_set("Kodak24", tmp_path)


def test_published_figures_have_one_number_a_level():
    for name, known in TEST_SETS.items():
        for method, figures in known.published.items():
            assert len(figures) == max(1, len(known.levels)), (name, method)
        assert known.degradation in ("noise", "jpeg", "pairs")
