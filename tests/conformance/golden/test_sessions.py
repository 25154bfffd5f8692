"""Sessions: right engines pass, and what an engine keeps from one request to the next is named."""

import json
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora.checks import FileRefused
from minilora.conformance.golden.asking import ask
from minilora.conformance.golden.judging import compare
from minilora.conformance.golden.leftovers import LEFTOVERS

from .living_engine import Engine

PLANTED = {
    "prefixes by tokens": "keys-and-values-are-the-first-requests",
    "prefixes by name": "keys-and-values-are-those-of-the-name",
    "weights by name": "the-adapter-that-had-this-name-answers",
    "old alpha": "the-scaling-is-that-of-the-adapter-that-had-this-name",
    "old modules stay": "modules-of-the-adapter-that-had-this-name-stay-on",
    "never switched off": "what-was-added-stays-in-the-weights",
    "added on loading": "what-was-added-stays-in-the-weights",
    "unloading takes off": "the-previous-adapter-is-taken-off-twice",
    "compiled": "the-first-adapter-answers-always",
    "no scale": "the-scale-is-ignored",
    "scale sticks": "the-first-scale-stays",
    "scale of before": "the-scale-of-the-request-before-stays",
    "scale adds up": "the-scales-of-requests-are-multiplied",
    "first of the batch": "the-first-adapter-of-a-batch-is-taken-for-all",
    "last of the batch": "the-last-adapter-of-a-batch-is-taken-for-all",
    "batch sorted": "the-adapters-of-a-batch-are-sorted-and-its-prompts-are-not",
    "answers sorted": "the-answers-of-a-batch-are-sorted-by-their-adapters",
    "base rows take slot 0": "prompts-without-an-adapter-get-the-first-of-the-batch",
    "merges in bfloat16": "earlier-requests-leave-rounding",
    "merged and beside": "the-update-is-added-twice",
    "unmerging does nothing": "what-was-added-stays-in-the-weights",
    "unmerged twice": "the-previous-adapter-is-taken-off-twice",
    "responses by prompt": "the-first-adapter-answers-always",
}


@pytest.fixture(scope="module")
def alone(golden, index, tmp_path_factory):
    """The golden adapters with their sessions and one case."""
    folder = tmp_path_factory.mktemp("sessions") / "golden"
    folder.mkdir()
    for name in ("bases", "adapters", "answers"):
        (folder / name).symlink_to(golden / name)
    first = next(case for case in index["cases"] if case["id"] == "base-alone")
    (folder / "index.json").write_text(json.dumps({**index, "cases": [first]}))
    return folder


def judged(folder, results, bug):
    errors = ask(folder, partial(Engine, bug=bug), results)
    assert not errors
    case = json.loads((folder / "index.json").read_text())["cases"][0]
    save_file({"logits": load_file(folder / case["answers"])["logits"]}, results / f"{case['id']}.safetensors")
    return compare(folder, results)


def test_a_right_engine_passes(alone, index, tmp_path):
    verdict = judged(alone, tmp_path, None)
    assert verdict.passed, verdict
    assert len(verdict.cases) == 1 + sum(len(session["requests"]) for session in index["sessions"])
    assert max(case.off for case in verdict.cases) < 1e-6


QUICK = ("prefixes by tokens", "weights by name", "merges in bfloat16")
BUGS = [bug if bug in QUICK else pytest.param(bug, marks=pytest.mark.long) for bug in PLANTED]


@pytest.mark.parametrize("bug", BUGS)
def test_what_an_engine_keeps_is_named_first(alone, tmp_path, bug):
    verdict = judged(alone, tmp_path, bug)
    assert not verdict.passed
    assert next(iter(verdict.diagnoses)) == PLANTED[bug], verdict
    assert verdict.names[PLANTED[bug]] in str(verdict).splitlines()[0]


def test_a_session_without_an_answer_is_not_judged_and_one_that_began_is(alone, index, tmp_path):
    def start(base):
        engine = Engine(base)

        def answer(request):
            if request.merged:
                raise NotImplementedError("it merges nothing")
            if request.unload:
                raise ValueError("it unloads nothing")
            return {"logits": engine(request).astype(np.float32)}

        return answer

    errors = ask(alone, start, tmp_path)
    assert errors == {
        "load-unload-load.1": "ValueError: it unloads nothing",
        "load-unload-load.3": "ValueError: it unloads nothing",
        "load-unload-load.4": "ValueError: it unloads nothing",
        "merge-unmerge": "NotImplementedError: it merges nothing",
    }
    verdict = compare(alone, tmp_path)
    assert verdict.unanswered == ["merge-unmerge"]
    states = {case.id: case.state for case in verdict.cases}
    assert [id for id, state in states.items() if state == "missing"] == ["base-alone", *list(errors)[:-1]]
    assert "which are not judged: merge-unmerge" in str(verdict)
    assert verdict.json()["unanswered sessions"] == ["merge-unmerge"]


def test_answers_after_each_token_are_judged_by_the_last(alone, index, tmp_path):
    """And only there; log-probabilities of some tokens are judged as in a case."""
    session = index["sessions"][0]
    rng = np.random.default_rng(0)
    for n, request in enumerate(session["requests"]):
        ours = load_file(alone / request["answers"])
        before = rng.standard_normal((len(request["prompts"]), 5, ours["logits"].shape[-1]))
        z = np.concatenate([before, ours["signature.the-previous-adapter-answers" if n == 1 else "logits"][:, None]], 1)
        ids = np.argsort(-z, axis=-1)[..., :7].copy()
        p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        tensors = {"logits": z} if n < 2 else {"log_probabilities": np.take_along_axis(p, ids, -1), "ids": ids}
        save_file(tensors, tmp_path / f"{session['id']}.{n}.safetensors")
    verdict = compare(alone, tmp_path)
    assert [case.state for case in verdict.cases[1:]] == ["right", "wrong", "right", "right"]
    assert "the-previous-adapter-answers" in verdict.cases[2].flags


def test_bugs_of_a_request_give_the_same_numbers_or_lie_ten_tolerances_apart(alone, index):
    shown = set()
    for session in index["sessions"]:
        for request in session["requests"]:
            ours = load_file(alone / request["answers"])
            numbers = [ours["logits"], *(ours[f"signature.{flag}"] for flag in request["flags"])]
            for i, one in enumerate(numbers):
                offs = [np.abs(one - other).max() for other in numbers[:i]]
                assert all(off >= 0.999 * index["apart"] or (j > 0 and off < 1e-4) for j, off in enumerate(offs))
            last = np.sort(ours["logits"], axis=-1)
            assert (last[:, -1] - last[:, -2]).min() > 2 * index["tolerance"]["bfloat16"]
            np.testing.assert_array_equal(ours["next_tokens"], ours["logits"].argmax(axis=-1))
            shown.update(request["flags"])
    assert shown == {bug.flag for bug in LEFTOVERS}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sessions: {}, "expected a list of sessions"),
        (lambda sessions: [{"id": "x"}], "expected a list of sessions"),
        (lambda sessions: [{"id": "x", "requests": [3]}], "a request of 'x' is 3"),
        (lambda sessions: [{"id": "x", "requests": [{"answers": "y", "flags": ["z"]}]}], "known flags"),
    ],
)
def test_sessions_that_are_none_are_refused(alone, index, tmp_path, change, said):
    (tmp_path / "index.json").write_text(json.dumps({**index, "sessions": change(index["sessions"])}))
    (tmp_path / "results").mkdir()
    with pytest.raises(FileRefused, match=said):
        compare(tmp_path, tmp_path / "results")


def test_an_index_without_sessions_is_judged_as_before(alone, index, tmp_path):
    older = {key: value for key, value in index.items() if key != "sessions"}
    (tmp_path / "index.json").write_text(json.dumps({**older, "cases": index["cases"][-1:]}))
    (tmp_path / "results").mkdir()
    assert not compare(tmp_path, tmp_path / "results").unanswered
