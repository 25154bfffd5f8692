"""Sphinx extension: pages that run are run side by side, each by its own kernel, while Sphinx reads the others.

MyST-NB keeps what a page printed in docs/_build/executed, under its cells and its kernel's name, and shows it again. A
digest of all that the page reads is part of that name here: its cells, the package, the files that it shares, the
versions (`notebooks.inputs`). So a page runs again where one of them has changed.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from jupyter_cache import get_cache
from myst_nb.core.config import NbParserConfig
from myst_nb.core.execute import create_client
from myst_nb.core.execute.base import ExecutionError
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig
from notebooks import inputs
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.util import logging

from minilora.fast.parts import core_count

DOCS = Path(__file__).parent
KERNEL = "display_name: Python 3\n"
"""In the head of each page that runs."""
running: dict[str, Future[None]] = {}


class FailedPage(SphinxError):
    """A cell of a page raises."""

    category = "a page does not run"


def named(text: str) -> str:
    """Return a page with the digest of all that it reads in its kernel's name."""
    return text.replace(KERNEL, f"{KERNEL[:-1]}, {inputs(text)}\n", 1)


def run(page: str, md_config: MdParserConfig, nb_config: NbParserConfig) -> None:
    """Run a page where nothing is kept of what it prints, and keep that; raise where a cell fails."""
    path = DOCS / f"{page}.md"
    text = named(path.read_text(encoding="utf-8"))
    reader = create_nb_reader(str(path), md_config, nb_config, text)
    try:
        with create_client(reader.read(text), str(path), nb_config, logging.getLogger(__name__), reader.read_fmt):
            pass  # it has run on entrance
    except ExecutionError as error:
        raise FailedPage(f"{page}.md: {error.__cause__}") from None


def begin(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Run the pages in as many processes as there are processors, and let Sphinx read the others first."""
    pages = [name for name in docnames if KERNEL in Path(env.doc2path(name)).read_text(encoding="utf-8")]
    get_cache(app.config.nb_execution_cache_path).list_cache_records()  # it is made now, before several ask for it
    pool = ProcessPoolExecutor(core_count(), get_context("fork"))
    running.update({page: pool.submit(run, page, env.myst_config, env.mystnb_config) for page in pages})
    pool.shutdown(wait=False)
    docnames.sort(key=running.__contains__)


def wait(app: Sphinx, docname: str, source: list[str]) -> None:
    """Wait for a page that is about to be read."""
    if docname in running:
        running.pop(docname).result()
        source[0] = named(source[0])


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("env-before-read-docs", begin)
    app.connect("source-read", wait)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
