"""The rules of the house that a machine can check: what imports what, and how long things may be (ARCHITECTURE)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for part in ("iptv2_diffusion", "pipelines", "train", "eval") for p in (ROOT / part).rglob("*.py"))
OURS = ("iptv2_diffusion", "pipelines", "train", "eval")
# A floor may import itself and the floors below it
BELOW = {
    "iptv2_diffusion.models": [],
    "iptv2_diffusion.latents": [],
    "iptv2_diffusion.memory": [],
    "iptv2_diffusion.objectives": [],
    "iptv2_diffusion.sixteen_bit": ["iptv2_diffusion.data.image_files", "iptv2_diffusion.data.image_metadata"],
    "iptv2_diffusion.data": ["iptv2_diffusion.latents", "iptv2_diffusion.sixteen_bit"],
    "iptv2_diffusion.metrics": ["iptv2_diffusion.data"],
    "pipelines": [
        "iptv2_diffusion.models",
        "iptv2_diffusion.latents",
        "iptv2_diffusion.memory",
        "iptv2_diffusion.sixteen_bit",
        "iptv2_diffusion.data.files",
        "iptv2_diffusion.data.image_files",
        "iptv2_diffusion.data.image_folders",
        "iptv2_diffusion.data.own_folder",
    ],
}
FOREIGN = ("accelerate", "datasets", "torchmetrics", "torch_fidelity", "diffusers.schedulers", "diffusers.pipelines")


def imports(path):
    """Every module named by an import statement, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def within(module, packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors_import_downwards_only(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found = set(imports(path))
    assert not {module for module in found if within(module, ("train", "eval"))}
    for floor, below in BELOW.items():
        if within(name, (floor,)):
            allowed = (floor, *below)
            assert not {m for m in found if within(m, OURS) and not within(m, allowed) and m != "iptv2_diffusion"}
    if within(name, ("iptv2_diffusion.models",)):
        assert not {module for module in found if within(module, FOREIGN)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_the_functions_of_scripts_are_short(path):
    text = path.read_text(encoding="utf-8")
    is_script = path.parent.name in ("train", "eval")
    assert len(text.splitlines()) <= (400 if is_script else 600)
    for node in ast.walk(ast.parse(text)):
        if is_script and isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, node.name
