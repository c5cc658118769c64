"""MkDocs hook: links from the documentation to other files of the repository work in the built site.

The pages link to files beside docs/, such as `../assets/restored.png` or `../iptv2_diffusion/latents.py`, so that they
work in the repository. The hook adds each linked file to the site: pictures as they are, Markdown as pages, and code as
pages with highlighting. Links to folders become links to their README, or plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?P<head>!?\[(?P<text>[^\[\]]*)\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sbatch": "bash", ".toml": "toml", ".json": "json"}
PICTURES = (".png", ".jpg", ".svg")


def repository_path(page_uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    if page_uri.startswith("repository/"):
        return page_uri.removeprefix("repository/")
    return f"docs/{page_uri}"


def target_of(page_uri: str, target: str) -> str | None:
    """Return the repository path of a link's target; None for an address, or a target outside of the repository."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page_uri)), target))
    if path.startswith(".."):
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def site_uri(path: str) -> str:
    """Return the source path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def generated(path: str, config: MkDocsConfig) -> File:
    """Return the file of the site for a file of the repository."""
    uri, source = site_uri(path), ROOT / path
    if path.endswith((".md", *PICTURES)):
        return File.generated(config, uri, abs_src_path=str(source))
    language = LANGUAGES.get(source.suffix, "text")
    text = source.read_text(encoding="utf-8")
    return File.generated(config, uri, content=f"# `{path}`\n\n````{language}\n{text}\n````\n")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the linked files of the repository, and those that they link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        if not uri.endswith(".md") or (uri.startswith("repository/") and not repository_path(uri).endswith(".md")):
            continue
        page = ROOT / repository_path(uri)
        if not page.is_file():  # a page of code, which has no links
            continue
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            path = target_of(uri, match["target"])
            if path is None or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            if files.get_file_from_path(site_uri(path)) is None:
                files.append(generated(path, config))
                waiting.append(site_uri(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the files of the site."""
    uri = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        path = target_of(uri, match["target"])
        if path is None:
            return match[0]
        if files.get_file_from_path(site_uri(path)) is None:
            return match["text"] if (ROOT / path).exists() else match[0]  # MkDocs reports a missing target
        relative = posixpath.relpath(site_uri(path), posixpath.dirname(uri) or ".")
        return f"{match['head']}({relative}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)
