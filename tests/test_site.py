"""The documentation site builds without a warning. Needs the extra `docs`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def pages(entries):
    for entry in entries:
        (target,) = entry.values()
        yield from [target] if isinstance(target, str) else pages(target)


def test_the_navigation_lists_every_page():
    text = re.sub(r"!!python/name:\S+ ", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages(yaml.safe_load(text)["nav"]))
    docs = ROOT / "docs"
    present = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert set(listed) ^ present == set(), "mkdocs.yml: nav"
    assert len(listed) == len(present)


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_to_files(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    api = (tmp_path / "api" / "pipelines.html").read_text(encoding="utf-8")
    assert "num_inference_steps" in api
    missing = set()
    for page in tmp_path.rglob("*.html"):
        if page.name == "404.html":  # its links are absolute
            continue
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|//", target) and not (page.parent / target).exists():
                missing.add((page.relative_to(tmp_path).as_posix(), target))
    assert not missing
