"""Run a page and compare what it shows with what it says: ``python docs/_ext/pages.py [--write] [PAGE ...]``.

A page is plain Markdown, which reads on a source host as it stands. Nothing in it is hidden; what it shows is computed:

    ```python          a block that runs, in order with the others; ```py is one that does not
    ```text            right below such a block: what it prints, but for the last decimal, which processors round
    ```console         `$ minilora ...`, each with what it prints; the last one's exit code is the page's `status`
    ![...](pictures/rank.svg)            a picture, with its description; one that no module draws is a file of our own
    <!-- rates --> ... <!-- end -->      a table or a text
    <!-- live rates -->                  where the site has something to touch
    <!-- lines minilora/lora.py LoRA.forward -->    above a block: lines of a file

What the page asserts and draws stands in a module beside it, `rank.py` beside `rank.md`. The module is cut by lines
``# %% Heading``: a part runs after the last block below that heading, and sees the page's names as its own; the page
sees none of the module's. What stands above the first such line runs before the page.

    from pages import picture, shown
    picture("rank", drawing)       # what stands at pictures/rank.svg
    shown("rates", table)          # what stands between the comments
    says(f"by {factor:.1f} at most")  # what a sentence of the page says
    holds("M x =", M=M, x=x, ...)  # an equation without a number is true of these arrays

Each number in the prose, in a lesson also in words, must be part of words that the module says, and each equation
without a number must hold, or the page does not build. Numbers in code, formulas, addresses of links, and in what is
computed anyway do not count. A block of text counts where no block right above it prints it.

A page that shows something else stops the build; ``--write`` writes into the page what was computed.
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
    """A page that does not run, or shows something else than what was computed."""


@dataclass
class Given:
    """What a page gave when it ran."""

    printed: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)  # the names of texts and of pictures, as NAME.svg, from a recording
    says: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    page: str = ""  # its text
    live: dict[str, str] = field(default_factory=dict)


given = Given()
"""Of the page that runs in this process."""


def recording(name: str) -> Any:
    """Return what ``docs/recordings/NAME.json`` holds."""
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


def data(content: Any) -> str:
    """Return what a script of the site reads, as an element of the page."""
    text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    return f'<script type="application/json">{text}</script>'


def node(script: str, given: Any) -> Any:
    """Return what a script of this folder prints, as JSON, when it is given something, as JSON."""
    command, told = ["node", Path(__file__).with_name(script)], json.dumps(given)
    done = subprocess.run(command, input=told, capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout)


def picture(name: str, drawing: str, exact: bool = False) -> None:
    """Show a drawing, HTML, at ``pictures/NAME.svg``; its first SVG has a description, and stands in the file.

    It is `exact` if the numbers of its description come from a recording.
    """
    given.pictures[name] = drawing
    given.exact += [f"{name}.svg"] * exact


def shown(name: str, text: str, exact: bool = False) -> None:
    """Show Markdown between ``<!-- NAME -->`` and ``<!-- end -->``; `exact` if it comes from a recording."""
    given.shown[name] = text.strip("\n") + "\n"
    given.exact += [name] * exact


def says(*words: str) -> None:
    """Require that the page says these words, with the numbers in them."""
    given.says += words


def holds(start: str, **names: Any) -> None:
    """Require that the equation without a number that begins with `start` is true of these arrays and numbers.

    A `start` that begins with a dollar sign is that of a formula within a sentence.
    """
    from formulas import difference

    tex = unnumbered(start)
    if said := difference(tex, names, []):
        raise BadPage(f"the equation {start!r} does not hold: {said}")
    given.held.append(tex)


def not_computed(start: str, why: str) -> None:
    """Excuse an equation without a number that states nothing that code computes; `why` says what it is instead."""
    assert why
    given.held.append(unnumbered(start))


def unnumbered(start: str) -> str:
    """Return the page's equation without a number that begins with `start`."""
    found = [tex for tex in equations(given.page) if tex.startswith(start)]
    if start.startswith("$"):
        found = [tex for tex in re.findall(r"\$([^$\n]+)\$", FENCE.sub("", given.page)) if f"${tex}".startswith(start)]
    if len(found) != 1:
        raise BadPage(f"{len(found)} equations without a number begin with {start!r}, expected one")
    return found[0]


def block(*lines: str) -> str:
    """Return lines as a block of text."""
    return "\n".join(["```text", *lines, "```"])


def live(name: str, drawing: str) -> None:
    """Show HTML at ``<!-- live NAME -->``, on the site alone."""
    given.live[name] = drawing


def described(drawing: str) -> str:
    """Return the description of a drawing: its first SVG's label."""
    found = re.search(r'<svg\b[^>]*\baria-label="([^"]*)"', drawing)
    if not found:
        raise BadPage("a picture has no aria-label, which is its description")
    return html.unescape(found[1]).replace("[", "(").replace("]", ")")


STYLE = (
    "<style>svg{color:#222;background:#fff;font-family:sans-serif;font-size:13px}"
    "@media(prefers-color-scheme:dark){svg{color:#ddd;background:#131416}}</style>"
)


def alone(drawing: str) -> str:
    """Return a drawing's first SVG as a file that a source host shows, on a page's light or dark ground."""
    svg = re.search(r"<svg\b.*?</svg>", drawing, re.S)[0]  # type: ignore[index]
    if " xmlns=" not in svg.partition(">")[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    if "xlink:href" in svg and "xmlns:xlink" not in svg:
        svg = svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    head, bracket, rest = svg.partition(">")
    return f"{head}{bracket}{STYLE}{rest}\n"


def own_picture(page: Path, name: str) -> str:
    """Return a picture that stands in its file alone, as the site shows it."""
    svg = page.with_name("pictures").joinpath(f"{name}.svg").read_text(encoding="utf-8")
    return svg.replace(STYLE, "").strip()


# --- a page runs ------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[re.Match[str]]:
    """Yield the blocks of a page that run."""
    return (fence for fence in FENCE.finditer(text) if fence["info"] in ("python", "console"))


def console(session: str) -> int:
    """Run the commands of a session and print it, each command with all that it prints; return the last exit code."""
    from minilora.cli import main

    status = 0
    for command in re.findall(r"^\$ (.*)$", session, re.M):
        program, *words = shlex.split(command)
        if program != "minilora":
            raise BadPage(f"a console runs minilora; write {command!r} into a block ```sh, which does not run")
        print(f"$ {command}")
        with contextlib.redirect_stderr(sys.stdout):
            status = main(words)
    return status


def headings(text: str) -> list[tuple[int, str]]:
    """Return the place and the text of each heading; what stands in fences is none."""
    fenced = [fence.span() for fence in FENCE.finditer(text)]
    found = [(heading.start(), heading[1].strip()) for heading in HEADING.finditer(text)]
    return [(place, words) for place, words in found if not any(start < place < end for start, end in fenced)]


def parts(page: Path) -> dict[str, tuple[int, str]]:
    """Return the parts of a page's module by their heading, each with the number of its first line."""
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
    """Yield what runs, in order: the file, the number of the first line before it, and the code."""
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
    """Stand in an empty folder with `examples` and `docs`, where imports and programs find this checkout's modules."""
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


def run(page: Path) -> Given:
    """Run a page in this process, and return what it gave."""
    global given
    given = Given()
    given.page = page.read_text(encoding="utf-8")
    module = types.ModuleType("page")  # what a class of the page calls its own
    sys.modules["page"] = module
    vars(module)["console"] = console
    spaces: dict[str, dict[str, Any]] = {page.name: vars(module), page.with_suffix(".py").name: {}}
    with place(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Beside other work, a kernel of OpenBLAS was seen to set this flag while all its numbers were right.
        warnings.filterwarnings("ignore", "invalid value encountered in matmul", RuntimeWarning)
        for file, line, code in steps(page):
            own = spaces[file]
            if file != page.name:
                own.update(spaces[page.name])
            try:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * line + code, str(page.with_name(file)), "exec"), own)
            except BaseException as error:
                told = "".join(traceback.format_exception(error)[2:])
                raise BadPage(f"{page.relative_to(DOCS)} does not run:\n{told}") from None
            text = out.getvalue().rstrip("\n")
            if file == page.name:
                given.printed.append(text and f"{text}\n")
            elif text:
                raise BadPage(f"{page.with_name(file).relative_to(DOCS)} prints, and a page shows what it prints")
    for name in named_pictures(page) - given.pictures.keys():
        given.pictures[name] = f'<figure class="picture">{own_picture(page, name)}</figure>'
    return given


def named_pictures(page: Path) -> set[str]:
    """Return the pictures of a page that have a file."""
    names = {found["name"] for found in PICTURE.finditer(unquoted(page.read_text(encoding="utf-8"))[0])}
    return {name for name in names if page.with_name("pictures").joinpath(f"{name}.svg").is_file()}


def keeps(page: Path) -> Path:
    """Return the file that keeps what a page gave for the builder of the site."""
    return DOCS / "_build" / "pages" / f"{page.parent.name}-{page.stem}.json"


# --- and shows what it gave -------------------------------------------------------------------------------------------


def lines_of(what: str) -> str:
    """Return lines of a file: all, those of a class or function, from a line that has a text up to another, or on."""
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
PLACE = re.compile(r"\([\d, ]+\) +(\S+) +\1(?= +1 +ok$)", re.M)
"""Of a gradient that is right: where its error is largest, and there the same number twice."""


def alike(old: str, new: str, rounding: bool = False) -> bool:
    """Whether two texts differ by no more than two processors do: a unit of a last decimal, or rounding below 1e-4.

    In a report of gradcheck, ```` ```text rounding ````, the largest error of a right gradient may be at another place.
    """
    if rounding:
        old, new = PLACE.sub("", old), PLACE.sub("", new)
    words = [re.sub(r" +|-{3,}", " ", NUMBER.sub("#", text)) for text in (old, new)]
    return words[0] == words[1] and all(map(near, NUMBER.findall(old), NUMBER.findall(new)))


FACTOR = 30
"""Rounding errors of two processors' kernels were seen to differ by a factor of ten."""


def near(old: str, new: str) -> bool:
    """Whether two printed numbers are one number, as two processors round it; of rounding errors, up to a factor."""
    if old == new:
        return True
    values = [float(text.replace(",", "").replace("\u2212", "-")) for text in (old, new)]
    if all("e" in text for text in (old, new)):
        low, high = sorted(map(abs, values))
        return high < 1e-4 and high <= FACTOR * max(low, 1e-16)  # an error may be 0 as well
    decimals = min(len(text.partition(".")[2]) for text in (old, new))
    return decimals > 0 and abs(values[0] - values[1]) < 1.5 * 10**-decimals


def kept(old: str, new: str, page: str, *, rounding: bool = False) -> str:
    """Return what a page shows where that differs by rounding only from what was computed, and say so; else the new."""
    if not alike(old, new, rounding):
        return new
    for shown, computed in zip(old.splitlines(), new.splitlines(), strict=False):
        if shown.split() != computed.split() and not rounding:
            print(f"{page} differs by rounding: {computed.strip()!r} for {shown.strip()!r}", file=sys.stderr)
    return old


QUOTED = re.compile(r"^(`{4,})[^`\n]*\n.*?^\1\n", re.S | re.M)
"""A block that shows how a page is written."""


def unquoted(text: str) -> tuple[str, Callable[[str], str]]:
    """Return a text with a mark in the place of each block that shows Markdown, and a function that puts them back."""
    kept: list[str] = []
    marked = QUOTED.sub(lambda m: kept.append(m[0]) or f"\0{len(kept) - 1}\0\n", text)
    return marked, lambda done: re.sub(r"\0(\d+)\0\n", lambda m: kept[int(m[1])], done)


def filled(text: str, result: Given, page: str = "page", lesson: bool = False) -> str:
    """Return a page's text with what it gave in the places for it."""
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
            done += f"```console\n{kept(block['body'], printed, page)}```\n"
            continue
        done += block[0]
        if printed:
            kind = ""
            if old := PRINTED.match(text, place):
                place, kind = old.end(), old["rounding"] or ""
                printed = kept(old["text"], printed, page, rounding=bool(kind))
            done += f"\n```text{kind}\n{printed}```\n"
    text = done + text[place:]

    def picture(m: re.Match[str]) -> str:
        name, new = m["name"], described(result.pictures[m["name"]])
        return f"![{new if f'{name}.svg' in result.exact else kept(m['alt'], new, page)}](pictures/{name}.svg)"

    def computed(m: re.Match[str]) -> str:
        name, new = m["name"], result.shown[m["name"]]
        return f"<!-- {name} -->\n{new if name in result.exact else kept(m['text'], new, page)}<!-- end -->\n"

    text = SHOWN.sub(computed, PICTURE.sub(picture, text))
    text = LINES.sub(lambda m: f"<!-- lines {m['what']} -->\n{m['head']}\n{lines_of(m['what'])}```\n", text)
    if lacking := [words for words in result.says if words not in text]:
        raise BadPage(f"{page} does not say: {' | '.join(lacking)}")
    if left := [tex for tex in equations(text) if tex not in result.held]:
        raise BadPage(f"{page}: its module does not compute an equation without a number: {' | '.join(left)}")
    if page not in HISTORY and (left := unsaid(text, result.says, words=lesson)):
        raise BadPage(f"{page}: its module does not say the numbers of: {' | '.join(left)}")
    return put_back(text)


HISTORY = ("changelog.md", "golden-results.md")
"""Pages whose numbers were true on a day that they name."""
DISPLAY = re.compile(r"^\$\$\n(?P<tex>.*?)\n\$\$$", re.S | re.M)
NOT_PROSE = re.compile(
    r"<!--.*?-->|\$[^$\n]+\$|`[^`\n]+`|\[[^\]]*\]\(https?:[^)\s]*\)|\]\([^)\s]*\)|^#+ \d+\.|^ *\d+\. "
    r"|https?:\S+|\((?:[a-z]+\.)?\d{1,3}\)|[Ll]essons? \d+(?:(?:,| and| to) \d+)*|\[\d+\. ",
    re.S | re.M,
)
"""Comments, formulas, code, links to other sites, addresses, and the numbers of headings, lists, equations, lessons."""
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
    """Return each number of a page's prose that is part of no words that the module says, with what is around it.

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
    said = [range(at, at + len(words)) for words in {*says} for at in range(len(text)) if text.startswith(words, at)]
    return [
        " ".join(text[max(0, number.start() - 30) : number.end() + 20].split())
        for pattern in (PROSE_NUMBER, *([NUMBER_WORD] if words else []))
        for number in pattern.finditer(prose)
        if not any(number.start() in part and number.end() - 1 in part for part in said)
    ]


def check(page: Path, write: bool = False) -> str:
    """Run a page; write what it gave into it, or say what it shows that was not computed."""
    try:
        result, text = run(page), page.read_text(encoding="utf-8")
        keeps(page).parent.mkdir(parents=True, exist_ok=True)
        keeps(page).write_text(json.dumps(asdict(result)), encoding="utf-8")
        computed = filled(text, result, page.name, lesson=page.parent.name == "learn")
        if write:
            page.write_text(computed, encoding="utf-8")
            for name, drawing in result.pictures.items():
                page.with_name("pictures").mkdir(exist_ok=True)
                page.with_name("pictures").joinpath(f"{name}.svg").write_text(alone(drawing), encoding="utf-8")
        elif computed != text:
            told = difflib.unified_diff(text.splitlines(), computed.splitlines(), "shown", "computed", n=1, lineterm="")
            return f"{page.relative_to(DOCS)} shows something else than what it computes:\n" + "\n".join(told)
        for name, drawing in result.pictures.items():
            file = page.with_name("pictures") / f"{name}.svg"
            if not file.is_file() or not alike(described(file.read_text(encoding="utf-8")), described(drawing)):
                return f"{page.relative_to(DOCS)}: {file.name} is another picture: python docs/_ext/pages.py --write"
    except BadPage as error:
        return str(error)
    return ""


def every() -> list[Path]:
    """Return all pages."""
    return [page for site in SITES for page in sorted((DOCS / site).glob("*.md"))]


def check_all(pages: list[Path], write: bool = False) -> list[str]:
    """Check pages side by side, each in a process of its own, and say what is wrong."""
    from minilora.fast.threads import core_count

    with ProcessPoolExecutor(core_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return [said for said in pool.map(check, pages, [write] * len(pages)) if said]


def main() -> int:
    """Check the pages that the command line names, or all."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of a machine's two processors, each has a page
    names = [name for name in sys.argv[1:] if name != "--write"]
    pages = [Path(name).resolve() for name in names] or every()
    wrong = check_all(pages, write="--write" in sys.argv[1:])
    print("\n\n".join(wrong) or f"{len(pages)} pages show what they compute")
    return int(bool(wrong))


if __name__ == "__main__":
    import pages as itself  # what a page's module imports

    sys.exit(itself.main())
