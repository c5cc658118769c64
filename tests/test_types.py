"""mypy on the public modules, in the layout of the wheel: `pipelines/` is inside the package there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]
PACKAGES = ("commands", "data", "integrations", "kernels", "models", "pipelines")
MODULES = ("files", "latents", "memory", "messages", "non_finite", "objectives", "strict_yaml", "variational_bound")


@pytest.mark.slow
def test_the_public_modules_are_typed(tmp_path):
    package = tmp_path / "iptv2_diffusion"
    package.mkdir()
    for path in (ROOT / "iptv2_diffusion").iterdir():
        if path.name != "pipelines.py":  # stands for the folder in a clone
            (package / path.name).symlink_to(path)
    (package / "pipelines").symlink_to(ROOT / "pipelines")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    command += [word for name in PACKAGES for word in ("-p", f"iptv2_diffusion.{name}")]
    command += [word for name in MODULES for word in ("-m", f"iptv2_diffusion.{name}")]
    result = subprocess.run([*command, "-m", "iptv2_diffusion"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
