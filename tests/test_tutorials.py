"""The code blocks of the tutorials run, in order, as a reader runs them; trainings take two steps."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sybil = pytest.importorskip("sybil")
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
SCRIPT = re.compile(r'^(iptv2-[\w-]+) = "([\w.]+):(\w+)"$', re.MULTILINE)
COMMANDS = {name: target for name, *target in SCRIPT.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8"))}
# Added to the tutorials' options, so that a training takes seconds
SHORT = {
    "iptv2-train": "--max_train_steps 2 --max_train_minutes none --batch_size 2 --heldout_samples 4 --sample_steps 1 "
    "--preview_per_class 1 --checkpoint_every 0 --eval_every 1 --preview_every 0 --num_workers 0 --report_to none",
    "iptv2-generate": "--steps 1",
}


def run_line(words):
    """Run one command of a shell block: ours in this process, since each process would import torch again."""
    if words[0] not in COMMANDS:
        subprocess.run(words, check=True, timeout=300)
        return
    module, function = COMMANDS[words[0]]
    argv, sys.argv = sys.argv, [*words, *shlex.split(SHORT.get(words[0], ""))]
    try:
        with pytest.raises(SystemExit) as stopped:
            getattr(importlib.import_module(module), function)()
    finally:
        sys.argv = argv
    assert not stopped.value.code, shlex.join(words)


def run_shell(example):
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            run_line(words)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder to work in that looks like a clone of the repository."""
    for name in ("assets", "configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def examples(page):
    parsers = [SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", run_shell)]
    return list(sybil.Sybil(parsers=parsers, path=str(page.parent), patterns=["*.md"]).parse(page))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_pictures", "own_classes", "restore_a_folder", "many_gpus"])
def test_the_code_of_a_tutorial_runs(name, clone):
    for example in examples(TUTORIALS / f"{name}.md"):
        example.evaluate()


@pytest.mark.slow
def test_the_comparison_with_dit_runs_on_the_shapes_of_the_tutorial_before(clone):
    shapes = next(e for e in examples(TUTORIALS / "own_classes.md") if "regular_polygon" in str(e.parsed))
    shapes.evaluate()
    for example in examples(TUTORIALS / "against_dit.md"):
        example.evaluate()


def test_every_tutorial_is_run():
    text = Path(__file__).read_text(encoding="utf-8")
    pages = sorted(path.stem for path in TUTORIALS.glob("*.md"))
    assert len(pages) == 5
    assert all(f'"{page}' in text for page in pages), pages
