"""The long description for package indexes; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")


def without_links_to_files(markdown: str) -> str:
    """A README on its own: links to files of the repository become their text, and pictures from it go."""
    target = r"\((?!https?://|mailto:)[^)\s]*\)"
    without_pictures = re.sub(rf"^!\[[^\]]*\]{target}\n+", "", markdown, flags=re.MULTILINE)
    return re.sub(rf"(?<!!)\[([^\]]*)\]{target}", r"\1", without_pictures)


setup(
    long_description=without_links_to_files(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
