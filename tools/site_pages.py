"""What mkdocs needs beside docs/: pages that lie in the root, and links that leave the site.

README, CONTRIBUTING and CHANGELOG are read in a checkout, where their links name files; here they
become pages. A link to a file that is no page, such as a source, becomes its name alone.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = ("bench/results/amd-epyc-2-cores.png",)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for name in PICTURES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links by the file's place in the repository, turned into links by the page's in the site."""
    here = page.file.src_uri
    of_the_root = {page: name for name, page in PAGES.items()}
    at = PurePosixPath(of_the_root.get(here, f"docs/{here}"))

    def replaced(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return link[0]
        where = _normal(at.parent / path)
        found = PAGES.get(where, where.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            return text if not picture else ""
        up = "../" * (len(PurePosixPath(here).parts) - 1)
        return f"{picture}[{text}]({up}{found}{hash_}{anchor})"

    return _LINK.sub(replaced, markdown)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
