"""Configuration of Sphinx, which makes the site of these pages: ``nox -s docs``.

The pages are Markdown that can also be read in the repository. `diagrams.py` draws diagrams.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "aio-pika-batch"
author = "the aio-pika-batch authors"
project_copyright = author
release = importlib.metadata.version("aio-pika-batch")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "diagrams",
]

exclude_patterns = ["_build"]
templates_path: list[str] = []
source_suffix = {".md": "markdown"}

# --- Markdown -------------------------------------------------------------------

myst_enable_extensions = ["attrs_inline", "colon_fence", "fieldlist"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

# --- API reference --------------------------------------------------------------

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written, and not what a strategy consists of
autodoc_class_signature = "mixed"  # with the parameters of the constructor
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # as Markdown has it

# --- how it looks ---------------------------------------------------------------

html_theme = "furo"
html_title = f"aio-pika-batch {release.partition('+')[0]}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("tables.js", {"defer": "defer"})]
html_show_sourcelink = False
html_copy_source = False

# Only what is shown after the prompt is copied.
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
