"""A hook of mkdocs: files of the repository outside docs/ that a page links to as `../…` are copied into the site.

So one link serves the site and whoever reads the pages in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each linked file once; one that does not exist is left for mkdocs to name."""
    root = Path(config.docs_dir).parent
    pages = "\n".join(page.content_string for page in files.documentation_pages())
    for path in dict.fromkeys(LINK.findall(pages)):
        if (root / path).is_file():
            files.append(File.generated(config, f"repository/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point the links at the copies."""
    return LINK.sub(r"](repository/\1", markdown)
