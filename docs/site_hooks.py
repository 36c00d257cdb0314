"""Changes that mkdocs makes to the pages of the site, beyond the settings in mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the site that are files in the root of the repository.
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository's root, with links as from docs/."""
    for name, page in FROM_ROOT.items():
        markdown = (ROOT / name).read_text().replace("](docs/", "](")
        for other, other_page in FROM_ROOT.items():
            markdown = markdown.replace(f"]({other}", f"]({other_page}")
        files.append(File.generated(config, page, content=markdown))
    return files


def on_page_markdown(markdown: str, config: Any, page: Any, **_: Any) -> str:
    """Have links that leave docs/, which work in a clone, lead to the repository; without its address, drop them."""
    up = "../" * (page.file.src_uri.count("/") + 1)  # from the page's folder to the repository's root
    for name, target in FROM_ROOT.items():
        markdown = markdown.replace(f"]({up}{name}", f"]({up[3:]}{target}")
    if config.repo_url:
        return re.sub(rf"\]\({re.escape(up)}(?!\.)", f"]({config.repo_url}/blob/main/", markdown)
    return re.sub(rf"(?<!!)\[([^\]]*)\]\({re.escape(up)}(?!\.)[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings refer to other objects as [`name`]; show the name alone."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
