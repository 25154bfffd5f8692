"""The site's checker of equations and lines, on the real code and on broken copies of it."""

import ast
import dataclasses
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from ..support.sample import one_in

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

numbered, stated = importlib.import_module("numbered"), importlib.import_module("stated")

STATED = [
    x for page in sorted((ROOT / "docs").glob("l*/*.md")) for x in stated.read_page(page.read_text(encoding="utf-8"))
]


LINES = numbered.find_lines(ROOT / "minilora")


@pytest.fixture
def package(tmp_path):
    """A copy of the package's module with the first equations."""
    (tmp_path / "minilora").mkdir()
    return Path(shutil.copy(ROOT / "minilora" / "lora.py", tmp_path / "minilora")).parent


@pytest.fixture
def whole(tmp_path):
    return Path(shutil.copytree(ROOT / "minilora", tmp_path / "minilora", ignore=shutil.ignore_patterns("__pycache__")))


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_pages_and_code_fit():
    problems = stated.problems(STATED, LINES)
    assert not problems, "\n".join(problems)


def test_every_equation_but_one_is_evaluated():
    assert [x.label for x in STATED if x.unchecked] == ["26"]


def test_what_is_compared_is_the_printed_formula():
    """But for six that have words, or an order of entries that no formula says; the page shows those in Python."""
    shown = sorted(x.label for x in STATED if x.entries)
    assert shown == ["25", "conv.1", "conv.2", "loftq.2", "seq.2", "sum.2"]


PRINTED = [x for x in STATED if not x.entries and not x.unchecked]


@pytest.mark.parametrize("equation", one_in(4, PRINTED, [x.label for x in PRINTED]))
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


def test_a_line_is_found_where_it_is(package):
    (line,) = [x for x in numbered.find_lines(package) if x.label == "6"]
    assert (line.module, line.cls) == ("minilora.lora", "LoRA")
    assert line.code == "dx = dh @ self.lora_A if need_dx else None"
    assert "# eq. (6)" in (package / "lora.py").read_text(encoding="utf-8").splitlines()[line.lineno - 1]


def test_a_statement_of_several_lines_is_read_whole(package):
    (package / "new.py").write_text("y = (\n    2\n    * x  # eq. (99)\n)\n", encoding="utf-8")
    assert [x.code for x in numbered.find_lines(package) if x.label == "99"] == ["y = (2 * x)"]


def test_a_number_twice_in_a_file_has_two_anchors(package):
    replace(package / "lora.py", "# eq. (6)", "# eq. (5)")
    lines = [x for x in numbered.find_lines(package) if x.module == "minilora.lora"]
    assert [x.anchor for x in lines if x.label == "5"] == ["eq-5", "eq-5-2"]


def test_a_word_in_a_label_becomes_part_of_the_anchor():
    assert [x.anchor for x in LINES if x.label == "act.1"] == ["eq-act-1"]


def test_a_number_in_a_string_is_no_line(package):
    (package / "new.py").write_text('"""See # eq. (99)."""\n', encoding="utf-8")
    assert "99" not in [x.label for x in numbered.find_lines(package)]


BROKEN = [
    ("a comment is lost", "lora.py", "  # eq. (6)", "  #", "equation (6) has no line of code"),
    ("a comment is new", "lora.py", "# eq. (6)", "# eq. (66)", "no equation (66)"),
    ("a variable is renamed", "lora.py", "dA = ", "gradient = ", "equation (5) speaks of dA"),
    ("an attribute is renamed", "lora.py", "lora_B", "up", "equation (2) speaks of lora_B"),
    ("a number moves", "optim.py", "# eq. (22)", "# eq. (23)", "equation (22) has no line"),
    ("a file is lost", "losses.py", "# eq.", "#", "equation (15) has no line"),
    ("a word is misspelt", "layers/activation.py", "(act.1)", "(atc.1)", "no equation (atc.1)"),
]


@pytest.mark.site
@pytest.mark.parametrize(("what", "file", "old", "new", "said"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_link_is_found(whole, what, file, old, new, said):
    replace(whole / file, old, new)
    links = [dataclasses.replace(x, unchecked="the links alone") for x in STATED]
    assert any(said in problem for problem in stated.problems(links, numbered.find_lines(whole)))


WRONG = [
    ("sign of dB", "lora.py", "dB = rows(dy)", "dB = -rows(dy)", "3"),
    ("s divided in dB", "lora.py", "rows(h) * self.scaling", "rows(h) / self.scaling", "3"),
    ("s twice in y", "lora.py", "widen(self.scaling * h", "widen(self.scaling * self.scaling * h", "2"),
    ("s squared in dh", "lora.py", "dy @ self.lora_B * self.scaling", "dy @ self.lora_B * self.scaling**2", "4"),
    ("A not transposed", "lora.py", "h = x @ self.lora_A.T", "h = x @ self.lora_A", "1"),
    ("factors swapped in dA", "lora.py", "rows(dh).T @ rows(x)", "rows(x).T @ rows(dh)", "5"),
    ("adapter subtracted", "lora.py", "self.base(x) + update", "self.base(x) - update", "11"),
    ("adapter's dx lost", "lora.py", "input_gradient(dy) + dx_adapter", "input_gradient(dy) + 0 * dx_adapter", "12"),
    ("delta subtracted", "lora.py", "weight + self.delta()", "weight - self.delta()", "14"),
    ("bias lost in merging", "lora.py", "else bias.copy()", "else 0 * bias", "14"),
    ("bias subtracted", "linear.py", "W.T + b", "W.T - b", "7"),
    ("bias summed along a row", "linear.py", "sum(axis=0)", "sum(axis=-1)", "9"),
    ("sum for mean", "losses.py", "(error * error).mean()", "(error * error).sum()", "15"),
    ("2 lost", "losses.py", "(2 / count) * error", "(1 / count) * error", "16"),
    ("M lost", "losses.py", "(_minus_one_hot(q, ids), share", "(_minus_one_hot(q, ids), 1 + 0 * share", "ce.3"),
    ("gradient added", "optim.py", "isub(theta,", "iadd(theta,", "24"),
    ("eps in the root", "optim.py", "iadd(v_hat**0.5, eps)", "((v_hat + eps) ** 0.5)", "24"),
    ("no correction", "optim.py", "m_hat = m / (1 - beta1**t)", "m_hat = m + 0 * (beta1 + t)", "22"),
    ("tanh' of x", "layers/activation.py", "(1 - y * y)", "(1 - y)", "act.4"),
    ("SiLU's second term", "layers/activation.py", "(1 + x * (1 - q))", "(1 - x * (1 - q))", "act.6"),
    ("patches from elsewhere", "layers/convolution.py", "= padded[", "= -padded[", "conv.1"),
    ("gradients overwrite", "layers/convolution.py", "*window)] += dz", "*window)] = dz", "conv.2"),
    ("rows subtracted", "layers/embedding.py", "rows(dy))  #", "-rows(dy))  #", "emb.2"),
    ("du twice", "variants/adapter.py", "layer.backward(du,", "layer.backward(2 * du,", "rw.3"),
    ("the matrix of the base", "variants/adapter.py", "layer.merge().weight", "layer.merge().weight * 0.5", "rw.4"),
    ("norm of columns", "variants/dora.py", "sum(axis=1))", "sum(axis=0))", "dora.1"),
    ("sign of dn", "variants/dora.py", "dn = -g * dm", "dn = g * dm", "dora.6"),
    ("s lost in dB", "variants/dora.py", "s * dV @ A.T, s * B.T", "dV @ A.T, s * B.T", "dora.8"),
    ("residual's sign", "variants/pissa.py", "weight - adapter.delta()", "weight + adapter.delta()", "pissa.2"),
    ("A0's sign", "variants/pissa.py", "join([A, -A0])", "join([A, A0])", "pissa.3"),
    ("factors on top", "variants/sums.py", "concatenate(B, axis=1)", "concatenate(B, axis=0)", "sum.1"),
    ("one root too many", "variants/sums.py", "(U[:, :r] * root)", "(U[:, :r] * root**2)", "sum.3"),
    ("no root", "variants/scaling.py", "alpha / math.sqrt(rank)", "alpha / math.sqrt(rank) ** 2", "rs.1"),
    ("c lost in the scores", "layers/attention.py", "c * q_rows", "(c / c) * q_rows", "att.1"),
    ("scores not masked", "layers/attention.py", "S = mask(", "S = (lambda S, T: S)(", "att.1"),
    ("values of the keys", "layers/attention.py", "o = P @ v_rows", "o = P @ k_rows + 0 * v_rows", "att.3"),
    ("shares not transposed", "layers/attention.py", "dv = P.swap", "dv = 2 * P.swap", "att.4"),
    ("the softmax's sum lost", "layers/attention.py", "inner(P, dP)", "0 * inner(P, dP)", "att.6"),
    ("the softmax's sum added", "layers/attention.py", "(dP - inner", "(dP + inner", "att.6"),
    ("c lost in dq", "layers/attention.py", "k_rows * c", "k_rows + 0 * c", "att.7"),
    ("c twice in dk", "layers/attention.py", "q_rows * c", "q_rows * c * c", "att.8"),
    ("x read twice", "layers/attention.py", "dx_q + dx_k + dx_v", "dx_q + dx_k + 0 * dx_v", "att.9"),
    ("the old sum not brought to the new m", "fast/blockwise.py", "Z = f * Z +", "Z = f / f * Z +", "blk.4"),
    ("Z's share subtracted", "fast/blockwise.py", "swapaxes(-1, -2), dZ)", "swapaxes(-1, -2), -dZ)", "blk.9"),
    ("m added", "fast/blockwise.py", "isub(S, m)", "isub(S, -m)", "blk.2"),
    ("a block overwrites", "fast/blockwise.py", "dk[:, :, 0, u] +=", "dk[:, :, 0, u] =", "blk.13"),
    ("frequencies of -j/D", "layers/rotary.py", "-2 * j / width", "-1 * j / width", "rope.1"),
    ("turned the same way", "layers/rotary.py", "cos, -sin)", "cos, sin)", "rope.4"),
    ("a sum in place of the mean", "layers/norm.py", "inner(x, x) / x.shape[-1]", "inner(x, x)", "norm.1"),
    ("eps outside the root", "layers/norm.py", "x.shape[-1] + self.eps)", "x.shape[-1]) + self.eps", "norm.1"),
    ("the weight forgotten in dx", "layers/norm.py", "(dy * g - x", "(dy - x", "norm.4"),
    ("the other factor", "layers/gated.py", "da = dz * p", "da = dz * (p - u + u * u)", "gate.2"),
    ("the branch subtracted", "language/llama.py", "y = x + update", "y = x - update", "llama.1"),
    ("the short way lost", "language/llama.py", "dx = dy + dx_branch", "dx = 0 * dy + dx_branch", "llama.2"),
    ("s lost in (17)", "fast/residual.py", "dB = c * (s * B", "dB = c * (0 * s + 1 * B", "17"),
    ("W transposed in (19)", "fast/residual.py", "(W.T @ B)", "(W @ B)", "19"),
]


@pytest.mark.parametrize(("what", "file", "old", "new", "label"), one_in(4, WRONG, [row[0] for row in WRONG]))
def test_a_line_that_computes_something_else_is_found(tmp_path, what, file, old, new, label):
    path = tmp_path / "minilora" / file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "minilora" / file, path)
    replace(path, old, new)
    (equation,) = [x for x in STATED if x.label == label]
    lines = [x for x in numbered.find_lines(tmp_path / "minilora") if x.label == label]
    assert [f"is not equation ({label})" in problem for problem in stated.problems([equation], lines)] == [True]


def test_an_equation_stated_twice_is_found():
    twice = [stated.Equation("5", ["dA"])] * 2
    assert "equation (5) is stated 2 times" in stated.problems(twice, [])


@pytest.mark.parametrize(
    ("tex", "said"),
    [
        (r"dA = dh^\top z", "nothing is known of z"),
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
    page = "# A\n\n<!-- equation x.1 y W\n:entries: W * 2\n-->\n$$\ny = 2 W \\tag{x.1}\n$$\n"
    assert stated.read_page(page) == [stated.Equation("x.1", ["y", "W"], "y = 2 W", "W * 2")]
    with pytest.raises(ValueError, match=r"equation \(x.1\) is printed with the number x\.2"):
        stated.read_page(page.replace("tag{x.1}", "tag{x.2}"))


def test_a_number_in_prose_must_name_an_equation():
    prose = (
        "By (1) and (7), not `(8)`, as [(9)](#a) says in {2021}: f(3), $x (4)$.\n\n## Equation (5)\n\n```py\n(6)\n```\n"
    )
    assert numbered.named_in(prose) == ["1", "7"]


# --- a wrong sign anywhere in a numbered line of the core or of a language model --------------------------------------

LANGUAGE = ("norm", "rope", "att", "blk", "gate", "llama")
SIGNED = [x for x in LINES if (x.label.isdigit() and x.label != "26") or x.label.partition(".")[0] in LANGUAGE]


def sign_errors(code):
    """Yield the statement with one of its terms or factors negated: each operand of + - * / @, and the whole."""
    tree = ast.parse(code)
    places = [node for node in ast.walk(tree.body[0].value) if isinstance(node, ast.BinOp)]
    for place in [
        None,
        *((node, side) for node in places for side in ("left", "right") if not_an_exponent(node, side)),
    ]:
        holder, side = place or (tree.body[0], "value")
        kept = getattr(holder, side)
        setattr(holder, side, ast.UnaryOp(ast.USub(), kept))
        yield ast.unparse(ast.fix_missing_locations(tree))
        setattr(holder, side, kept)


def not_an_exponent(node, side):
    return not isinstance(node.op, ast.Pow) and not isinstance(getattr(node, side), ast.Constant)


@pytest.mark.parametrize("line", one_in(4, SIGNED, map(str, SIGNED)))
def test_no_wrong_sign_passes(line):
    (equation,) = [x for x in STATED if x.label == line.label]
    assert stated.problems([equation], [line]) == []
    for code in sign_errors(line.code):
        assert stated.problems([equation], [dataclasses.replace(line, code=code)]), code
