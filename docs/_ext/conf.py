"""Sphinx configuration of the two sites, one about LoRA, one about minilora. ``python docs/build.py`` builds both."""

import re
import sys
import types
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext"), str(DOCS)]  # not an installed minilora

import sphinxcontrib.katex  # noqa: E402
from build import fetch_katex, write_model  # noqa: E402
from docutils import nodes  # noqa: E402

import minilora  # noqa: E402

site = "library" if tags.has("library") else "learn"  # noqa: F821  # Sphinx gives this file its tags
project = "minilora"
author = "the minilora authors"
copyright = "the minilora authors, MIT licence"
version = release = minilora.__version__

extensions = ["myst_parser", "sphinxcontrib.katex", "markup", "equations", "heads"]
if site == "library":
    extensions += ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc", "api"]
exclude_patterns = ["pictures", "reference/modules.rst"]
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings.
apidoc_modules = [
    {
        "path": DOCS.parent / "minilora",
        "destination": "reference",
        "exclude_patterns": [str(DOCS.parent / "minilora" / name) for name in ("cli", "**/__main__.py")],
        "automodule_options": {"members"},
        "separate_modules": True,
        "module_first": True,
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
viewcode_line_numbers = True
viewcode_follow_imported_members = False  # its back link is wrong if two modules export the same name

# Mathematics is rendered at build time, so a reader's browser runs no script and contacts no server for it. A formula
# that KaTeX does not understand stops the build.
katex_prerender = True
katex_css_path = "katex/katex.min.css"
sphinxcontrib.katex.KATEX_DEFAULT_OPTIONS.update(
    throwOnError=True,
    strict="error",
)


def start_again(rundir, timeout, start=sphinxcontrib.katex.KaTeXServer.start_server_process):
    """Start KaTeX's server a second time if the first connection came before it listened, as on a busy machine."""
    for _ in range(5):
        try:
            return start(rundir, timeout)
        except ConnectionRefusedError:
            (rundir / "katex.sock").unlink()
    return start(rundir, timeout)


sphinxcontrib.katex.KaTeXServer.start_server_process = start_again
sphinxcontrib.katex.STARTUP_TIMEOUT = 30


html_theme = "furo"
html_title = "LoRA" if site == "learn" else "minilora"
html_favicon = str(DOCS / "_static" / "favicon.svg")
html_static_path = [str(DOCS / "_static"), str(fetch_katex()), *([str(write_model())] if site == "learn" else [])]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#2f54b5",
        "color-brand-content": "#2f54b5",
        "color-back": "#a8420d",
    },
    "dark_css_variables": {"color-brand-primary": "#8aa6f2", "color-brand-content": "#8aa6f2", "color-back": "#f59b6a"},
}


def adjust(app, doctree):
    """Align multi-line formulas, and keep a formula and the full stop after it on one line."""
    for node in doctree.findall(nodes.math_block):
        tex = node.astext()
        if r"\\" in tex and r"\begin" not in tex:  # Sphinx adds this itself, but only for MathJax
            node.children = [nodes.Text(r"\begin{aligned}" + tex + r"\end{aligned}")]
    for node in list(doctree.findall(nodes.math)):
        following = node.next_node(descend=False, siblings=True)
        # A long formula must be able to break across lines: a phone is narrow.
        if isinstance(following, nodes.Text) and following[:1] in tuple(".,;:?!)") and len(node.astext()) <= 24:
            following.parent.replace(following, nodes.Text(following[1:]))
            node.replace_self(nodes.inline("", "", node.deepcopy(), nodes.Text(following[:1]), classes=["together"]))


def fold_sidebar(app, pagename, template, context, doctree):
    """Show only the current package's modules in the sidebar: all modules on every page would be 200 links."""
    whole = context["toctree"]
    context["toctree"] = lambda **options: whole(**{**options, "collapse": True})


NEEDS = [
    (r'class="(?:hands|picture graph)"', "hands.js"),
    (r'class="question written', "numpy.js"),
    (r'class="question', "questions.js questions.css"),
    (r'class="question written', "exercises.js"),
    (r'data-live="(\w+)"', r"live/\1.js live/live.css"),
    (r'<figure class="front">', "live/front.css"),
    (r'^(?!.*<figure class="front">).*<strong>Predict\.</strong>', "live/lesson.js"),  # front page: its own
]
"""Patterns in a page's HTML, each with the scripts and styles that it needs."""


def add_files(app, pagename, template, context, doctree):
    """Load the scripts and styles that the page needs; the scripts in `live` are modules."""
    for pattern, needed in NEEDS:
        for found in re.finditer(pattern, context.get("body", ""), re.S):
            for file in found.expand(needed).split():
                if file.endswith(".css"):
                    app.add_css_file(file)
                else:
                    app.add_js_file(file, **({"type": "module"} if "/" in file else {"loading_method": "defer"}))


def tidy_search(app, pagename, template, context, doctree):
    """Load the script that tidies excerpts on the search page, and drop the search highlighting on all others."""
    if pagename == "search":
        app.add_js_file("search.js", loading_method="defer")
    else:
        marks = "_static/sphinx_highlight.js"
        context["script_files"][:] = [
            file for file in context["script_files"] if getattr(file, "filename", file) != marks
        ]


def no_signature(app, what, name, obj, options, signature, returns):
    """Keep numpydoc from treating ``Cache = tuple[Any, ...]`` as a function, on which autodoc would fail."""
    return () if isinstance(obj, types.GenericAlias) else None


def plain_mathematics(app, what, name, obj, options, lines):
    """Show formulas in docstrings literally: ``|g|`` is no substitution, ``*sizes`` no emphasis, ``(1)`` no list.

    Formulas that a module's docstring indents by four spaces keep their line breaks.
    """
    text = "\n".join(lines) + "\n"
    if what == "module":
        # An indented block after a paragraph that is neither a list nor a directive.
        block = r"(?m)(^(?!\.\. |- |\d+\. |\s).*(?<!::)\n\n)((?:    .*\n|\n(?=    ))+)"
        text = re.sub(block, r"\1.. code-block:: text\n\n\2", text)
        text = re.sub(r"(?m)^(\(\d+\) )", r"\\\1", text)  # an equation's number, not the first item of a list
    kept = r"(?m)(^    .*$)" if what == "module" else r"(`+[^`]*`+)"
    text = re.sub(rf"{kept}|(`+[^`]*`+)|(\||(?<=[ (])\*(?=\w+[),]))", lambda m: m[1] or m[2] or "\\" + m[3], text)
    lines[:] = text.splitlines()


def setup(app):
    """Register the functions above with Sphinx."""
    app.connect("html-page-context", fold_sidebar, priority=100)  # before the theme reads it
    app.connect("html-page-context", add_files)
    app.connect("html-page-context", tidy_search)
    app.connect("doctree-read", adjust)
    if site == "library":
        app.connect("autodoc-process-signature", no_signature, priority=100)
        app.connect("autodoc-process-docstring", plain_mathematics, priority=100)
