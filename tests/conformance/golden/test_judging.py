"""What programs answer to golden adapters: right numbers pass, known bugs are named, whatever they answer with."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import cli
from minilora.checks import FileRefused
from minilora.conformance.golden.folder import FORMAT
from minilora.conformance.golden.judging import MERGED, Judgement, Verdict, compare, judge

from .conftest import index_of
from .foreign_reader import answer

LIKELIEST = {
    "no root": "rslora-root-is-ignored",
    "no rank_pattern": "rank-pattern-is-dropped-in-the-scaling",
    "no alpha_pattern": "alpha-pattern-is-dropped",
    "last pattern": "the-last-pattern-decides",
    "alpha for alpha / r": "alpha-is-not-divided-by-the-rank",
    "factor read the other way": "lora-b-is-reshaped",
    "tied head": "the-tied-head-is-changed-too",
    "twice": "the-update-is-added-twice",
    "no magnitude": "dora-magnitude-is-ignored",
    "norm of W": "dora-norm-is-that-of-w",
    "no bias": "lora-bias-is-ignored",
    "no embedding": "embed-tokens-is-left-out",
    "any start": "pissa-start-is-not-taken-off",
    "no weights": "the-weights-of-adapters-are-ignored",
    "nothing": "the-adapter-is-not-applied",
    "swapped": "the-update-is-read-the-other-way-round",
    "other ranks": "the-order-of-ranks-differs-between-the-factors",
    "pattern anywhere": "patterns-match-anywhere",
    "pattern as text": "patterns-are-no-regular-expressions",
    "pattern as an end": "patterns-are-the-ends-of-names",
    "both factors read the other way": "both-factors-are-reshaped",
    "embedding reshaped": "the-update-of-embed-tokens-is-not-transposed",
    "rows permuted": "rows-of-q-and-k-are-permuted",
    "other heads": "heads-of-k-and-v-are-exchanged",
    "averaged": "the-weights-of-adapters-are-divided-by-their-number",
    "nibbles": "nf4-nibbles-are-swapped",
    "offset": "nf4-mean-of-scales-is-left-out",
    "A turned and reshaped": "lora-a-is-reshaped-where-it-lies-transposed",
    "no modules to save": "modules-to-save-are-ignored",
    "no trained bias": "trained-biases-are-ignored",
    "left on": "the-previous-adapter-stays-on",
    "not taken up": "the-previous-adapter-answers",
    "cache": "keys-and-values-are-the-previous-adapters",
    "bits as float16": "bfloat16-is-read-as-float16",
    "no trained tokens": "trained-tokens-are-ignored",
    "trained tokens added": "trained-tokens-are-added",
    "magnitude of the inputs": "dora-magnitude-is-along-the-inputs",
    "whole alpha": "alpha-is-cut-to-a-whole-number",
    "neighbours": "rope-turns-neighbours",
    "hidden size": "attention-is-scaled-by-hidden-size-over-heads",
}


def answer_all(golden, results, bug=None):
    index = index_of(golden)
    results.mkdir()
    for case in index["cases"]:
        found = answer(golden, index, case, bug)
        if found is not None:
            save_file({"logits": found}, results / f"{case['id']}.safetensors")
    return results


@pytest.fixture(scope="module")
def right(golden, tmp_path_factory):
    return answer_all(golden, tmp_path_factory.mktemp("right") / "results")


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def judged(golden, results, id):
    return next(case for case in compare(golden, results).cases if case.id == id)


@pytest.mark.long
def test_a_foreign_reader_agrees_in_every_case(whole, tmp_path):
    found = compare(whole, answer_all(whole, tmp_path / "results"))
    assert found.passed, found
    assert max(case.off for case in found.cases) < 1e-6  # of the tolerance: two right programs are much nearer
    assert len(found.cases) == len(index_of(whole)["cases"])


@pytest.mark.long
@pytest.mark.parametrize("bug", LIKELIEST)
def test_the_likeliest_bugs_are_caught_and_named(whole, tmp_path, bug):
    found = compare(whole, answer_all(whole, tmp_path / "results", bug))
    assert not found.passed
    flag = next(iter(found.diagnoses))
    assert flag == LIKELIEST[bug]
    assert found.names[flag] in str(found).splitlines()[0]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_every_signature_is_named_and_no_other(whole, results, precision):
    """Off by nearly the whole tolerance, none is taken for another."""
    rng, index = np.random.default_rng(0), index_of(whole)
    for case in index["cases"]:
        ours = load_file(whole / case["answers"]) if "answers" in case else {}
        for flag in case.get("flags", ()):
            z, last = ours["logits"].copy(), ours[f"signature.{flag}"]
            z[:, -1] = last + 0.9 * index["tolerance"][precision] * rng.choice([-1, 1], last.shape)
            save_file({"logits": z}, results / f"{case['id']}.safetensors", metadata={"computed_in": precision})
            assert judge(whole, results, case, index["tolerance"]).flags == (flag,)


@pytest.mark.parametrize("folder", ["golden", pytest.param("whole", marks=pytest.mark.long)])
def test_bugs_lie_ten_tolerances_apart_and_so_do_tokens(request, folder):
    golden = request.getfixturevalue(folder)
    index = index_of(golden)
    apart = index["apart"]
    assert apart >= 10 * index["tolerance"]["bfloat16"]
    for case in index["cases"]:
        experts = index["bases"][case.get("base", index["base"])].get("experts")  # they have a test of their own
        if "answers" in case and not experts:
            ours = load_file(golden / case["answers"])
            numbers = [ours["logits"][:, -1], *(ours[f"signature.{flag}"] for flag in case["flags"])]
            for i, one in enumerate(numbers):
                assert all(np.abs(one - other).max() >= 0.999 * apart for other in numbers[:i])
            last = np.sort(numbers[0], axis=-1)
            assert (last[:, -1] - last[:, -2]).min() >= apart
            np.testing.assert_array_equal(ours["next_tokens"], numbers[0].argmax(axis=-1))


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def in_every_way(ours, z):
    """Yield the ways in which a program may answer with these logits."""
    ids = np.argsort(-z, axis=-1)[..., :7].astype(np.int64)
    p = log_softmax(z)
    yield {"logits": z}
    yield {"logits": z[:, -1]}
    yield {"log_probabilities": p}
    yield {"log_probabilities": p[:, -1]}
    yield {"log_probabilities": np.take_along_axis(p, ids, -1), "ids": ids}
    yield {"log_probabilities": np.take_along_axis(p, ids, -1)[:, -1], "ids": ids[:, -1].astype(np.int32)}


def test_answers_may_have_several_forms(golden, index, results):
    case = next(case for case in index["cases"] if case["id"] == "rslora")
    ours = load_file(golden / case["answers"])
    wrong = ours["logits"].copy()
    wrong[:, -1] = ours["signature.rslora-root-is-ignored"]
    for tensors, bad in zip(in_every_way(ours, ours["logits"]), in_every_way(ours, wrong), strict=True):
        for found, state, flags in ((tensors, "right", ()), (bad, "wrong", ("rslora-root-is-ignored",))):
            save_file({k: np.ascontiguousarray(a) for k, a in found.items()}, results / "rslora.safetensors")
            verdict = judged(golden, results, "rslora")
            assert (verdict.state, verdict.flags) == (state, flags)


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_merged_weights_are_judged_and_named(golden, index, results, ending):
    case = next(case for case in index["cases"] if case["id"] == "rslora")
    ours = load_file(golden / case["answers"])
    (name,) = (name for name in ours if name.startswith("merged."))
    theirs = name.removesuffix(".weight") + ending
    whole = np.concatenate([ours[name], np.ones((5, ours[name].shape[1]), np.float32)])
    save_file({theirs: whole}, results / "rslora.safetensors")
    assert judged(golden, results, "rslora").state == "right"
    rows = ours["signature.rslora-root-is-ignored.merged"]
    whole[: len(rows)] = rows
    save_file({theirs: whole}, results / "rslora.safetensors")
    verdict = judged(golden, results, "rslora")
    assert verdict.state == "wrong"
    assert "rslora-root-is-ignored" in verdict.flags


def test_a_bug_must_explain_all_that_is_wrong(golden, index, results):
    case = next(case for case in index["cases"] if case["id"] == "rslora")
    ours = load_file(golden / case["answers"])
    one, other = case["flags"][:2]
    z, (name,) = ours["logits"].copy(), (name for name in ours if name.startswith("merged."))
    z[:, -1] = ours[f"signature.{one}"]
    for flag, expected in ((one, (one,)), (other, ())):
        rows = np.concatenate([ours[f"signature.{flag}.merged"], ours[name][1:]])
        save_file({"logits": z, name: rows}, results / "rslora.safetensors")
        assert judged(golden, results, "rslora").flags == expected


def test_an_answer_one_tolerance_off_is_right_and_two_wrong(golden, index, results):
    case = index["cases"][0]
    ours = load_file(golden / case["answers"])["logits"]
    for precision, tolerance in index["tolerance"].items():
        for times, state in ((0.99, "right"), (1.01, "wrong")):
            z = ours.copy()
            z[1, 3, 17] += times * tolerance
            path = results / f"{case['id']}.safetensors"
            save_file({"logits": z}, path, metadata={"computed_in": precision})
            assert judged(golden, results, case["id"]).state == state


def test_logarithms_and_merged_weights_have_tolerances_of_their_own(golden, index, results):
    case = index["cases"][0]
    ours = load_file(golden / case["answers"])
    (name,) = (name for name in ours if name.startswith("merged."))
    for precision, tolerance in index["tolerance"].items():
        bounds = {"log_probabilities": 2 * tolerance, name: MERGED[precision] * max(1, np.abs(ours[name]).max())}
        for quantity, bound in bounds.items():
            right = log_softmax(ours["logits"]) if quantity == "log_probabilities" else ours[name].astype("f8")
            for times, state in ((0.9, "right"), (1.1, "wrong")):
                off = right.copy()
                off.flat[100] -= times * bound
                path = results / f"{case['id']}.safetensors"
                save_file({quantity: off, "other": np.zeros(2)}, path, metadata={"computed_in": precision})
                assert judged(golden, results, case["id"]).state == state


def test_half_types_are_judged_by_their_own_tolerance(golden, index, results):
    case = index["cases"][0]
    ours = load_file(golden / case["answers"])["logits"]
    save_file({"logits": (ours + 0.03).astype(np.float16)}, results / f"{case['id']}.safetensors")
    verdict = judged(golden, results, case["id"])
    assert (verdict.state, verdict.precision) == ("right", "float16")


def test_of_tensors_of_two_types_the_wider_tolerance_is_that_of_all(golden, index, results):
    """Logits in float16, as they were computed, beside a merged weight that the program has in float32."""
    case = index["cases"][0]
    ours = load_file(golden / case["answers"])
    (name,) = (name for name in ours if name.startswith("merged."))
    save_file(
        {"logits": (ours["logits"] + 0.01).astype(np.float16), name: ours[name]}, results / "all-linear.safetensors"
    )
    verdict = judged(golden, results, case["id"])
    assert (verdict.state, verdict.precision) == ("right", "float16")


@pytest.mark.parametrize(("first", "end"), [(3, "; right up to position 2"), (1, "; right up to position 0"), (0, "")])
def test_the_last_position_that_is_right_is_named(golden, index, results, first, end):
    z = load_file(golden / "answers" / "all-linear.safetensors")["logits"]
    z[:, first:] += 5
    save_file({"logits": z}, results / "all-linear.safetensors")
    text = judged(golden, results, "all-linear").text
    assert text.endswith(end)
    assert ("right up to" in text) == bool(end)


def one_infinity():
    z = np.zeros((2, 6, 128))
    z[1, 2, 3] = -np.inf
    return z


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"logits": np.zeros((2, 5, 128))}, "logits has shape (2, 5, 128), expected (2, 6, 128)"),
        ({"logits": np.full((2, 6, 128), np.nan)}, "logits holds NaN or infinity: [0, 0, 0] is nan, the first of 1536"),
        ({"logits": one_infinity()}, "logits holds NaN or infinity: [1, 2, 3] is -inf, the only one of 1536"),
        ({"logits": np.zeros((2, 127))}, "logits has shape (2, 127), expected (2, 128)"),
        ({"logit": np.zeros(3)}, "it has 'logit', and no answer"),
        ({"ids": np.zeros((2, 3), np.int64)}, "it has 'ids', and no answer"),
        ({"log_probabilities": np.zeros((2, 3)), "ids": np.full((2, 3), 128)}, "ids has 128, expected ids below 128"),
        (
            {"log_probabilities": np.zeros((2, 3)), "ids": np.zeros((2, 4), int)},
            "ids has shape (2, 4), expected (2, 3)",
        ),
        ({"log_probabilities": np.zeros((2, 3))}, "log_probabilities has shape (2, 3), expected (2, 128)"),
        ({"log_probabilities": np.zeros((5, 3)), "ids": np.zeros((5, 3), int)}, "has shape (5, 3), expected (2, 128)"),
        ({"log_probabilities": np.zeros((2, 6, 128)) - np.inf}, "log_probabilities holds NaN or infinity"),
        ({"log_probabilities": np.zeros(4), "ids": np.zeros(4, int)}, "log_probabilities has shape (4,)"),
        ({"merged.lm_head.weight": np.zeros((128, 64))}, "it has 'merged.lm_head.weight', and no answer"),
        ({"merged.model.layers.0.self_attn.k_proj": np.zeros(3)}, "has shape (3,), expected (4, 64)"),
        ({"logits": np.zeros(3)}, "logits has shape (3,), expected (2, 6, 128)"),
    ],
)
def test_what_is_no_answer_is_wrong_and_says_why(golden, index, results, tensors, said):
    save_file(tensors, results / "all-linear.safetensors")
    verdict = judged(golden, results, "all-linear")
    assert verdict.state == "wrong"
    assert said in verdict.text


def test_what_must_be_refused_may_not_be_answered(golden, index, right, results):
    for case in index["cases"]:
        if case["refused"]:
            save_file({"logits": np.zeros((2, 6, 128))}, results / f"{case['id']}.safetensors")
            verdict = judged(golden, results, case["id"])
            assert verdict.state == "wrong"
            assert ("must be refused" in verdict.text) == ("answers" not in case)
    either = [case for case in index["cases"] if case["refused"] and "answers" in case]
    assert len(either) > 1
    for case in either:
        save_file({"logits": load_file(golden / case["answers"])["logits"]}, results / f"{case['id']}.safetensors")
        assert judged(golden, results, case["id"]).state == "right"


def test_the_first_line_says_what_no_known_bug_explains(golden, index, right, results):
    for path in right.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    assert str(compare(golden, results)).splitlines()[0].endswith(": passed")
    (results / "dora.safetensors").unlink()
    assert str(compare(golden, results)).splitlines()[0].endswith("WRONG: dora: there is no dora.safetensors")
    save_file({"logits": np.zeros((2, 6, 128))}, results / "refused-rank-zero.safetensors")
    first = str(compare(golden, results)).splitlines()[0]
    assert first.endswith("WRONG: refused-rank-zero: the adapter was taken, and must be refused: r is 0.")


def test_the_command_exits_by_the_verdict(golden, index, right, results, tmp_path, capsys):
    file = tmp_path / "verdicts.json"
    assert cli.main(["golden", str(golden), "--compare", str(right), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["passed"]
    assert [case["id"] for case in found["cases"]] == [case["id"] for case in index["cases"]]
    assert cli.main(["golden", str(golden), "--compare", str(results)]) == 1  # every case is missing
    answered = sum("answers" in case and not case["refused"] for case in index["cases"])
    assert f"{answered} missing" in capsys.readouterr().out
    assert cli.main(["golden", str(golden), "--compare", str(tmp_path / "nothing")]) == 2
    assert cli.main(["golden", str(golden), "--json", str(file)]) == 2
    assert cli.main(["golden", str(golden)]) == 2  # it is there already
    assert cli.main(["golden", str(golden), "--compare", str(golden / "answers")]) == 2


def test_a_workflow_shows_the_first_line_as_an_error(golden, right, results, monkeypatch, capsys):
    for on_github in ("true", "false"):
        monkeypatch.setenv("GITHUB_ACTIONS", on_github)
        assert cli.main(["golden", str(golden), "--compare", str(right)]) == 0
        assert "::error" not in capsys.readouterr().out
        assert cli.main(["golden", str(golden), "--compare", str(results)]) == 1
        lines = capsys.readouterr().out.splitlines()
        expected = [f"::error title=minilora golden::{lines[0]}"] if on_github == "true" else []
        assert [line for line in lines if line.startswith("::")] == expected


def test_the_likeliest_bug_comes_first(golden, index, right, results):
    for path in right.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    for id, flag in (("rslora", "rslora-root-is-ignored"), ("all-linear", "the-update-is-subtracted")):
        z = load_file(right / f"{id}.safetensors")["logits"]
        z[:, -1] = load_file(golden / "answers" / f"{id}.safetensors")[f"signature.{flag}"]
        save_file({"logits": z}, results / f"{id}.safetensors")
    found = compare(golden, results)
    assert found.diagnoses == {"rslora-root-is-ignored": ["rslora"], "the-update-is-subtracted": ["all-linear"]}
    assert sum(case.state == "wrong" for case in found.cases) == 2
    assert found.json()["diagnoses"][0]["made in"][0].startswith("https://github.com/")


@pytest.mark.long
def test_the_bug_that_explains_most_heads_the_report_with_its_share(whole, tmp_path):
    found = compare(whole, answer_all(whole, tmp_path / "results", "A turned and reshaped"))
    wrong = sum(case.state == "wrong" for case in found.cases)
    counts = [len(ids) for ids in found.diagnoses.values()]
    assert counts == sorted(counts, reverse=True)
    assert str(found).splitlines()[0].endswith(f"(explains {counts[0]} of {wrong} wrong cases)")
    assert counts[0] > wrong / 2


def test_wrong_cases_without_a_signature_are_no_second_bug_beside_a_named_one(golden, right, results, tmp_path):
    """A setting beside the bug's own, such as two adapters, gives numbers that no signature has."""
    answer_all(golden, tmp_path / "named", "no root")
    verdict = compare(golden, tmp_path / "named")
    rest = [case.id for case in verdict.failing if not case.flags]
    assert rest
    line = f"no signature of one bug fits {', '.join(rest)}: mend what is named first, then look again"
    assert str(verdict).count(line) == 1
    assert "no signature" not in str(compare(golden, right))


def test_a_wrong_base_heads_the_report_whatever_else_is_wrong(golden, right, results, tmp_path):
    found = compare(golden, answer_all(golden, tmp_path / "neighbours", "neighbours"))
    assert sum(case.state == "wrong" for case in found.cases) > 5
    first = str(found).splitlines()[0]
    assert "base-alone: the base is wrong without an adapter" in first
    assert "turns neighbours" in first
    for path in right.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    save_file({"logits": load_file(right / "base-alone.safetensors")["logits"] + 1}, results / "base-alone.safetensors")
    first = str(compare(golden, results)).splitlines()[0]
    assert "base-alone: the base is wrong without an adapter" in first
    assert "off by 1 " in first


def rounded_to_bfloat16(z):
    return (np.asarray(z, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("quantity", ["logits", "merged"])
def test_an_undeclared_cast_is_said_and_passes_where_it_is_declared(golden, index, results, quantity):
    ours = load_file(golden / "answers" / "rslora.safetensors")
    name = next(name for name in ours if name.startswith(quantity))
    array = rounded_to_bfloat16(ours[name])
    path = results / "rslora.safetensors"
    save_file({name: array}, path)
    verdict = judged(golden, results, "rslora")
    assert (verdict.state, verdict.flags) == ("wrong", ())
    assert "as if rounded to " in verdict.text
    assert "declare computed_in" in verdict.text
    save_file({name: array}, path, metadata={"computed_in": "bfloat16"})
    assert judged(golden, results, "rslora").state == "right"
    save_file({name: array + 2}, path)
    assert "as if rounded" not in judged(golden, results, "rslora").text


def test_known_failures_are_strict_both_ways(golden, index, right, tmp_path, capsys):
    results, file = tmp_path / "results", tmp_path / "known.txt"
    results.mkdir()
    for path in right.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    (results / "dora.safetensors").unlink()
    z = load_file(golden / "answers" / "rslora.safetensors")
    z["logits"][:, -1] = z["signature.rslora-root-is-ignored"]
    save_file({"logits": z["logits"]}, results / "rslora.safetensors")
    command = ["golden", str(golden), "--compare", str(results), "--xfails", str(file)]

    def run(text):
        file.write_text(text)
        status = cli.main(command)
        return status, capsys.readouterr().out.splitlines()

    status, lines = run("# what we lack\ndora  not supported yet\nrslora  #17\n")
    assert status == 0
    assert lines[0].endswith(": fails as is known")
    assert any("dora " in line and "missing, as is known (not supported yet)" in line for line in lines)
    assert lines[-1] == "2 of 2 known failures fail as they should"
    status, lines = run("dora  not supported yet\n")
    assert status == 1
    assert "rsLoRA's root is ignored" in lines[0]
    assert lines[-1] == "not known to fail: rslora"
    status, lines = run("rslora  #17\n")
    assert status == 1
    assert lines[0].endswith("WRONG: dora: there is no dora.safetensors")  # what is known does not head the report
    status, lines = run("dora  not yet\nrslora  #17\ntwo-adapters  once\ntwo  a slip\n")
    assert status == 1
    assert lines[-2:] == [
        "two-adapters is known to fail, and is right: take its line out",
        "two is known to fail, and is no case here: take its line out",
    ]
    file.write_text("dora\n")
    assert cli.main(command) == 2  # no reason
    assert cli.main(["golden", str(golden), "--xfails", str(file)]) == 2


@pytest.mark.parametrize("version", [0, FORMAT + 1, "1", None, True])
def test_a_later_format_is_refused_and_nothing_judged(golden, index, tmp_path, version):
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": version}))
    with pytest.raises(FileRefused, match="format is"):
        compare(tmp_path, golden)


def test_a_damaged_answer_is_an_error_of_its_file(golden, results):
    (results / "rslora.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(FileRefused, match=r"rslora\.safetensors"):
        compare(golden, results)


def test_verdicts_never_take_the_place_of_what_is_compared(golden, right, tmp_path, capsys):
    shutil.copytree(golden, tmp_path / "golden")
    shutil.copytree(right, tmp_path / "right")
    for name in ("golden/index.json", "golden/answers/dora.safetensors", "right/dora.safetensors"):
        output, before = tmp_path / name, (tmp_path / name).read_bytes()
        line = ["golden", str(tmp_path / "golden"), "--compare", str(tmp_path / "right"), "--json", str(output)]
        assert cli.main(line) == 2, name
        assert "is a file of what is compared, expected another file" in capsys.readouterr().err
        assert output.read_bytes() == before


def test_verdicts_never_take_the_place_of_the_known_failures(golden, right, tmp_path, capsys):
    (tmp_path / "known").write_text("dora  not yet\n")
    files = ["--xfails", str(tmp_path / "known"), "--json", str(tmp_path / "known")]
    assert cli.main(["golden", str(golden), "--compare", str(right), *files]) == 2
    assert "is the known failures, expected another file" in capsys.readouterr().err
    assert (tmp_path / "known").read_text() == "dora  not yet\n"


def without(name):
    return lambda index: index.pop(name)


def in_a_case(**change):
    def edit(index):
        case = next(case for case in index["cases"] if "answers" in case)
        for name, value in change.items():
            case.pop(name) if value is None else case.update({name: value})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("cases"), "cases is None, expected a list"),
        (lambda index: index.update(cases={}), "cases is {}, expected a list"),
        (lambda index: index.update(cases=[]), "expected a list"),
        (lambda index: index.update(cases=[3]), "a case is 3, expected an object"),
        (without("flags"), "flags is None"),
        (lambda index: index["flags"].update(x={}), "expected an object of bugs"),
        (without("tolerance"), "tolerance is None"),
        (lambda index: index["tolerance"].pop("float16"), "expected a number above 0 for float64"),
        (in_a_case(id=None), "expected one with id, refused"),
        (in_a_case(refused=None), "expected one with id, refused"),
        (in_a_case(flags=None), "expected one with id, refused, answers, flags"),
        (in_a_case(flags=["none-such"]), "names 'none-such', which is not in flags"),
    ],
)
def test_an_index_that_is_none_is_one_clear_error(golden, right, tmp_path, edit, message):
    index = json.loads((golden / "index.json").read_text())
    edit(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileRefused, match=message):
        compare(tmp_path, right)


def test_answers_without_a_bug_s_signature_are_one_clear_error(golden, right, tmp_path):
    shutil.copytree(golden, tmp_path / "golden")
    index = json.loads((golden / "index.json").read_text())
    case = next(case for case in index["cases"] if case.get("flags"))
    file = tmp_path / "golden" / case["answers"]
    arrays = load_file(file)
    del arrays[f"signature.{case['flags'][0]}"]
    save_file(arrays, file)
    with pytest.raises(FileRefused, match=f"there is no 'signature.{case['flags'][0]}'"):
        compare(tmp_path / "golden", right)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 6, 2), "f4"), "log_probabilities": np.zeros((2, 6, 2), "f4")}, "ids has dtype F32"),
        ({"ids": np.zeros((2, 6, 0), "i8"), "log_probabilities": np.zeros((2, 6, 0), "f4")}, r"has shape \[2, 6, 0\]"),
        ({"logits": np.zeros((2, 6, 1_398_102), "f4")}, "expected a tensor of 1 to 67,108,864 bytes"),
    ],
)
def test_answers_that_are_none_are_one_clear_error(golden, tmp_path, arrays, message):
    save_file(arrays, tmp_path / "all-linear.safetensors")
    with pytest.raises(FileRefused, match=message):
        compare(golden, tmp_path)


def test_the_bug_that_explains_most_is_first_and_of_two_the_one_that_the_index_names_first():
    names = {flag: flag.upper() for flag in ("a", "b", "c")}
    cases = [Verdict(str(i), "wrong", flags=flags) for i, flags in enumerate([("c",), ("b", "c"), ("a",), ("b",)])]
    judgement = Judgement("r", cases, names)
    assert judgement.diagnoses == {"b": ["1", "3"], "c": ["0", "1"], "a": ["2"]}
    assert str(judgement).splitlines()[:2] == ["r: WRONG: B (explains 2 of 4 wrong cases)", "4 wrong"]


def test_json_has_all_that_is_known_of_a_case():
    cases = [
        Verdict("x", "right", precision="float16", off=0.25),
        Verdict("y", "wrong", "it is off", ("b",), "float32", 7.5),
        Verdict("z", "missing", "there is no z.safetensors"),
    ]
    judged = Judgement("r", cases, {"b": "B"}, {"b": ["https://b"]}, {"z": "not yet", "x": "once"}).json()
    keys = ("id", "state", "text", "flags", "precision", "off")
    assert judged.pop("cases") == [
        dict(zip(keys, ("x", "right", "", [], "float16", 0.25), strict=True)),
        dict(zip(keys, ("y", "wrong", "it is off", ["b"], "float32", 7.5), strict=True)),
        dict(zip(keys, ("z", "missing", "there is no z.safetensors", [], None, 0.0), strict=True)),
    ]
    assert judged.pop("diagnoses") == [{"flag": "b", "bug": "B", "made in": ["https://b"], "cases": ["y"]}]
    assert judged.pop("minilora")
    assert judged == {
        "format": FORMAT, "results": "r", "passed": False, "status": 1, "known": {"z": "not yet", "x": "once"},
        "unexpected": ["y"], "stale": {"x": "is right"}, "unanswered sessions": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("known", "status"), [({}, 1), ({"y": "#1"}, 0), ({"y": "#1", "x": "#2"}, 1), ({"y": "#1", "no": "#3"}, 1)]
)
def test_a_case_that_passes_or_is_none_may_not_be_known_to_fail(known, status):
    cases = [Verdict("x", "right"), Verdict("y", "wrong", "off")]
    judgement = Judgement("r", cases, known=known)
    assert judgement.status == status
    assert judgement.stale == {id: {"x": "is right", "no": "is no case here"}[id] for id in known if id != "y"}
