"""Build both sites into docs/_build/html: ``python -m pip install -e ".[docs]"``, then ``python docs/build.py``.

The lessons on LoRA, docs/learn, are at the root; minilora's own pages, docs/library, are in the folder library. First
every page is run, and its contents are compared with what it computes (`docs/_ext/pages.py`); ``--write`` updates them.

Besides Python, the build needs Node.js (``node`` and ``npm``): KaTeX renders the formulas at build time. Its
stylesheet and fonts are downloaded once, from the npm package of the same version, into docs/_build.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent


def fetch_katex() -> Path:
    """Return a folder for html_static_path with KaTeX's stylesheet and fonts, fetched from npm if missing."""
    from sphinxcontrib.katex import katex_version

    folder = DOCS / "_build" / f"katex-{katex_version}"
    if folder.is_dir() and shutil.which("node"):
        return folder
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"the site needs Node.js to render its formulas: {' and '.join(missing)} not on the PATH")
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", "--silent", f"katex@{katex_version}"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the site needs KaTeX's fonts: {' '.join(command)} failed: {done.stderr.strip()}")
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            archive.extractall(temporary, filter="data")
        dist = Path(temporary, "package", "dist")
        new = folder.with_suffix(".new")  # renamed once it is complete
        shutil.rmtree(new, ignore_errors=True)
        (new / "katex" / "fonts").mkdir(parents=True)
        shutil.copy(dist / "katex.min.css", new / "katex")
        for font in (dist / "fonts").glob("*.woff2"):  # every current browser supports this format
            shutil.copy(font, new / "katex" / "fonts")
        new.rename(folder)
    return folder


def write_model() -> Path:
    """Return a folder for html_static_path with the model that a page fine-tunes, in half precision, 1.7 MB.

    It is the model of the package glassllm as a Hugging Face folder, with the package's tokenizer and license.
    """
    import numpy as np

    from minilora import Llama
    from minilora.language.files.save import save_llama
    from minilora.layer import rebuild

    try:
        package = importlib.metadata.distribution("glassllm")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the site needs the model of the package glassllm: pip install glassllm") from None
    folder = DOCS / "_build" / f"glassllm-{package.version}"
    if not folder.is_dir():
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        weights = Path(str(package.locate_file("glassllm/weights/en.npz")))
        save_llama(rebuild(Llama.load(weights), array=lambda array: array.astype(np.float16)), new / "glassllm")
        shutil.copy(weights.with_suffix(".tokenizer.json"), new / "glassllm")
        licenses = [path for path in package.files or () if path.name == "LICENSE"]
        shutil.copy(str(package.locate_file(licenses[0])), new / "glassllm" / "LICENSE.txt")
        new.rename(folder)
    return folder


MOVED = {page.stem: f"library/{page.stem}" for page in (DOCS / "library").glob("*.md") if page.stem != "index"} | {
    "attention": "network",
    "directions": "rank",
    "from-layer-to-model": "network",
    "live-model": "language-model",
    "low-rank": "rank",
    "strength": "alpha",
    "ten-confusions": "glossary",
    "the-idea": "index",
    "why-not-faster": "cost",
}
"""The new locations of moved pages, so that old links still work."""


def write_redirects(html: Path) -> None:
    """Write a page at each old address that redirects to the new one."""
    for old, new in MOVED.items():
        (html / f"{old}.html").write_text(
            f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={new}.html">'
            f'<link rel="canonical" href="{new}.html"><a href="{new}.html">This page has moved.</a>\n',
            encoding="utf-8",
        )


def main() -> int:
    """Check all pages, then build both sites; warnings are errors."""
    sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]  # not an installed minilora
    import equations
    import heads
    import markup
    import notebooks
    import pages

    every = pages.every()
    wrong = pages.check_all(every, write="--write" in sys.argv[1:])
    wrong += [problem for page in every for problem in markup.broken_links(page)] + equations.check()
    if wrong:
        print("\n\n".join(wrong), file=sys.stderr)
        return 1
    fetch_katex()
    html = DOCS / "_build" / "html"
    for written in (html, DOCS / "library" / "reference"):  # from an earlier build
        shutil.rmtree(written, ignore_errors=True)
    for site, folder in (("learn", html), ("library", html / "library")):  # -E: a fresh environment each time
        command = [sys.executable, "-m", "sphinx", "-E", "-a", "-W", "--keep-going", "-b", "html", "-t", site]
        command += ["-c", str(DOCS / "_ext"), "-d", str(DOCS / "_build" / f"doctrees-{site}")]
        if status := subprocess.run([*command, str(DOCS / site), str(folder)]).returncode:
            return status
        notebooks.write(folder / "notebooks", site)
    heads.pack(html / "library" / "minilora.zip")
    write_redirects(html)
    print(f"python -m http.server -d {html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
