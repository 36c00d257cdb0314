"""What mkdocs does to each page of the site, beside what mkdocs.yml says."""

import re
from typing import Any


def on_page_markdown(markdown: str, config: Any, page: Any, **_: Any) -> str:
    """Let links that leave docs/, which work in a clone and on GitHub, lead to the repository."""
    up = "../" * (page.file.src_uri.count("/") + 1)  # from the page's folder to the repository's root
    return re.sub(rf"\]\({re.escape(up)}(?!\.)", f"]({config.repo_url}/blob/main/", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings refer to other objects as [`name`]; show the name alone."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
