"""The package's description, which `pyproject.toml` cannot make: README.md for a package index, which has none of the
files beside it. Pictures and links to these files become plain text."""

import re
from pathlib import Path

from setuptools import setup

ANYWHERE = "https?://"  # what such a link begins with shows on any page
AT_THE_END = """
This page is README.md. The files and pictures that it names are in the project's repository and, measured results
apart, in the source distribution.
"""

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(rf"!\[([^\]]*)\]\((?!{ANYWHERE})[^)]*\)", r"*Picture: \1.*", text)
text = re.sub(rf"\[([^\]]*)\]\((?!{ANYWHERE})[^)]*\)", r"\1", text)
setup(long_description=text + AT_THE_END, long_description_content_type="text/markdown")
