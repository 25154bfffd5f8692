"""What is said of a program's answers: of every form of them, how far off they may be, and what heads the report."""

import json
import shutil
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora.conformance.golden.folder import FOLDER_FORMAT, read_index
from minilora.conformance.golden.judging import compare_golden, judge_case, paired_answers
from minilora.texts import FileRefused

from ...support.compare import refused
from .conftest import FORMS, as_given, log_softmax, saved

MERGED = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # a verdict hangs on them


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture(scope="module")
def entries(golden):
    return read_index(golden)


@pytest.fixture
def judged(golden, entries, results):
    """Return what becomes of a case whose answer is some tensors."""

    def outcome(tensors, id="rslora", **metadata):
        saved(tensors, results / f"{id}.safetensors", metadata)
        case = next(case for case in entries.cases if case.id == id)
        return judge_case(golden, results, case, entries.tolerance).outcome

    return outcome


@pytest.fixture
def reported(golden, right, results):
    """Return the report of right answers, some of which are others: none, an array, or those of a bug."""

    def report(answers):
        shutil.copytree(right, results, dirs_exist_ok=True)
        for id, z in answers.items():
            path = results / f"{id}.safetensors"
            if z is None:
                path.unlink()
            else:
                z = with_signature(load_file(golden / "answers" / path.name), z) if isinstance(z, str) else z
                save_file({"logits": z}, path)
        return compare_golden(golden, results)

    return report


def found_in(report):
    return [(one.flag, one.cases) for one in report.found]


@pytest.fixture
def ours(golden):
    return load_file(golden / "answers" / "rslora.safetensors")


@pytest.fixture
def merged(ours):
    return next(name for name in ours if name.startswith("merged."))


ROOT, TWICE = "rslora-root-is-ignored", "the-update-is-added-twice"


def with_signature(ours, flag=ROOT):
    z = ours["logits"].copy()
    z[:, -1] = ours[f"signature.{flag}"]
    return z


# --- forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_answers_may_have_several_forms(judged, ours, form):
    assert judged(as_given(form, ours["logits"])).state == "right"
    found = judged(as_given(form, with_signature(ours)))
    assert (found.state, found.flags) == ("wrong", (ROOT,))


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_merged_weights_are_judged_and_named(judged, ours, merged, ending):
    name = merged.removesuffix(".weight") + ending
    whole = np.concatenate([ours[merged], np.ones((5, ours[merged].shape[1]), np.float32)])
    assert judged({name: whole}).state == "right"
    rows = ours[f"signature.{ROOT}.merged"]
    whole[: len(rows)] = rows
    found = judged({name: whole})
    assert (found.state, ROOT in found.flags) == ("wrong", True)


def test_a_bug_explains_all_that_is_wrong(golden, judged, ours, merged, results):
    flag, other = ROOT, TWICE
    bad = {"logits": with_signature(ours)}
    for rows, flags in ((f"signature.{flag}.merged", (flag,)), (f"signature.{other}.merged", ()), (merged, (flag,))):
        found = judged({**bad, merged: np.concatenate([ours[rows], ours[merged][len(ours[rows]) :]])})
        assert found.flags == flags
        assert [diagnosis.flag for diagnosis in compare_golden(golden, results).found] == [*flags]
    hardly_wrong = ours[merged].astype("f8") + 1.5 * MERGED["float64"] * max(1, np.abs(ours[merged]).max())
    assert judged({**bad, merged: hardly_wrong}).flags == ()


def test_what_is_wrong_before_the_last_token_is_unexplained(golden, reported):
    """Signatures are of the last token: where that is right, none is on top of the first bug either."""
    other = load_file(golden / "answers" / "dora-rslora.safetensors")
    assert {f"signature.{ROOT}", f"signature.{TWICE}"} <= other.keys()
    z = other["logits"].copy()
    z[:, 2] += 1
    report = reported({"rslora": ROOT, "dora-rslora": z, "all-linear": TWICE, "head": TWICE})
    assert found_in(report) == [(TWICE, ("all-linear", "head")), (ROOT, ("rslora",))]
    assert next(case for case in report.cases if case.id == "dora-rslora").flags == ()


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.full)])
def test_every_signature_is_named_and_no_other(golden, entries, judged, every):
    """Off by nearly the whole tolerance of bfloat16, none is taken for another."""
    rng, off = np.random.default_rng(0), 0.9 * entries.tolerance["bfloat16"]
    for case in entries.cases:
        ours = load_file(golden / case.answers) if case.answers else {}
        for flag in case.flags[::every]:
            z = with_signature(ours, flag)
            z[:, -1] += off * rng.choice([-1, 1], z[:, -1].shape)
            assert judged({"logits": z}, case.id, computed_in="bfloat16").flags == (flag,)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"logits": np.zeros((2, 5, 128))}, "logits has shape (2, 5, 128), expected (2, 6, 128)"),
        ({"logits": np.full((2, 6, 128), np.nan)}, "logits holds NaN or infinity: [0, 0, 0] is nan, the first of 1536 "
            "among 1536"),
        ({"logits": np.where(np.arange(1536).reshape(2, 6, 128) == 1027, -np.inf, 0)},
            "logits holds NaN or infinity: [1, 2, 3] is -inf, the only one of 1536"),
        ({"logits": np.zeros((2, 127))}, "logits has shape (2, 127), expected (2, 128)"),
        ({"logits": np.zeros(3)}, "logits has shape (3,), expected (2, 6, 128)"),
        ({"logit": np.zeros(3)}, "the file has no answer to this case; its tensors: 'logit'"),
        ({"ids": np.zeros((2, 3), np.int64)}, "the file has no answer to this case; its tensors: 'ids'"),
        ({"log_probabilities": np.zeros((2, 3)), "ids": np.full((2, 3), 128)}, "ids has 128, expected ids below 128"),
        ({"log_probabilities": np.zeros((2, 3)), "ids": np.full((2, 3), -1)}, "ids has -1, expected ids below 128"),
        ({"log_probabilities": np.zeros((2, 3)), "ids": np.zeros((2, 4), int)},
            "ids has shape (2, 4), expected (2, 3), the shape of log_probabilities"),
        ({"log_probabilities": np.zeros((2, 3))}, "log_probabilities has shape (2, 3), expected (2, 128)"),
        ({"log_probabilities": np.zeros((5, 3)), "ids": np.zeros((5, 3), int)},
            "log_probabilities has shape (5, 3), expected (2, 128)"),
        ({"log_probabilities": np.zeros((2, 6, 128)) - np.inf},
            "log_probabilities holds NaN or infinity: [0, 0, 0] is -inf, the first of 1536 among 1536"),
        ({"log_probabilities": np.zeros(4), "ids": np.zeros(4, int)},
            "log_probabilities has shape (4,), expected (2, 6, 128)"),
        ({"merged.lm_head.weight": np.zeros((128, 64))},
            "the file has no answer to this case; its tensors: 'merged.lm_head.weight'"),
        ({"merged.model.layers.0.self_attn.v_proj": np.zeros(3)},
            "merged.model.layers.0.self_attn.v_proj has shape (3,), expected (4, 64)"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_wrong_and_says_why(judged, tensors, text):
    found = judged(tensors)
    assert (found.state, found.text, found.flags) == ("wrong", text, ())


# --- how far off ------------------------------------------------------------------------------------


def test_each_quantity_has_a_tolerance_in_each_precision(judged, index, ours, merged):
    """Of log-probabilities twice that of logits; of a merged weight a part of its largest entry."""
    for precision, tolerance in index["tolerance"].items():
        for quantity, right, bound in (
            ("logits", ours["logits"], tolerance),
            ("log_probabilities", log_softmax(ours["logits"]), 2 * tolerance),
            (merged, ours[merged].astype("f8"), MERGED[precision] * max(1, np.abs(ours[merged]).max())),
        ):
            for times, state in ((0.97, "right"), (1.03, "wrong")):
                off = right.copy()
                off.flat[100] -= times * bound
                found = judged({quantity: off, "other": np.zeros(2)}, computed_in=precision)
                assert (found.state, found.precision) == (state, precision)
                assert found.off == pytest.approx(times, rel=0.01)


@pytest.mark.parametrize(("largest", "times"), [(0.01, 1), (1.0, 1), (50.0, 50)])
def test_a_merged_weights_tolerance_is_of_its_largest_entry(largest, times):
    W = {"merged.w.weight": np.array([[0.001, -largest]])}
    pair = paired_answers("merged.w.weight", W, {"logits": np.zeros((1, 2)), **W}, [], "float32", {"float32": 1e-4})
    assert pair.allowed == pytest.approx(times * MERGED["float32"])


def test_half_types_are_judged_by_their_own_tolerance(judged, ours, merged):
    half = (ours["logits"] + 0.03).astype(np.float16)
    for tensors in ({"logits": half}, {"logits": half, merged: ours[merged]}):
        found = judged(tensors)
        assert (found.state, found.precision) == ("right", "float16")


def test_a_text_says_where_it_is_off_most(judged, ours):
    for first, end in ((3, "; right up to position 2"), (1, "; right up to position 0"), (0, "")):
        z = ours["logits"].copy()
        z[:, first:] += 5
        z[:, 0] += 1e-6  # rounding
        z[1, 4, 7] += 1
        right = ours["logits"][1, 4, 7]
        text = f"logits is off by 6 at [1, 4, 7]: {right + 6:.6g}, expected {right:.6g}; tolerance 1e-05{end}"
        assert judged({"logits": z}).text == text


@pytest.mark.parametrize("quantity", ["logits", "merged"])
def test_a_cast_is_said_and_passes_where_declared(judged, ours, merged, quantity):
    name = merged if quantity == "merged" else "logits"
    cast = (np.asarray(ours[name], np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    found = judged({name: cast})
    assert (found.state, found.flags) == ("wrong", ())
    assert found.text.startswith(
        "as if rounded to float16: if that is intended, declare computed_in float16; if not, look for an unwanted "
        f"cast; {name} is off by "
    )
    assert judged({name: cast}, computed_in="bfloat16").state == "right"
    assert "as if rounded" not in judged({name: cast + 2}).text
    other = "logits" if quantity == "merged" else merged
    assert "as if rounded" not in judged({name: cast, other: ours[other] + 2}).text  # all that is wrong would be


def test_what_must_be_refused_may_not_be_answered(golden, index, judged):
    either = set()
    for case in index["cases"]:
        if case["refused"]:
            found = judged({"logits": np.zeros((2, 6, 128))}, case["id"])
            assert found.state == "wrong"
            if "answers" in case:
                either.add(case["id"])
                assert judged({"logits": load_file(golden / case["answers"])["logits"]}, case["id"]).state == "right"
            else:
                assert found.text == f"the adapter was accepted but must be refused: {case['note']}"
    assert either == {"pissa-raw", "alpha-missing", "language-model-prefix"}


# --- what is said -----------------------------------------------------------------------------------


def test_a_report_names_what_explains_most_first(reported, results):
    other = "the-update-is-subtracted"
    wrong = {"all-linear": other, "rslora": ROOT, "rslora-with-patterns": ROOT, "dora": np.zeros((2, 6))}
    report = reported({**wrong, "head": None})
    assert found_in(report) == [(ROOT, ("rslora", "rslora-with-patterns")), (other, ("all-linear",))]
    assert report.lines == ["no single bug explains dora: fix the bugs named first, then compare again"]
    assert (report.status, report.details) == (1, {"results": str(results), "unanswered sessions": report.not_offered})
    assert len(report.not_offered) == 12
    outcomes = {case.id: case for case in report.cases if case.state != "right"}
    assert {id: (case.state, case.flags, case.precision) for id, case in outcomes.items()} == {
        **{id: ("wrong", (flag,) if isinstance(flag, str) else (), "float64") for id, flag in wrong.items()},
        "head": ("missing", (), None),
    }
    assert outcomes["rslora"].off > 1e5


def test_what_lacks_all_answers_says_how_many(golden, results):
    report = compare_golden(golden, results)
    assert report.name == str(results)
    assert report.first_line.endswith(": WRONG: 50 of 64 cases have no answer")
    assert not report.lines


def test_a_wrong_base_heads_the_report_whatever_else_is_wrong(golden, reported):
    begins = "base-alone: the base is wrong even without an adapter, so ignore other cases: "
    off_by_1 = load_file(golden / "answers" / "base-alone.safetensors")["logits"] + 1
    for base, flag, says in (
        (off_by_1, "", "logits is off by 1 at ["),
        ("rope-turns-neighbours", "rope-turns-neighbours", "the rotary embedding turns neighbours"),
    ):
        report = reported({"base-alone": base, "rslora": ROOT})
        assert found_in(report) == [(flag, ("base-alone",)), (ROOT, ("rslora",))]
        assert report.found[0].says.startswith(begins + says)


THEMSELVES = "the golden adapters themselves, expected the folder of a program's answers"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("", THEMSELVES),
        ("answers", THEMSELVES),
        ("nothing", "not a folder, expected the folder of a program's answers"),
    ],
)
def test_what_is_no_folder_of_answers_is_refused(golden, place, said):
    with refused(f"{str(golden / place)!r}: {said}"):
        compare_golden(golden, golden / place)


# --- damaged files ----------------------------------------------------------------------------------


GONE, LATER = object(), "expected at most 1; a later minilora may have written it"
REQUEST = ("sessions", 0, "requests", 0)
UNKNOWN = "has the flag 'none-such', which is not in flags"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *((("format",), value, f"format is {value!r}, {LATER}") for value in (0, FOLDER_FORMAT + 1, "1", None, True)),
        (("cases",), GONE, "Object missing required field `cases`"),
        (("cases",), [], "Expected `array` of length >= 1 - at `$.cases`"),
        (("cases",), [3], "Expected `object`, got `int` - at `$.cases[0]`"),
        (("cases", 0, "id"), GONE, "Object missing required field `id` - at `$.cases[0]`"),
        (("cases", 0, "refused"), GONE, "Object missing required field `refused` - at `$.cases[0]`"),
        (("cases", 0, "flags"), ["none-such"], f"'answers/all-linear.safetensors' {UNKNOWN}"),
        (("flags",), GONE, "Object missing required field `flags`"),
        (("flags", "x"), {}, "Object missing required field `bug` - at `$.flags[...]`"),
        (("tolerance",), GONE, "Object missing required field `tolerance`"),
        (("tolerance", "float16"), GONE, "tolerance has no float16"),
        (("tolerance", "float16"), 0, "Expected `float` > 0.0 - at `$.tolerance[...]`"),
        (("sessions",), {}, "Expected `array`, got `object` - at `$.sessions`"),
        (("sessions", 0, "requests"), GONE, "Object missing required field `requests` - at `$.sessions[0]`"),
        ((*REQUEST, "flags"), ["none-such"], f"'answers/one-after-another.0.safetensors' {UNKNOWN}"),
        ((*REQUEST, "answers"), 3, "Expected `str`, got `int` - at `$.sessions[0].requests[0].answers`"),
    ],
)
def test_an_index_that_is_none_is_refused(index, tmp_path, place, value, message):
    broken = json.loads(json.dumps(index))
    *path, last = place
    entry = reduce(getitem, path, broken)
    if value is GONE:
        del entry[last]
    else:
        entry[last] = value
    (tmp_path / "index.json").write_text(json.dumps(broken))
    with refused(f"{str(tmp_path / 'index.json')!r}: {message}"):
        read_index(tmp_path)


def test_an_index_of_before_without_sessions_is_judged(golden, index, right, tmp_path):
    older = {key: value for key, value in index.items() if key != "sessions"}
    (tmp_path / "index.json").write_text(json.dumps({**older, "cases": index["cases"][-1:]}))
    report = compare_golden(tmp_path, right)
    assert (report.status, report.not_offered, len(report.cases)) == (0, [], 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 6, 2), "f4"), "log_probabilities": np.zeros((2, 6, 2), "f4")}, "ids has dtype F32"),
        ({"logits": np.zeros((2, 6, 2), "i8")}, "'logits' has dtype I64, expected a float dtype"),
        ({"ids": np.zeros((2, 6, 0), "i8"), "log_probabilities": np.zeros((2, 6, 0), "f4")}, r"has shape \[2, 6, 0\]"),
        ({"logits": np.zeros((2, 6, 1_398_102), "f4")}, "expected 1 to 67,108,864 bytes"),
    ],
)
def test_answers_that_are_none_are_one_clear_error(judged, arrays, message):
    with pytest.raises(FileRefused, match=message):
        judged(arrays)


def test_a_file_that_says_too_little_is_an_error(golden, right, judged, ours, tmp_path):
    with pytest.raises(FileRefused, match="computed_in is 'half', expected one of float64, float32"):
        judged({"logits": ours["logits"]}, computed_in="half")
    (tmp_path / "results" / "rslora.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(FileRefused, match=r"rslora\.safetensors"):
        compare_golden(golden, tmp_path / "results")
    shutil.copytree(golden, tmp_path / "golden")
    del ours[f"signature.{ROOT}"]
    save_file(ours, tmp_path / "golden" / "answers" / "rslora.safetensors")
    with pytest.raises(FileRefused, match=r"there is no 'signature\.rslora-root-is-ignored'"):
        compare_golden(tmp_path / "golden", right)
