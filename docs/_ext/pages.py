"""Check that a page shows what it computes: ``python docs/_ext/pages.py [--write] [PAGE ...]``.

A page is plain Markdown, readable on a source host. Nothing in it is hidden; what it shows is computed:

    ```python          a block that runs, in order with the others; ```py is one that does not
    ```text            directly below such a block: its output, compared except for the last decimal, which may vary
    ```console         `$ minilora ...` commands with their output; the last one's exit code is the page's `status`
    ![...](pictures/rank.svg)            a picture with its description; if no module draws it, the file is our own
    <!-- rates --> ... <!-- end -->      a table or a text
    <!-- live rates -->                  the place of an interactive element on the site
    <!-- lines minilora/lora.py LoRA.forward -->    above a block: lines of a file

The page's assertions and drawings are in a module next to it, `rank.py` for `rank.md`. Lines ``# %% Heading`` divide
the module: each part runs after the last block below that heading, and sees the page's names as its own; the page
does not see the module's names. Code above the first such line runs before the page.

    from pages import picture, shown
    picture("rank", drawing)       # the picture at pictures/rank.svg
    shown("rates", table)          # the text between the comments
    says(f"by {factor:.1f} at most")  # words that the page must contain
    holds("M x =", M=M, x=x, ...)  # an equation without a number is true of these arrays

Each number in the prose, in a lesson also in words, must be part of words that the module passes to `says`, and each
equation without a number must hold, or the page does not build. Numbers in code, formulas, link addresses and computed
parts are exempt. A block of text counts as prose unless the block directly above prints it.

A page that shows something else stops the build; ``--write`` writes the computed results into the page.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import html
import io
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
RECORDINGS = DOCS / "recordings"
SITES = ("learn", "library")

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)[ \t]*\n", re.S | re.M)
PRINTED = re.compile(r"\n*^```text(?P<rounding> rounding)?\n(?P<text>.*?)^```\n", re.S | re.M)
PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\(pictures/(?P<name>[\w-]+)\.svg\)")
SHOWN = re.compile(r"^<!-- (?P<name>[\w-]+) -->\n(?P<text>.*?)^<!-- end -->\n", re.S | re.M)
LIVE = re.compile(r"^<!-- live (?P<name>[\w-]+) -->\n", re.M)
LINES = re.compile(r"^<!-- lines (?P<what>[^\n]*) -->\n\n?(?P<head>```\w*)\n(?P<body>.*?)^```\n", re.S | re.M)
HEADING = re.compile(r"^#+ (.*)$", re.M)


class BadPage(Exception):
    """A page that does not run, or whose contents differ from what was computed."""


@dataclass
class Results:
    """The results of running a page."""

    printed: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)  # names of texts and (as NAME.svg) pictures from a recording
    says: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    page: str = ""  # its Markdown
    live: dict[str, str] = field(default_factory=dict)


results = Results()
"""The results of the page that runs in this process."""


def recording(name: str) -> Any:
    """Return the contents of ``docs/recordings/NAME.json``."""
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


def data(content: Any) -> str:
    """Return data for a script of the site, as an HTML element."""
    text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    return f'<script type="application/json">{text}</script>'


def node(script: str, request: Any) -> Any:
    """Return the JSON output of a Node script in this folder, called with JSON input."""
    command = ["node", Path(__file__).with_name(script)]
    text = json.dumps(request)
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout)


def picture(name: str, drawing: str, exact: bool = False) -> None:
    """Show a drawing, HTML, at ``pictures/NAME.svg``; its first SVG has a description and is written to the file.

    Set `exact` if the numbers of its description come from a recording.
    """
    results.pictures[name] = drawing
    results.exact += [f"{name}.svg"] * exact


def shown(name: str, text: str, exact: bool = False) -> None:
    """Show Markdown between ``<!-- NAME -->`` and ``<!-- end -->``; set `exact` if it comes from a recording."""
    results.shown[name] = text.strip("\n") + "\n"
    results.exact += [name] * exact


def says(*words: str) -> None:
    """Require that the page contains these words, with the numbers in them."""
    results.says += words


def holds(start: str, **names: Any) -> None:
    """Require that the equation without a number that begins with `start` is true of these arrays and numbers.

    A `start` that begins with a dollar sign matches a formula within a sentence.
    """
    from formulas import difference

    tex = unnumbered(start)
    if problem := difference(tex, names, []):
        raise BadPage(f"the equation {start!r} does not hold: {problem}")
    results.held.append(tex)


def not_computed(start: str, why: str) -> None:
    """Exempt an equation without a number that nothing computes; `why` gives the reason."""
    assert why
    results.held.append(unnumbered(start))


def unnumbered(start: str) -> str:
    """Return the page's equation without a number that begins with `start`."""
    found = [tex for tex in equations(results.page) if tex.startswith(start)]
    if start.startswith("$"):
        inline = re.findall(r"\$([^$\n]+)\$", FENCE.sub("", results.page))
        found = [tex for tex in inline if f"${tex}".startswith(start)]
    if len(found) != 1:
        raise BadPage(f"{len(found)} equations without a number begin with {start!r}, expected one")
    return found[0]


def block(*lines: str) -> str:
    """Return lines as a block of text."""
    return "\n".join(["```text", *lines, "```"])


def live(name: str, drawing: str) -> None:
    """Show HTML at ``<!-- live NAME -->``, only on the site."""
    results.live[name] = drawing


def described(drawing: str) -> str:
    """Return the description of a drawing: its first SVG's label."""
    found = re.search(r'<svg\b[^>]*\baria-label="([^"]*)"', drawing)
    if not found:
        raise BadPage("a picture needs an aria-label as its description")
    return html.unescape(found[1]).replace("[", "(").replace("]", ")")


STYLE = (
    "<style>svg{color:#222;background:#fff;font-family:sans-serif;font-size:13px}"
    "@media(prefers-color-scheme:dark){svg{color:#ddd;background:#131416}}</style>"
)


def standalone(drawing: str) -> str:
    """Return a drawing's first SVG as a file for a source host, readable on light and dark backgrounds."""
    svg = re.search(r"<svg\b.*?</svg>", drawing, re.S)[0]  # type: ignore[index]
    if " xmlns=" not in svg.partition(">")[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    if "xlink:href" in svg and "xmlns:xlink" not in svg:
        svg = svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    head, bracket, rest = svg.partition(">")
    return f"{head}{bracket}{STYLE}{rest}\n"


def own_picture(page: Path, name: str) -> str:
    """Return a picture that exists only as a file, in the form for the site."""
    svg = page.with_name("pictures").joinpath(f"{name}.svg").read_text(encoding="utf-8")
    return svg.replace(STYLE, "").strip()


# --- a page runs ------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[re.Match[str]]:
    """Yield the blocks of a page that run."""
    return (fence for fence in FENCE.finditer(text) if fence["info"] in ("python", "console"))


def console(session: str) -> int:
    """Run the commands of a session and print each command with its output; return the last exit code."""
    from minilora.cli import main

    status = 0
    for command in re.findall(r"^\$ (.*)$", session, re.M):
        program, *words = shlex.split(command)
        if program != "minilora":
            raise BadPage(f"a console block runs only minilora; put {command!r} into a ```sh block, which does not run")
        print(f"$ {command}")
        with contextlib.redirect_stderr(sys.stdout):
            status = main(words)
    return status


def headings(text: str) -> list[tuple[int, str]]:
    """Return the position and text of each heading outside fences."""
    fenced = [fence.span() for fence in FENCE.finditer(text)]
    found = [(heading.start(), heading[1].strip()) for heading in HEADING.finditer(text)]
    return [(place, words) for place, words in found if not any(start < place < end for start, end in fenced)]


def parts(page: Path) -> dict[str, tuple[int, str]]:
    """Return the parts of a page's module by heading, each with the line number at which it starts."""
    module = page.with_suffix(".py")
    found: dict[str, tuple[int, str]] = {}
    name, start = "", 0
    lines = module.read_text(encoding="utf-8").splitlines() if module.is_file() else []
    for number, line in enumerate([*lines, "# %% "]):
        if line.startswith("# %% "):
            if name in found:
                raise BadPage(f"{module.name}: two parts are called {name!r}")
            found[name] = start, "\n".join(lines[start:number])
            name, start = line[4:].strip(), number + 1
    return found


def steps(page: Path) -> Iterator[tuple[str, int, str]]:
    """Yield what runs, in order: the file, the number of lines before the code, and the code."""
    text, own = page.read_text(encoding="utf-8"), parts(page)
    known = headings(text)
    if lost := [name for name in own if name and name not in [words for _, words in known]]:
        raise BadPage(f"{page.with_suffix('.py').name}: the page has no heading {lost[0]!r}")
    running = list(blocks(text))
    for (place, name), end in zip([(0, ""), *known], [*(place for place, _ in known), len(text)], strict=True):
        for block in running:
            if place <= block.start() < end:
                line = text.count("\n", 0, block.start("body"))
                is_code = block["info"] == "python"
                yield page.name, line, block["body"] if is_code else f"status = console({block['body']!r})"
        if name in own:
            yield page.with_suffix(".py").name, *own.pop(name)


@contextlib.contextmanager
def place() -> Iterator[None]:
    """Work in an empty folder with `examples` and `docs`; imports and programs find this checkout's modules."""
    found = [str(folder) for folder in (ROOT, DOCS / "_ext", ROOT / "examples", ROOT / "examples" / "measure")]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(found)),
        mock.patch.object(sys, "path", [*found, *sys.path]),
    ):
        for name in ("examples", "docs"):
            Path(name).symlink_to(ROOT / name)
        yield


def run(page: Path) -> Results:
    """Run a page in this process and return its results."""
    global results
    results = Results()
    results.page = page.read_text(encoding="utf-8")
    module = types.ModuleType("page")  # the module to which the page's classes belong
    sys.modules["page"] = module
    vars(module)["console"] = console
    spaces: dict[str, dict[str, Any]] = {page.name: vars(module), page.with_suffix(".py").name: {}}
    with place(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # When the machine was busy, a kernel of OpenBLAS set this flag although all its numbers were right.
        warnings.filterwarnings("ignore", "invalid value encountered in matmul", RuntimeWarning)
        for file, line, code in steps(page):
            own = spaces[file]
            if file != page.name:
                own.update(spaces[page.name])
            try:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * line + code, str(page.with_name(file)), "exec"), own)
            except BaseException as error:
                trace = "".join(traceback.format_exception(error)[2:])
                raise BadPage(f"{page.relative_to(DOCS)} does not run:\n{trace}") from None
            text = out.getvalue().rstrip("\n")
            if file == page.name:
                results.printed.append(text and f"{text}\n")
            elif text:
                raise BadPage(f"{page.with_name(file).relative_to(DOCS)} prints, but only the page may print")
    for name in named_pictures(page) - results.pictures.keys():
        results.pictures[name] = f'<figure class="picture">{own_picture(page, name)}</figure>'
    return results


def named_pictures(page: Path) -> set[str]:
    """Return the names of a page's pictures that have a file."""
    names = {found["name"] for found in PICTURE.finditer(unquoted(page.read_text(encoding="utf-8"))[0])}
    return {name for name in names if page.with_name("pictures").joinpath(f"{name}.svg").is_file()}


def results_file(page: Path) -> Path:
    """Return the file in which a page's results are saved for the site builder."""
    return DOCS / "_build" / "pages" / f"{page.parent.name}-{page.stem}.json"


# --- and shows what it gave -------------------------------------------------------------------------------------------


def lines_of(what: str) -> str:
    """Return lines of a file: all, a class or function, or those from one text to another (or to the end)."""
    path, _, rest = what.partition(" ")
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    if bounds := re.fullmatch(r'"(.*?)" to "(.*?)"', rest):
        first = next(number for number, line in enumerate(lines) if bounds[1] in line)
        after = (number for number, line in enumerate(lines) if number > first and bounds[2] in line)
        last = next(after) if bounds[2] else len(lines)
    elif rest:
        inside: Any = ast.parse(text)
        for part in rest.split("."):
            inside = next(node for node in inside.body if getattr(node, "name", None) == part)
        first, last = inside.lineno - 1, inside.end_lineno
    else:
        first, last = 0, len(lines)
    return textwrap.dedent("\n".join(lines[first:last])).strip("\n") + "\n"


NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")
LARGEST_ERROR = re.compile(r"\([\d, ]+\) +(\S+) +\1(?= +1 +ok$)", re.M)
"""Where a correct gradient has its largest error, with the value there, printed twice."""


def alike(old: str, new: str, rounding: bool = False) -> bool:
    """Return whether two texts differ only as two processors may: one unit in the last decimal, or rounding below 1e-4.

    In a report of gradcheck, ```` ```text rounding ````, the largest error of a right gradient may be at another place.
    """
    if rounding:
        old, new = LARGEST_ERROR.sub("", old), LARGEST_ERROR.sub("", new)
    words = [re.sub(r" +|-{3,}", " ", NUMBER.sub("#", text)) for text in (old, new)]
    return words[0] == words[1] and all(map(agree, NUMBER.findall(old), NUMBER.findall(new)))


FACTOR = 30
"""The rounding errors of two processors' kernels have differed by a factor of ten."""


def agree(old: str, new: str) -> bool:
    """Return whether two printed numbers agree up to rounding; two rounding errors may differ by `FACTOR`."""
    if old == new:
        return True
    values = [float(text.replace(",", "").replace("\u2212", "-")) for text in (old, new)]
    if all("e" in text for text in (old, new)):
        low, high = sorted(map(abs, values))
        return high < 1e-4 and high <= FACTOR * max(low, 1e-16)  # an error may also be 0
    decimals = min(len(text.partition(".")[2]) for text in (old, new))
    return decimals > 0 and abs(values[0] - values[1]) < 1.5 * 10**-decimals


def prefer_old(old: str, new: str, page: str, *, rounding: bool = False) -> str:
    """Return the shown text, with a warning, if the two differ only by rounding; else return the new one."""
    if not alike(old, new, rounding):
        return new
    for shown, computed in zip(old.splitlines(), new.splitlines(), strict=False):
        if shown.split() != computed.split() and not rounding:
            print(f"{page} shows {shown.strip()!r}, computes {computed.strip()!r}: rounding", file=sys.stderr)
    return old


QUOTED = re.compile(r"^(`{4,})[^`\n]*\n.*?^\1\n", re.S | re.M)
"""A block that shows how a page is written."""


def unquoted(text: str) -> tuple[str, Callable[[str], str]]:
    """Return a text in which a mark replaces each block that shows Markdown, and a function that restores them."""
    kept: list[str] = []
    marked = QUOTED.sub(lambda m: kept.append(m[0]) or f"\0{len(kept) - 1}\0\n", text)
    return marked, lambda done: re.sub(r"\0(\d+)\0\n", lambda m: kept[int(m[1])], done)


def with_results(text: str, result: Results, page: str = "page", lesson: bool = False) -> str:
    """Return a page's text with all its results inserted."""
    text, put_back = unquoted(text)
    for kind, places, had in (
        ("picture", [found["name"] for found in PICTURE.finditer(text)], result.pictures),
        ("text", [found["name"] for found in SHOWN.finditer(text)], result.shown),
        ("live part", [found["name"] for found in LIVE.finditer(text)], result.live),
    ):
        if wrong := {*places} ^ {*had}:
            name = min(wrong)
            lacks = "the page has no place for it" if name in had else "the page's module does not make it"
            raise BadPage(f"{page}: {kind} {name}: {lacks}")
    done, place = "", 0
    for block, printed in zip(blocks(text), result.printed, strict=True):
        done += text[place : block.start()]
        place = block.end()
        if block["info"] == "console":
            done += f"```console\n{prefer_old(block['body'], printed, page)}```\n"
            continue
        done += block[0]
        if printed:
            kind = ""
            if old := PRINTED.match(text, place):
                place, kind = old.end(), old["rounding"] or ""
                printed = prefer_old(old["text"], printed, page, rounding=bool(kind))
            done += f"\n```text{kind}\n{printed}```\n"
    text = done + text[place:]

    def picture(m: re.Match[str]) -> str:
        name, new = m["name"], described(result.pictures[m["name"]])
        return f"![{new if f'{name}.svg' in result.exact else prefer_old(m['alt'], new, page)}](pictures/{name}.svg)"

    def computed(m: re.Match[str]) -> str:
        name, new = m["name"], result.shown[m["name"]]
        return f"<!-- {name} -->\n{new if name in result.exact else prefer_old(m['text'], new, page)}<!-- end -->\n"

    text = SHOWN.sub(computed, PICTURE.sub(picture, text))
    text = LINES.sub(lambda m: f"<!-- lines {m['what']} -->\n{m['head']}\n{lines_of(m['what'])}```\n", text)
    if lacking := [words for words in result.says if words not in text]:
        raise BadPage(f"{page} does not say: {' | '.join(lacking)}")
    if left := [tex for tex in equations(text) if tex not in result.held]:
        raise BadPage(f"{page}: its module does not check an equation without a number: {' | '.join(left)}")
    if page not in HISTORY and (left := unsaid(text, result.says, words=lesson)):
        raise BadPage(f"{page}: its module does not say the numbers of: {' | '.join(left)}")
    return put_back(text)


HISTORY = ("changelog.md", "golden-results.md")
"""Pages whose numbers were true on a date that they give."""
DISPLAY = re.compile(r"^\$\$\n(?P<tex>.*?)\n\$\$$", re.S | re.M)
NOT_PROSE = re.compile(
    r"<!--.*?-->|\$[^$\n]+\$|`[^`\n]+`|\[[^\]]*\]\(https?:[^)\s]*\)|\]\([^)\s]*\)|^#+ \d+\.|^ *\d+\. "
    r"|https?:\S+|\((?:[a-z]+\.)?\d{1,3}\)|[Ll]essons? \d+(?:(?:,| and| to) \d+)*|\[\d+\. ",
    re.S | re.M,
)
"""Parts that are exempt: comments, formulas, code, URLs, and numbers of headings, lists, equations and lessons."""
PROSE_NUMBER = re.compile(
    r"(?<![\w.#/-])(?![012](?![\d.,]*\d| ?%))[-\u2212]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?(?!\.?\w)"
)
"""A number in the prose; 0, 1 and 2 count as words."""
NUMBER_WORD = re.compile(
    r"\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty"
    r"|(?:thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|twice|half|(?:third|quarter|(?:fif|six|seven|eigh|nin|ten)th"
    r"|hundredth|thousandth|(?:twent|thirt|fort|fift)ieth)s?)\b",
    re.I,
)


def equations(text: str) -> list[str]:
    """Return the TeX of a page's equations without a number."""
    return [shown["tex"].strip() for shown in DISPLAY.finditer(FENCE.sub("", text)) if r"\tag{" not in shown["tex"]]


def unsaid(text: str, says: list[str], *, words: bool = False) -> list[str]:
    """Return each number in a page's prose that is in no words passed to `says`, with the surrounding text.

    With `words`, numbers in words count too.
    """

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    prose = text
    for block in blocks(text):
        if block["info"] == "python" and (printed := PRINTED.match(text, block.end())):
            prose = prose[: block.end()] + blank(printed) + prose[printed.end() :]
    for place in (SHOWN, LINES):
        prose = place.sub(blank, prose)
    prose = FENCE.sub(lambda found: found[0] if found["info"] == "text" else blank(found), prose)
    for place in (DISPLAY, PICTURE, NOT_PROSE):
        prose = place.sub(blank, prose)
    allowed = [range(at, at + len(words)) for words in {*says} for at in range(len(text)) if text.startswith(words, at)]
    return [
        " ".join(text[max(0, number.start() - 30) : number.end() + 20].split())
        for pattern in (PROSE_NUMBER, *([NUMBER_WORD] if words else []))
        for number in pattern.finditer(prose)
        if not any(number.start() in part and number.end() - 1 in part for part in allowed)
    ]


def check(page: Path, write: bool = False) -> str:
    """Run a page; write its results into it, or return how its contents differ from them."""
    try:
        result, text = run(page), page.read_text(encoding="utf-8")
        results_file(page).parent.mkdir(parents=True, exist_ok=True)
        results_file(page).write_text(json.dumps(asdict(result)), encoding="utf-8")
        computed = with_results(text, result, page.name, lesson=page.parent.name == "learn")
        if write:
            page.write_text(computed, encoding="utf-8")
            for name, drawing in result.pictures.items():
                page.with_name("pictures").mkdir(exist_ok=True)
                page.with_name("pictures").joinpath(f"{name}.svg").write_text(standalone(drawing), encoding="utf-8")
        elif computed != text:
            diff = difflib.unified_diff(text.splitlines(), computed.splitlines(), "shown", "computed", n=1, lineterm="")
            return f"{page.relative_to(DOCS)} does not show what it computes:\n" + "\n".join(diff)
        for name, drawing in result.pictures.items():
            file = page.with_name("pictures") / f"{name}.svg"
            if not file.is_file() or not alike(described(file.read_text(encoding="utf-8")), described(drawing)):
                return f"{page.relative_to(DOCS)}: {file.name} is outdated: python docs/_ext/pages.py --write"
    except BadPage as error:
        return str(error)
    return ""


def every() -> list[Path]:
    """Return all pages."""
    return [page for site in SITES for page in sorted((DOCS / site).glob("*.md"))]


def check_all(pages: list[Path], write: bool = False) -> list[str]:
    """Check pages in parallel, each in its own process, and return what is wrong."""
    from minilora.fast.threads import core_count

    with ProcessPoolExecutor(core_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return [problem for problem in pool.map(check, pages, [write] * len(pages)) if problem]


def main() -> int:
    """Check the pages named on the command line, or all of them."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the pages already run in parallel
    names = [name for name in sys.argv[1:] if name != "--write"]
    pages = [Path(name).resolve() for name in names] or every()
    wrong = check_all(pages, write="--write" in sys.argv[1:])
    print("\n\n".join(wrong) or f"{len(pages)} pages show what they compute")
    return int(bool(wrong))


if __name__ == "__main__":
    import pages as itself  # the module that a page's module imports

    sys.exit(itself.main())
