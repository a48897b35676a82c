"""Metadata that needs the repository's address, which the release workflow knows and the files do not.

With REPOSITORY_URL set, the package links to the repository, and the relative links of README.md, which lead nowhere on
the page of a package index, lead to the repository's files at the release's tag. Without it README.md stays as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PAPER = "https://arxiv.org/abs/2603.21077"
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)\s]+)\)")


class RepositoryLinks(MetadataHookInterface):
    """Fills in `readme` and `urls`; the version is known by then."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Change the table `[project]` in place; called by hatchling."""
        repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(readme, repository, f"v{metadata['version']}") if repository else readme,
        }
        metadata["urls"] = urls(repository, os.environ.get("SITE_URL", ""))


def urls(repository: str, site: str) -> dict[str, str]:
    """Return the links of the package; those whose address is empty are left out."""
    links = {
        "Documentation": site,
        "Repository": repository,
        "Changelog": repository and f"{repository}/blob/main/CHANGELOG.md",
        "Issues": repository and f"{repository}/issues",
        "Paper": _PAPER,
    }
    return {name: address for name, address in links.items() if address}


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Make the relative links and pictures of a Markdown text absolute, at a tag of the repository."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({repository}/{kind}/{tag}/{match['path']})"

    return _LINK.sub(absolute, text)
