"""The wheel: one top-level name, every module, and pipelines that load wherever Python is started."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "assets", "configs", "iptv2_diffusion", "pipelines")
PIPELINE = ROOT / "assets" / "iptv2-emoji64"


def run(*command, cwd, **environment):
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of the sources, because a build leaves files next to them."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "iptv2-emoji64"))
        else:
            shutil.copy(ROOT / name, folder / name)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's contents, as an installation leaves them."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder outside the checkout that has its own package `pipelines`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "__init__.py").write_text("alien = True\n")
    return folder


def test_the_wheel_installs_one_name_with_every_module_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "iptv2_diffusion").rglob("*.py")}
    modules |= {f"iptv2_diffusion/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "pipelines").rglob("*.py")}
    assert {name for name in installed if name.endswith(".py")} == modules, "pyproject.toml: packages is not complete"
    assert {name.split("/")[0] for name in installed} == {"iptv2_diffusion"}
    assert "iptv2_diffusion/py.typed" in installed


def test_the_wheel_carries_the_recipes_and_the_default_models(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"iptv2_diffusion/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in names if name.endswith(".yaml")} == recipes
    models = ("iptv2-denoise-color/model", "vae-emoji64")
    files = {f"iptv2_diffusion/assets/{m}/diffusion_pytorch_model.safetensors" for m in models}
    assert {name for name in names if name.endswith(".safetensors")} == files
    assert wheel.stat().st_size < 12e6


def test_the_citation_names_the_version_of_the_wheel(wheel):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert wheel.name.split("-")[1] == citation["version"]


@pytest.mark.slow
def test_the_release_builds_and_the_index_would_take_it(tmp_path):
    """The wheel is built from the source distribution, as pip does where there is no wheel."""
    for module in ("build", "twine", "cffconvert"):
        pytest.importorskip(module)
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        if name.split("/")[0] not in ("data", "docs", "tests"):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=tmp_path / "source")
    files = sorted(map(str, (tmp_path / "dist").iterdir()))
    assert [name.endswith((".tar.gz", ".whl")) for name in files] == [True, True]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=tmp_path)
    run(
        shutil.which("cffconvert", path=Path(sys.executable).parent),
        "--validate",
        "--infile",
        str(ROOT / "CITATION.cff"),
        cwd=tmp_path,
    )


def test_the_commands_of_the_wheel_exist_and_answer_help(installed, elsewhere):
    entries = configparser.ConfigParser()
    entries.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    wanted = {"app", "cache", "convert", "export", "fid", "generate", "restore", "train"}
    wanted |= {"train-restoration", "train-vae"}
    assert {f"iptv2-{name}" for name in wanted} == set(entries["console_scripts"])
    for name, target in entries["console_scripts"].items():
        module, function = target.split(":")
        program = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function} as run; run()"
        assert name in run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(installed))


def test_help_imports_neither_torch_nor_diffusers(installed, elsewhere):
    """Their import takes seconds."""
    for module in (
        "commands.train",
        "commands.fid",
        "commands.generate",
        "pipelines.export_cli",
        "pipelines.restore_cli",
    ):
        program = f"""
import contextlib, io, sys
from iptv2_diffusion.{module} import run
sys.argv = ["iptv2", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    run()
print({{"torch", "diffusers", "accelerate", "datasets"}} & set(sys.modules))
"""
        assert run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(installed)) == "set()\n"


USE = """
import sys
from PIL import Image
from iptv2_diffusion.commands.generate import main as generate
from iptv2_diffusion.files import shipped
from iptv2_diffusion.pipelines.restore_cli import main as restore
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import UserError
from iptv2_diffusion.training.parsing import parse_config

Image.effect_noise((40, 24), 40).convert("RGB").save("photo.png")
assert restore(["photo.png"]) == 0
assert restore(["photo.png", "-o", "clean.jpg"]) == 0
assert Image.open("restored/photo.png").size == Image.open("clean.jpg").size == (40, 24)
assert generate(["flags", "-n", "2", "--steps", "1", "--pipeline", sys.argv[1], "--grid", "sheet.png"]) == 0
assert Image.open("generated/flags-1.png").size == (64, 64)
try:
    generate(["flags"])
except UserError as error:
    print(error)
config = parse_config(LDMConfig, ["--config", "emoji64"])
assert config.objective == "flow" and (shipped(config.vae) / "config.json").is_file()
print(shipped(config.vae))
"""


def test_the_commands_of_the_wheel_work_without_the_repository(installed, elsewhere):
    told = run(sys.executable, "-c", USE, str(PIPELINE), cwd=elsewhere, PYTHONPATH=str(installed)).splitlines()
    assert told[-2].startswith("the default pipeline assets/iptv2-emoji64 is part of the repository")
    assert told[-1] == str(installed / "iptv2_diffusion/assets/vae-emoji64")


WHERE = """
import importlib.util, json, sys
import iptv2_diffusion, pipelines
found = importlib.util.find_spec("iptv2_diffusion.pipelines.pipeline_iptv2")
assert not {"torch", "diffusers"} & set(sys.modules)
print(json.dumps([iptv2_diffusion.__file__, found.origin, pipelines.__file__]))
"""


@pytest.mark.parametrize(
    ("code", "start"), [("wheel", "elsewhere"), ("checkout", "elsewhere"), ("wheel", "checkout"), (None, "checkout")]
)
def test_the_pipelines_are_found_wherever_python_starts(code, start, installed, elsewhere):
    """`python -c` puts the current folder first: in the checkout its code takes precedence over the wheel's."""
    cwd = {"elsewhere": elsewhere, "checkout": ROOT}[start]
    path = {"wheel": installed, "checkout": ROOT, None: ""}[code]
    package, ours, top = map(Path, json.loads(run(sys.executable, "-c", WHERE, cwd=cwd, PYTHONPATH=str(path))))
    assert top == cwd / "pipelines" / "__init__.py"
    if ROOT in (cwd, path):
        assert (package, ours) == (ROOT / "iptv2_diffusion/__init__.py", ROOT / "pipelines/pipeline_iptv2.py")
    else:
        home = installed / "iptv2_diffusion"
        assert (package, ours) == (home / "__init__.py", home / "pipelines/pipeline_iptv2.py")


LOAD = """
import pickle, sys
from diffusers import DiffusionPipeline
import iptv2_diffusion
plain = DiffusionPipeline.from_pretrained(sys.argv[1])
ours = iptv2_diffusion.IPTV2Pipeline.from_pretrained(sys.argv[1])
assert type(plain) is type(ours) is pickle.loads(pickle.dumps(type(plain)))
assert isinstance(plain.transformer, iptv2_diffusion.IPTV2Transformer2DModel)
assert plain("flags", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
print(sys.modules[type(plain).__call__.__module__].__file__)
"""


def test_the_wheel_loads_a_shipped_pipeline_despite_a_foreign_pipelines_package(installed, elsewhere):
    """Imported after diffusers here; tests/test_imports.py has the other order."""
    told = run(sys.executable, "-c", LOAD, str(PIPELINE), cwd=elsewhere, PYTHONPATH=str(installed))
    assert told.splitlines()[-1] == str(installed / "iptv2_diffusion/pipelines/pipeline_iptv2.py")
