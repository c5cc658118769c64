"""Importing the package is cheap and lazy, and registers it with diffusers."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import iptv2_diffusion

ROOT = Path(__file__).parents[1]

# Modules that importing this package adds to those of `import torch, diffusers`
PROBE = """
import json, sys
import torch, diffusers
before = set(sys.modules)
import iptv2_diffusion
added = set(sys.modules) - before
print(json.dumps(sorted(added)))
"""


def test_import_loads_nothing_but_itself():
    """The import therefore adds only a few milliseconds to `import torch, diffusers`."""
    result = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, cwd=ROOT)
    added = json.loads(result.stdout)
    assert [name for name in added if name.startswith("iptv2_diffusion")] == ["iptv2_diffusion"]
    assert [name for name in added if name.startswith("diffusers")] in ([], ["diffusers.pipelines"])
    # importlib.metadata, which reads the version, may import small modules of the standard library
    others = {name.split(".")[0] for name in added} - {"iptv2_diffusion", "diffusers"}
    assert others <= sys.stdlib_module_names


# Imported before diffusers: loads neither it nor torch, and plain DiffusionPipeline finds our pipelines all the same
FIRST = """
import sys
import iptv2_diffusion
assert not {"torch", "diffusers"} & set(sys.modules)
from diffusers import DiffusionPipeline
import diffusers
assert diffusers.pipelines.iptv2_diffusion is iptv2_diffusion
assert not [name for name in sys.modules if name.startswith("iptv2_diffusion.")]
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert diffusers.IPTV2Pipeline is iptv2_diffusion.IPTV2Pipeline is type(pipeline)
assert diffusers.IPTV2Pipeline.__module__ == "iptv2_diffusion"
"""


def test_imported_before_diffusers(tmp_path):
    command = [sys.executable, "-c", FIRST, str(ROOT / "assets" / "iptv2-emoji64")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "train").glob("*.py") if p.name != "__init__.py"))
def test_help_needs_neither_torch_nor_diffusers(script):
    """`--help` therefore answers at once."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train' / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code in (0, None)\n"
        "print('loaded:', *{'torch', 'diffusers', 'datasets', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("name", iptv2_diffusion.__all__)
def test_public_names(name):
    value = getattr(iptv2_diffusion, name)
    assert name in dir(iptv2_diffusion)
    if isinstance(value, type) and not value.__module__.startswith("diffusers"):
        assert value.__module__ == "iptv2_diffusion"
        assert pickle.loads(pickle.dumps(value)) is value


def test_every_public_name_is_lazy_and_the_other_way_round():
    assert set(iptv2_diffusion.__all__) == set(iptv2_diffusion._LAZY_NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'IPTV3Pipeline'"):
        iptv2_diffusion.IPTV3Pipeline  # noqa: B018


def test_diffusers_knows_us_and_is_otherwise_unchanged():
    assert diffusers.pipelines.iptv2_diffusion is iptv2_diffusion
    assert diffusers.IPTV2Pipeline is iptv2_diffusion.IPTV2Pipeline
    assert diffusers.DDPMScheduler.__name__ == "DDPMScheduler"
    with pytest.raises(AttributeError, match="IPTV3Pipeline"):
        diffusers.IPTV3Pipeline  # noqa: B018


def test_registering_twice_changes_nothing():
    before = type(diffusers), dict(vars(diffusers)), dict(vars(diffusers.pipelines))
    iptv2_diffusion._register_with_diffusers()
    assert (type(diffusers), vars(diffusers), vars(diffusers.pipelines)) == before


def test_what_diffusers_has_already_is_left_alone(monkeypatch):
    """A later version of diffusers may have a pipeline of our name, or a `__getattr__`."""
    monkeypatch.setattr(diffusers.pipelines, "iptv2_diffusion", "theirs")
    monkeypatch.setattr(diffusers, "IPTV2Pipeline", "theirs", raising=False)
    monkeypatch.delattr(diffusers, "__getattr__")
    iptv2_diffusion._register_with_diffusers()
    assert diffusers.pipelines.iptv2_diffusion == diffusers.IPTV2Pipeline == "theirs"
    assert "__getattr__" not in vars(diffusers)


def test_base_classes_by_which_diffusers_loads_our_components():
    assert iptv2_diffusion.ModelMixin is diffusers.ModelMixin
    assert iptv2_diffusion.SchedulerMixin is diffusers.SchedulerMixin
