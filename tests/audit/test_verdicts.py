"""What is said of a merged model: which modules, at which strength, whose change, and all of it in one verdict."""

from types import SimpleNamespace

import pytest

from minilora.audit.merging import MergeResult, combined
from minilora.audit.suspects import (
    RIGHT,
    SKIPPED,
    UNDECIDED,
    WRONG,
    Verdict,
    other_change_verdict,
    strength_verdict,
)
from minilora.audit.verdicts import comparison_json, subset_text, summarize
from minilora.files.dtypes import FLOATS

from .test_merged import LAST, SCALING, R, World

EVERY = [f"model.layers.{i}.{name}" for i in range(6) for name in ("q_proj", "k_proj", "up_proj")]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (lambda i, kind: True, "all 18 modules"),
        (lambda i, kind: i == 3, "layer 3"),
        (lambda i, kind: i in (0, 1, 2, 4), "layers 0 to 2, 4"),
        (lambda i, kind: kind == "q_proj", "q_proj"),
        (lambda i, kind: kind != "up_proj", "k_proj and q_proj"),
        (lambda i, kind: kind != "up_proj" and i in (0, 2, 3), "k_proj and q_proj of layers 0, 2 to 3"),
        (lambda i, kind: (i, kind) == (1, "q_proj"), "'model.layers.1.q_proj'"),
        (lambda i, kind: (i, kind[0]) in ((1, "q"), (2, "k")), "'model.layers.1.q_proj', 'model.layers.2.k_proj'"),
    ],
)  # fmt: skip
def test_modules_are_named_by_what_they_share(chosen, said):
    paths = [path for path in EVERY if chosen(int(path.split(".")[2]), path.split(".")[3])]
    assert subset_text(paths, EVERY) == said


@pytest.mark.parametrize(("count", "said"), [(5, "a, b, c, d and e"), (6, "'0.a', '0.b', '0.c' and 9 more modules")])
def test_up_to_five_kinds_are_named(count, said):
    every = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in "abcdefg"]
    chosen = [path for path in every if path[-1] in "abcdefg"[:count]]
    assert subset_text(chosen, every) == said.replace("'0.", "'model.layers.0.")
    assert subset_text(["lm_head"], ["lm_head"]) == "'lm_head'"
    assert subset_text(["lm_head", *EVERY[:1]], ["lm_head", *EVERY]) == f"'lm_head', '{EVERY[0]}'"


ROOT = R**0.5
PATTERNS = {"r": 2, "rank_pattern": dict.fromkeys(LAST, R)}


STRENGTHS = [
    ({}, SCALING, SCALING / 2, "0.5 (half)"),
    ({}, SCALING, R * SCALING / ROOT, "2.83 (alpha / sqrt(r) instead of alpha / r)"),
    ({}, SCALING, 2.003 * SCALING, "2 (twice)"),
    ({}, SCALING, SCALING**2, "3 (with the scaling applied twice)"),
    ({"use_rslora": True}, ROOT * SCALING, R * SCALING, "2.83 (alpha instead of alpha / sqrt(r))"),
    ({"use_rslora": True}, ROOT * SCALING, SCALING, "0.354 (alpha / r instead of alpha / sqrt(r))"),
    ({"use_rslora": True}, ROOT * SCALING, ROOT, "0.333 (with alpha 8, PEFT's default)"),
    (PATTERNS, SCALING, 4 * SCALING, "4 (with r and lora_alpha, without rank_pattern and alpha_pattern)"),
    (PATTERNS | {"alpha_pattern": dict.fromkeys(LAST, 40)}, 5, SCALING, "0.6 (with lora_alpha, without alpha_pattern)"),
    ({}, SCALING, 5.1, "1.7: all 4 modules"),
    ({}, SCALING, 2.03 * SCALING, "2.03: all 4 modules"),
    ({}, SCALING, 1.0005 * SCALING, "1.0005: all 4 modules"),
]


@pytest.mark.parametrize(("settings", "right", "used", "said"), STRENGTHS, ids=[row[-1] for row in STRENGTHS])
def test_a_strength_has_the_name_of_its_mistake(tmp_path, settings, right, used, said):
    world = World(tmp_path, FLOATS["F32"], **settings)
    report = world.judged(world.merged(lambda _, delta: delta / SCALING * used))
    assert report.first_line.startswith(f"merged: WRONG: merged with a factor of {said}")
    assert world.judged(world.merged(lambda _, delta: delta / SCALING * right)).word == "RIGHT"


def test_a_strength_is_known_within_what_was_measured():
    known = [(2.0, "twice"), (0.5, "half")]
    assert strength_verdict(1.5, 2.03125, known) == Verdict(WRONG, "factor", "merged with a factor of {k} (twice)", 2.0)
    assert strength_verdict(1.5, 1.875, known) == Verdict(WRONG, "factor", "merged with a factor of {k}", 1.6875)
    for k in (1, -1):  # and within two thousandths, however exactly it was measured
        said = Verdict(WRONG, "factor", "merged with a factor of {k} (so)", k)
        assert strength_verdict(1.001 * k, 1.001 * k, [(k, "so")]) == said
        assert strength_verdict(1.003 * k, 1.003 * k, [(k, "so")]).text == "merged with a factor of {k}"


def test_experts_that_cannot_be_told_are_no_exception():
    wrong = Verdict(WRONG, "factor", "merged twice")
    assert combined([wrong, wrong, Verdict(UNDECIDED)]) == wrong
    assert combined([wrong, Verdict(), Verdict(UNDECIDED)]).text == "merged twice, in 1 of 3 experts"


OWN = "model.layers.3.q_proj"


@pytest.mark.parametrize(
    ("whose", "k", "flag", "text"),
    [
        (f"{OWN}, transposed", 1.01, "transposed", "the change is transposed"),
        (f"{OWN}, transposed", 2.0, "transposed", "the change is transposed, {k} times"),
        (f"{OWN}, packed otherwise, expert 1", 1.0, "packing", "B's ranks and experts are swapped"),
        (f"{OWN}, packed otherwise, expert 1", -1.0, "packing", "B's ranks and experts are swapped, {k} times"),
        (f"{OWN}, expert 2", 1.0, "another-change", "that of other experts"),
        ("model.layers.3.k_proj", 0.99, "another-change", "that of k_proj"),
        ("model.layers.3.k_proj, transposed", 0.97, "another-change", "that of k_proj, transposed, {k} times"),
        ("model.layers.4.q_proj", 1.0, "another-change", "that of the layer above"),
        ("model.layers.2.q_proj", 1.0, "another-change", "that of the layer below"),
        ("model.layers.5.q_proj", 1.0, "another-change", "that of 2 layers above"),
        ("model.layers.0.q_proj", 1.0, "another-change", "that of 3 layers below"),
        ("model.layers.4.k_proj", 1.0, "another-change", "that of 'model.layers.4.k_proj'"),
        ("lm_head", 1.0, "another-change", "that of 'lm_head'"),
    ],
)
def test_another_change_is_told_by_where_its_module_is(whose, k, flag, text):
    assert other_change_verdict(OWN, whose, k) == Verdict(WRONG, flag, text, k)


Q = {path: Verdict(steps=0.25, dtype="bfloat16") for path in EVERY[:2]}
LOST = {EVERY[2]: Verdict(UNDECIDED, dtype="float16"), EVERY[5]: Verdict(UNDECIDED, dtype="bfloat16")}
UNKNOWN = {EVERY[3]: Verdict(SKIPPED, "few-bits", "they are quantised")}
FACTOR = {
    EVERY[i]: Verdict(WRONG, "factor", "merged with a factor of {k}", k) for i, k in enumerate((2.0, 3.0, 2.5), 6)
}
OTHER = {f"{name}.weight": Verdict(WRONG, "changed", "changed by {rest}", rest=0.5) for name in ("a", "b")}
BESIDE = {name: Verdict(WRONG, "factors-beside") for name in ("a.lora_A", "a.lora_B")}
EXACT = "bfloat16, at most 0.25 ulp from the exact sum"
TOLD = {
    f"RIGHT: merged correctly (2 of 2 modules, {EXACT})": {"modules": Q},
    f"RIGHT: merged correctly (2 of 4 modules, {EXACT}, 1 fully trained tensor); 2 cannot be decided, "
    "since rounding loses their change": {"modules": Q | LOST, "others": {"a": Verdict(RIGHT)}},
    "RIGHT: merged correctly (3 of 3 modules, bfloat16/float16, at most 0.5 ulp from the exact sum)": {
        "modules": Q | {EVERY[2]: Verdict(steps=0.5, dtype="float16")}},
    "RIGHT: merged correctly (1 fully trained tensor)": {"others": {"a": Verdict(RIGHT)}},
    "UNDECIDED: 1 of 3 modules cannot be compared: they are quantised": {"modules": Q | UNKNOWN},
    "UNDECIDED: cannot be decided: in all 2 modules the change is zero or below half a step of bfloat16/float16": {
        "modules": LOST},
    "UNDECIDED: the adapter has nothing to merge": {"others": {"a": Verdict(SKIPPED)}},
    "WRONG: merged with a factor of 2 to 3: layer 2 (3 of 5 modules); merged correctly: layer 0": {
        "modules": Q | FACTOR},
    "WRONG: changed by 50.0%: 'a.weight', 'b.weight'": {"modules": Q, "others": OTHER, "same": 3},
    "WRONG: merged into another base: 2 of 5 tensors without an adapter differ from this one by 50.0% of their size": {
        "modules": FACTOR, "others": OTHER, "same": 3, "same_vectors": 1},
    "WRONG: merged with a factor of 2 to 3: all 3 modules": {"modules": FACTOR, "others": OTHER, "same": 3},
    "WRONG: not merged: the folder has 2 tensors of an unmerged PeftModel": {"others": BESIDE},
    "WRONG: not merged: the folder has 1 tensor of an unmerged PeftModel": {
        "others": {"a.lora_A": BESIDE["a.lora_A"]}},
    **{f"WRONG: 2 names in the merged model begin with {start!r}, so transformers ignores the tensors": {
        "modules": Q, "unloaded": {start: ["a", "b"]}} for start in ("base_model.model.", "module.", "_orig_mod.")},
    "WRONG: 1 name in the merged model lacks the model's prefix, so transformers ignores the tensor": {
        "modules": Q, "unloaded": {"": ["a"]}},
    "UNDECIDED: 1 tensor cannot be compared: they are quantised: 'a'": {
        "modules": Q, "others": {"a": Verdict(SKIPPED, "few-bits", "they are quantised")}},
    f"RIGHT: merged correctly (2 of 2 modules, {EXACT}); experts are numbered 1, 3: transformers reads them in this "
    "order; config.json differs: x": {"modules": Q, "settings": ["x"], "numbering": "1, 3"},
}  # fmt: skip


def told(lost=(), **found):
    """What is said where a comparison has found this of modules, of other tensors, and so on."""
    return summarize(MergeResult(merged=None, **found), SimpleNamespace(lost=[*lost]))


def text_of(verdict):
    return f"{verdict.word}: {verdict.text or verdict.found[0].says}"


@pytest.mark.parametrize("text", TOLD)
def test_one_verdict_is_told_of_all(text):
    assert text_of(told(**TOLD[text])) == text


def test_over_another_base_the_tensors_that_differ_are_told_once():
    of_vectors = told(modules=FACTOR, others=OTHER, vectors={*OTHER})
    assert text_of(of_vectors) == "WRONG: merged with a factor of 2 to 3: all 3 modules"
    over_another = told(modules=FACTOR, others=OTHER, same=3, same_vectors=1)
    assert [found.flag for found in over_another.found] == ["other-base", "factor"]


def test_what_is_beside_the_verdict_is_told_line_by_line():
    others = OTHER | {f"u{i}": Verdict(SKIPPED, "not-compared", "it is of integers") for i in range(4)}
    of_names = {"extra": [*"vwxy"], "grown": {"lm_head": 1}, "renamed": "model."}
    assert told(modules=Q | LOST | UNKNOWN, others=others, same=7, **of_names, lost="p").lines == [
        "merged modules: 2 right, 2 cannot be told, 1 not compared",
        "other tensors: 7 equal the base's, 2 differ",
        *[f"note: not compared: u{i}: it is of integers [not-compared]" for i in range(3)],
        "note: 'lm_head' with 1 more row, whose values are not checked [vocabulary-grown]",
        "note: 4 tensors only in the merged model: 'v', 'w', 'x' and 1 more tensor [merged-alone]",
        "note: the names begin differently in the merged model: 'model.' [renamed]",
    ]


@pytest.mark.parametrize(
    ("lost", "verb"), [(["p"], "1 module of the adapter is"), (["p", "q"], "2 modules of the ada")]
)
def test_modules_that_the_base_has_not_are_told(lost, verb):
    (found,) = told(modules=Q, lost=lost).found
    assert (found.flag, found.cases) == ("module-unknown", tuple(lost))
    assert found.says.startswith(verb)
    assert (" are not in the base" in found.says) == (len(lost) > 1)


def test_programs_get_each_number_that_is_one():
    others = {"t": Verdict(SKIPPED, "g", "{rest} of {k}", rest=0.25)}
    module = Verdict(WRONG, "f", "by {k}", 2.0, float("inf"))
    merger = MergeResult(
        merged=SimpleNamespace(path="m"), modules={"p": module}, others=others, same=3, same_vectors=1, vectors={"v"},
        extra=["x"], grown={"g": 1}, renamed="r",
    )  # fmt: skip
    assert comparison_json(merger) == {
        "path": "m", "same": 3, "extra": ["x"], "grown": {"g": 1}, "renamed": "r",
        "modules": [{"module": "p", "state": "wrong", "flag": "f", "text": "by 2", "factor": 2.0, "rest": None,
                     "steps": 0.0, "dtype": ""}],
        "tensors": [{"tensor": "t", "state": "not compared", "flag": "g", "text": "25.0% of 0", "factor": None,
                     "rest": 0.25, "steps": 0.0, "dtype": ""}],
    }  # fmt: skip


def another(text):
    return Verdict(WRONG, "another-change", text, 0.5)


def test_what_most_modules_have_is_told_first():
    of = {EVERY[0]: Verdict(WRONG, "in-part", "in part, {k} and {rest}", 1e-5, 0.25)}
    of |= {EVERY[i]: another(text) for i, text in ((3, "a"), (4, "a, {k} times"), (6, "b"), (7, "c"), (9, "a"))}
    of |= {EVERY[i]: Verdict(WRONG, "in-part", "in part, {k} and {rest}", 2.5, 0.5) for i in (1, 2)}
    of |= {EVERY[15]: Verdict()}
    found = told(modules=of)
    whose = "q_proj of layers 1, 3 with a, 'model.layers.1.k_proj' with a, 0.5 times, 'model.layers.2.q_proj' with b"
    right = "merged correctly: 'model.layers.5.q_proj'"
    assert [(one.says, one.flag, len(one.cases)) for one in found.found] == [
        (f"the wrong change: {whose} and so on (5 of 9 modules); {right}", "another-change", 5),
        ("in part, 1e-05 to 2.5 and 25.0% to 50.0%: layer 0 (3 of 9 modules)", "in-part", 3),
    ]
    assert found.lines[0] == "merged modules: 1 right, 8 wrong"
    assert told().lines[0] == "merged modules: none"


def test_other_tensors_are_told_by_what_they_have():
    rests = {"a": 0.5, "{k}": 0.5, "c": 0.1, "d": 0.5}
    others = {name: Verdict(WRONG, "changed", "changed by {rest}", rest=rest) for name, rest in rests.items()}
    others |= {"f": Verdict(WRONG, "missing", "is not there")}
    assert [(found.says, found.flag, found.cases) for found in told(modules=Q, others=others, same=20).found] == [
        ("changed by 10.0% to 50.0%: 'a', '{k}', 'c' and 1 more tensor", "changed", ("a", "{k}", "c", "d")),
        ("is not there: 'f'", "missing", ("f",)),
    ]
