"""Sphinx extension: the step of a page in another library, folded below ours.

A block ``{peer} torch`` or ``{peer} PEFT`` holds Python that prints what the cell above it prints, digit for digit.
It may use the cell's arrays. The site is built without these libraries: `tests/peers/test_pages.py` runs the blocks.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LIBRARIES = ("torch", "PEFT")


class PeerDirective(SphinxDirective):
    """``{peer} LIBRARY``, with the code below."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the block, folded."""
        library, code = self.arguments[0], "\n".join(self.content)
        if library not in LIBRARIES:
            raise self.error(f"the library must be one of {', '.join(LIBRARIES)}, got {library!r}")
        head = f'<details class="peer"><summary>The same in {library}</summary>'
        note = nodes.paragraph("", "It prints the same digits.", classes=["note"])
        block = nodes.literal_block(code, code, language="python")
        return [nodes.raw("", head, format="html"), block, note, nodes.raw("", "</details>", format="html")]


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_directive("peer", PeerDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
