"""The built site, as a reader's browser meets it. Build it first: ``python docs/build.py``; then ``pytest -m site``."""

import json
import posixpath
import re
import time
import zipfile
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api
import pytest

from .conftest import SITE, resize

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")) if SITE.is_dir() else []
SHOWN = [page for page in PAGES if 'http-equiv="refresh"' not in (SITE / page).read_text(encoding="utf-8")]
"""All but old addresses, which lead on at once."""
WIDTHS = (390, 1280)  # a phone and a desk
SOURCES = {
    ("library/" if path.parent.name == "library" else "") + f"{path.stem}.html": path
    for path in sorted(SITE.parents[1].glob("l*/*.md"))
}
RUNS = re.compile(r"^```python$", re.M)

REFERENCE = re.compile(r"(?<![\w'\u2019])\((?:[a-z]+\.)?\d{1,3}\)")

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(not PAGES, reason="the site is not built: python docs/build.py"),
]


class Page(HTMLParser):
    """The ids of a page, where its links lead, and its prose: its article without code, headings and links."""

    NO_PROSE = ("a", "button", "code", "pre", "script", "style", "summary", "svg", "title", "h1", "h2", "h3", "h4")

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.prose, self.inside = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.links += [attrs[name] for name in ("href", "src") if attrs.get(name) and tag != "use"]
        classes = set((attrs.get("class") or "").split())
        no_prose = {"number", "katex"} & classes or self.inside[-1:] == ["span"]
        recorded = tag == "table" and "data" in classes  # may quote a message of another program
        if tag in ("article", *self.NO_PROSE) or (tag == "span" and no_prose) or recorded:
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside[-1:] == [tag]:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside == ["article"]:
            self.prose.append(data)


TOLD = [page for page in PAGES if page in SOURCES]
REFERENCE_PAGES = [page for page in PAGES if page.startswith("library/reference/")]
parse = cache(lambda name: Page(SITE / name))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_site_leads_somewhere(page):
    lost = []
    for link in parse(page).links:
        url = urlsplit(link)
        if url.scheme or url.netloc:
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(url.path))) if url.path else page
        if not (SITE / target).is_file() or (url.fragment and unquote(url.fragment) not in parse(target).ids):
            lost.append(link)
    assert lost == []


def test_every_reference_to_an_equation_is_a_link():
    linked = {page: [link for link in parse(page).links if "#eq-" in link] for page in TOLD}
    assert sum(map(len, linked.values())) > 200
    assert {urlsplit(link).fragment for link in linked["network.html"]} >= {
        "eq-10",
        "eq-att-4",
        "eq-att-9",
    }
    dead = {page: REFERENCE.findall(" ".join(parse(page).prose)) for page in TOLD + REFERENCE_PAGES}
    assert {page: found for page, found in dead.items() if found} == {}


def test_every_numbered_line_links_to_its_equation_and_back():
    there = {
        (link.rpartition("_modules/")[2], page)
        for page in PAGES
        if not page.startswith("library/_modules/")
        for link in parse(page).links
        if "_modules/" in link and "#eq-" in link
    }
    code = Path(__file__).parents[2] / "minilora"
    assert len(there) == sum(len(re.findall(r"# eq\. \(", path.read_text())) for path in code.rglob("*.py")) > 35
    for link, page in there:
        source = f"library/_modules/{urlsplit(link).path}"
        # eq-5 and eq-5-2 both lead to equation 5, eq-act-1 to (act.1).
        equation = re.match(r"eq-(?:[a-z]+-)?\d+", urlsplit(link).fragment)[0]
        back = [posixpath.normpath(posixpath.join(posixpath.dirname(source), x)) for x in parse(source).links]
        assert f"{page}#{equation}" in back


@pytest.mark.parametrize("page", SHOWN)
def test_a_browser_shows_the_page_without_complaint(browser, address, page):
    """It is loaded on a phone, which then becomes as wide as a desk."""
    resize(browser, WIDTHS[0])
    browser.get_log("browser"), browser.get_log("performance")  # what an earlier page left
    browser.get(address + page)
    browser.execute_async_script("document.fonts.ready.then(arguments[0])")

    assert [entry["message"] for entry in browser.get_log("browser")] == []

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in requests)
    # chrome: is of the empty tab that Chromium opens first, on a slow machine still when the page is asked for.
    assert [url for url in requests if not url.startswith((address, "data:", "chrome:"))] == []
    responses = [e["params"]["response"] for e in events if e["method"] == "Network.responseReceived"]
    assert [response["url"] for response in responses if response["status"] >= 400] == []

    for width in WIDTHS:
        resize(browser, width)
        # On a phone the theme scrolls its column rather than the page, so that every box around the text is asked.
        too_wide, formulas, main_font, pictures = browser.execute_script(
            """return [
                   [...document.querySelectorAll("html, body, .page, .main, .content")]
                       .filter(e => e.scrollWidth > Math.min(e.clientWidth, arguments[0]))
                       .map(e => e.outerHTML.slice(0, 40)),
                   [...document.querySelectorAll("span.math, div.math")].filter(e => e.checkVisibility()).map(e =>
                       e.querySelector(".katex-html") !== null && !e.querySelector(".katex-error")
                       && e.querySelector(".katex-html").getBoundingClientRect().height > 5),
                   document.fonts.check("16px KaTeX_Main"),
                   [...document.querySelectorAll("figure.picture svg")].filter(e => e.checkVisibility()).map(e =>
                       (e.getAttribute("alt") || e.getAttribute("aria-label") || "").length > 20
                       && e.getBoundingClientRect().width > 100)]""",
            width,
        )
        assert too_wide == []
        assert all(formulas)
        assert main_font or not formulas
        assert all(pictures)


@pytest.fixture(scope="module", params=TOLD)
def unfolded(browser, address, request):
    """A browser that has a page before it, with all that is folded open."""
    browser.get(address + request.param)
    browser.execute_async_script("document.fonts.ready.then(arguments[0])")
    browser.execute_script("""document.querySelectorAll("details").forEach(e => e.open = true)""")
    return browser


def test_a_phone_cuts_no_formula_or_table_of_lessons(unfolded):
    """A table of the library may be wider than a phone, and scrolls."""
    resize(unfolded, WIDTHS[0])
    cut = unfolded.execute_script(
        """return [...document.querySelectorAll("div.math, .katex-html, .table-wrapper")]
               .filter(e => e.scrollWidth > e.clientWidth + 1)
               .map(e => [e.className.includes("table"), getComputedStyle(e).overflowX, e.textContent.slice(0, 60)])"""
    )
    in_library = "/library/" in unfolded.current_url
    assert [text for table, overflow, text in cut if not (table and overflow == "auto" and in_library)] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_code_and_outputs_scroll_and_keep_their_lines(unfolded, width):
    """Where the theme would wrap them, the columns of an output and the indents of Python would be lost."""
    resize(unfolded, width)
    blocks = unfolded.execute_script(
        """const all = [...document.querySelectorAll("div.highlight pre")];
           return all.filter(e => e.checkVisibility() && !e.closest(".prose")).map(e => {
               const style = getComputedStyle(e), lines = e.textContent.replace(/\\n+$/, "").split("\\n").length;
               const height = e.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
               return [e.textContent.slice(0, 60), style.whiteSpace, style.overflowX, parseFloat(style.fontSize),
                       height / (lines * parseFloat(style.lineHeight))];
           })"""
    )
    for text, space, overflow, size, rows in blocks:
        assert (space, overflow) == ("pre", "auto"), text
        assert size >= 12, text
        assert rows == pytest.approx(1, abs=0.3), text


@pytest.mark.parametrize("page", ["is-a-gradient-right.html", "library/experts.html"])
def test_a_desk_shows_the_reports_of_gradcheck_whole(visit, page):
    cut = visit(page, WIDTHS[1]).execute_script(
        """return [...document.querySelectorAll("div.printed pre")]
               .filter(e => e.textContent.includes("gradcheck by")).map(e => e.scrollWidth > e.clientWidth)"""
    )
    assert cut
    assert not any(cut)


@pytest.mark.parametrize("width", [1280, 1300, 1312, 1366])
def test_a_desk_shows_the_pages_outline(visit, width):
    browser = visit("derivation.html", width)
    outline, text = browser.execute_script(
        """return [".toc-drawer", "article"].map(
               name => document.querySelector(name).getBoundingClientRect().toJSON())"""
    )
    room = browser.execute_script("return document.documentElement.clientWidth")  # without a scrollbar
    assert text["right"] <= outline["left"] < outline["right"] <= room <= width
    links = [link for link in browser.find_elements("css selector", ".toc-drawer a") if link.is_displayed()]
    assert len(links) > 8
    assert text["width"] > 600


@pytest.mark.parametrize("page", TOLD)
def test_every_page_with_python_downloads_as_a_notebook(page):
    file = f"notebooks/{SOURCES[page].stem}.ipynb"
    assert (file in parse(page).links) == bool(RUNS.search(SOURCES[page].read_text(encoding="utf-8")))
    written = (SITE / page).with_name("notebooks").joinpath(f"{SOURCES[page].stem}.ipynb")
    assert written.is_file() == (file in parse(page).links)


def test_every_module_has_a_page():
    assert [name for name in api.modules() if f"library/reference/{name}.html" not in PAGES] == []


def test_no_lesson_is_larger_than_500_kilobytes():
    """Most of it is formulas, which pack to a tenth."""
    sizes = {page: (SITE / page).stat().st_size for page in TOLD if not page.startswith("library/")}
    assert {page: size for page, size in sizes.items() if size > 500_000} == {}


def test_install_source_and_licence_are_one_click_away():
    ways = {"library/index.html", "library/_modules/index.html", "library/install.html#the-licence"}
    for page in {*TOLD, *REFERENCE_PAGES} - {"library/install.html", "library/index.html"}:
        links = [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in parse(page).links]
        assert ways <= set(links), page
    with zipfile.ZipFile(SITE / "library" / "minilora.zip") as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert {"minilora/pyproject.toml", "minilora/LICENSE", "minilora/minilora/lora.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_the_page_to_send_is_ten_minutes_and_small():
    text = (SITE / "index.html").read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert '<meta content="_static/preview.png" property="og:image"' in text
    assert "og:url" not in text


@pytest.mark.parametrize(("site", "words", "first"), [("", "alpha", "alpha.html"), ("library/", "merge", "")])
def test_the_search_shows_formulas_once_and_no_toolbar(visit, site, words, first):
    browser = visit(f"{site}search.html?q={words}", WIDTHS[1])
    ready = "return document.querySelectorAll('#search-results li p.context').length"
    for _ in range(100):
        if browser.execute_script(ready) > 2:
            break
        time.sleep(0.1)
    excerpts = [one.text for one in browser.find_elements("css selector", "#search-results li p.context")]
    assert len(excerpts) > 2
    assert not [text for text in excerpts if "MIT licence" in text or "Download as" in text or "\\alpha" in text]
    links = [link.get_attribute("href") for link in browser.find_elements("css selector", "#search-results li > a")]
    assert any(first in link for link in links[:4])


def test_no_page_marks_the_words_of_an_old_search():
    marking = [page for page in PAGES if "sphinx_highlight" in (SITE / page).read_text(encoding="utf-8")]
    assert {posixpath.basename(page) for page in marking} <= {"search.html"}
