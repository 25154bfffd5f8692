"""The site's checker of equations and lines, on the real code and on broken copies of it."""

import ast
import copy
import dataclasses
import re
from itertools import islice
from pathlib import Path

import numbered
import pytest
import stated

from ..support.algebra import Put, wrong
from ..support.sample import one_in

ROOT = Path(__file__).parents[2]

STATED = [
    x for page in sorted((ROOT / "docs").glob("l*/*.md")) for x in stated.read_page(page.read_text(encoding="utf-8"))
]


LINES = numbered.find_lines(ROOT / "minilora")


def test_pages_and_code_fit():
    problems = stated.problems(STATED, LINES)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("equation", one_in(4, STATED, [x.label for x in STATED]))
def test_a_wrong_sign_in_a_printed_formula_is_found(equation):
    lines = [x for x in LINES if x.label == equation.label]
    assert stated.problems([equation], lines) == []
    for tex in wrong_formulas(equation.tex):
        assert stated.problems([dataclasses.replace(equation, tex=tex)], lines), tex


def wrong_formulas(tex):
    """Yield a formula with a minus behind an equality sign, or with one of its own signs the other way."""
    left, right = tex.split("=", 1)
    for sign in re.finditer(r"^|=|(?<=[\w})] )[+-](?= )", right):
        other = {"": "-", "=": "= -", "+": "-", "-": "+"}[sign[0]]
        yield f"{left}={right[: sign.start()]}{other}{right[sign.end() :]}"


BY_LABEL = {x.label: x for x in STATED}


@pytest.mark.parametrize(
    ("label", "printed", "wrong"),
    [
        ("loftq.2", "W - Q", "W + Q"),
        ("conv.1", "s p + d k", "s p - d k"),
        ("conv.2", "s p + d k", "s p - d k"),
        ("sum.2", r"(s\,R_B R_A^\top)", r"(R_B R_A^\top)"),
        ("sum.2", r"s\,R_B R_A^\top &=", r"-s\,R_B R_A^\top &="),
        ("sum.4", "D - B_r A_r", "D + B_r A_r"),
        ("19", r"{R^\top H}", r"{-R^\top H}"),
        ("25", "{R}", "{-R}"),
        ("26", r"V^\top", "V"),
        ("26", r"X D^\top", r"-X D^\top"),
        ("seq.2", "(dx_i)", "(-dx_i)"),
        ("seq.2", "dx_{i-1}", "dx_{i+1}"),
        ("rope.2", "j+D/2", "j-D/2"),
        ("rope.3", "y_{t,j+D/2}", "y_{t,j-D/2}"),
        ("act.2", "> 0", r"\ge 0"),
        ("gen.3", "[a_v < P]", r"[a_v \le P]"),
    ],
)
def test_a_mistake_on_either_side_of_a_formula_is_found(label, printed, wrong):
    equation = BY_LABEL[label]
    assert equation.tex.count(printed) == 1
    lines = [x for x in LINES if x.label == label]
    assert stated.problems([dataclasses.replace(equation, tex=equation.tex.replace(printed, wrong))], lines)


NEW = '''"""A number in a text, # eq. (99), is none."""

class C:
    def f(x):
        y = (
            2
            * x  # eq. (a.1)
        )
        return y  # eq. (a.1)
'''


def test_a_numbered_line_is_found_whole_where_it_is(tmp_path):
    (tmp_path / "minilora").mkdir()
    (tmp_path / "minilora" / "new.py").write_text(NEW, encoding="utf-8")
    assert numbered.find_lines(tmp_path / "minilora") == [
        numbered.Line("minilora.new", 7, "a.1", "y = (2 * x)", "eq-a-1", "C"),
        numbered.Line("minilora.new", 9, "a.1", "return y", "eq-a-1-2", "C"),
    ]


BROKEN = {
    "equation (6) has no line of code": {"label": ""},
    "no equation (66) for `dx = dh @": {"label": "66"},
    "equation (6) mentions dx": {"code": "gradient = dh @ self.lora_A"},
    "equation (6) mentions lora_A": {"code": "dx = dh @ self.down"},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_link_is_found(said):
    lines = [dataclasses.replace(x, **BROKEN[said]) if x.label == "6" else x for x in LINES]
    assert any(said in problem for problem in stated.problems(STATED, lines))


def test_an_equation_stated_twice_is_found():
    twice = [stated.Equation("5", ["dA"])] * 2
    assert "equation (5) is stated 2 times" in stated.problems(twice, [])


@pytest.mark.parametrize(
    ("tex", "said"),
    [
        (r"dA = dh^\top z", "unknown name 'z'"),
        (r"dA = (dh^\top x", "expected ), got the end"),
        (r"\underset{(in,\,r)}{dA} = \underset{(r,\,N)}{dh^\top} x", "r is 5 in one shape and 3 in another"),
        (r"dA_{ki} = \sum_m dh_{nk} x_{ni}", "n"),
    ],
)
def test_a_formula_that_cannot_be_computed_is_told(tex, said):
    line = numbered.Line("minilora.lora", 1, "5", "dA = dh.T @ x", "eq-5")
    (problem,) = stated.problems([stated.Equation("5", ["dA"], tex)], [line])
    assert "the equation cannot be computed" in problem
    assert said in problem


def test_an_equation_is_read_with_its_number_names_and_options():
    page = "# A\n\n<!-- equation x.1 y W\n:shown: y = 2 * W\n-->\n$$\ny = 2 W \\tag{x.1}\n$$\n"
    assert stated.read_page(page) == [stated.Equation("x.1", ["y", "W"], "y = 2 W", "y = 2 * W")]
    with pytest.raises(ValueError, match=r"equation \(x.1\) is printed with the number x\.2"):
        stated.read_page(page.replace("tag{x.1}", "tag{x.2}"))


# --- a mistake anywhere in a numbered line ----------------------------------------------------------------------------

CHECKED = [(x, line) for x in STATED for line in LINES if line.label == x.label]
OTHER_BRANCH = "the equation does not speak of this branch"
SAME = {
    "dB = c * (s * B @ (H.T @ H).T - RtH)": "H^T H is its transpose",
    "dH = c * (s * H @ (B.T @ B).T - RB)": "B^T B is its transpose",
    "return (1 + math.cos(-math.pi * u)) / 2": "a cosine is even",
    "return (1 + math.cos(math.pi * -u)) / 2": "a cosine is even",
    "codes = _nearest(_BETWEEN, _scaled(blocks, absmax, shorter=count % block_size >= 0))": "a slower way",
    "codes = _nearest(_BETWEEN, _scaled(blocks, absmax, shorter=-count % block_size > 0))": "a slower way",
    "codes = _nearest(_BETWEEN, _scaled(blocks, absmax, shorter=count % -block_size > 0))": "a slower way",
    "y = g if self.base.bias is None else g * u + self.base.bias": OTHER_BRANCH,
    "y = u if self.base.bias is None else g * u + self.base.bias": OTHER_BRANCH,
    "y = g / u if self.base.bias is None else g * u + self.base.bias": OTHER_BRANCH,
    "y = -g * u if self.base.bias is None else g * u + self.base.bias": OTHER_BRANCH,
    "y = g * -u if self.base.bias is None else g * u + self.base.bias": OTHER_BRANCH,
    "return alpha / math.sqrt(rank) if use_rslora else alpha": OTHER_BRANCH,
    "return alpha / math.sqrt(rank) if use_rslora else alpha * rank": OTHER_BRANCH,
    "return alpha / math.sqrt(rank) if use_rslora else -alpha / rank": OTHER_BRANCH,
    "return alpha / math.sqrt(rank) if use_rslora else alpha / -rank": OTHER_BRANCH,
}
"""Mistakes that change no number here, and why."""


def negated(node):
    """Yield an operation with one of its terms or factors negated."""
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Pow):
        for side in ("left", "right"):
            if not isinstance(getattr(node, side), ast.Constant):
                new = copy.copy(node)
                setattr(new, side, ast.UnaryOp(ast.USub(), getattr(node, side)))
                yield "negated", new


def overwritten(node):
    if isinstance(node, ast.AugAssign):
        yield "not added", ast.Assign([node.target], node.value)


def spoiled(code):
    """Yield a line with each mistake of algebra that `support/algebra.py` makes, with each wrong sign."""
    for place, node in enumerate(ast.walk(ast.parse(code))):
        for _, new in (*wrong(node), *negated(node), *overwritten(node)):
            tree = ast.parse(code)
            target = next(islice(ast.walk(tree), place, None))
            yield ast.unparse(ast.fix_missing_locations(Put(target, copy.deepcopy(new)).visit(tree)))


@pytest.mark.parametrize(("equation", "line"), CHECKED, ids=[str(line) for _, line in CHECKED])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_mistake_anywhere_in_a_numbered_line_is_found(equation, line):
    def problems(code):
        return stated.problems([equation], [dataclasses.replace(line, code=code)])

    assert problems(line.code) == []
    codes = {*spoiled(line.code)}
    assert {code for code in codes if not problems(code)} == SAME.keys() & codes
