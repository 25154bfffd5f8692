"""Readers and engines that share no line with ours: right ones agree, and what is planted in one is named first."""

from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora.conformance.golden.asking import ask
from minilora.conformance.golden.judging import compare_golden

from ...support.sample import one_in
from . import foreign_mixtures
from .conftest import answer_all, as_given, log_softmax, saved
from .living_engine import Engine

READERS = {
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
"""By what the foreign reader is told to get wrong, the flag that the report must put first."""
ENGINES = {
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
    "base rows take the last": "prompts-without-an-adapter-get-the-last-of-the-batch",
    "next of the batch": "each-prompt-of-a-batch-gets-the-next-ones-adapter",
    "the one before of the batch": "each-prompt-of-a-batch-gets-the-adapter-before",
    "swapped without patterns": "patterns-are-dropped-where-an-adapter-is-swapped-in",
    "scale squared": "the-scale-acts-squared",
    "merges in bfloat16": "earlier-requests-leave-rounding",
    "merged and beside": "the-update-is-added-twice",
    "unmerging does nothing": "what-was-added-stays-in-the-weights",
    "unmerged twice": "the-previous-adapter-is-taken-off-twice",
    "responses by prompt": "the-first-adapter-answers-always",
    "loaded is on": "adapters-that-are-loaded-are-applied-to-requests-without-one",
    "loaded last is on": "the-adapter-loaded-last-is-applied-to-requests-without-one",
    "loading adds": "adapters-that-are-loaded-are-applied-to-every-request",
    "base follows": "generated-tokens-are-the-bases",
    "first of the batch follows": "generated-tokens-take-the-first-adapter-of-the-batch",
    "base within": "log-probabilities-within-the-prompt-are-the-bases",
    "no head within": "log-probabilities-within-the-prompt-lack-the-heads-adapter",
    "first of the batch within": "log-probabilities-within-the-prompt-take-the-first-adapter-of-the-batch",
    "late within": "log-probabilities-within-the-prompt-are-one-token-late",
}
"""The same of the living engine."""


def test_a_foreign_reader_agrees_in_every_case(golden, index, right):
    report = compare_golden(golden, right)
    assert report.status == 0, report
    assert [case.id for case in report.cases] == [case["id"] for case in index["cases"]]
    assert max(case.off for case in report.cases) < 1e-6  # of the tolerance: two right programs are much nearer


OF_READERS = READERS | foreign_mixtures.BUGS


@pytest.mark.parametrize(("bug", "flag"), one_in(13, [*OF_READERS.items()], OF_READERS, long=2))
def test_a_foreign_readers_mistake_is_named_first(golden, tmp_path, bug, flag):
    report = compare_golden(golden, answer_all(golden, tmp_path / "results", bug))
    assert report.status == 1
    assert report.first_line.endswith(f"[{flag}]")
    assert report.found[0].flag == flag
    explained = [len(diagnosis.cases) for diagnosis in report.found]
    if "base is wrong" not in report.first_line:
        assert explained == sorted(explained, reverse=True)
    if bug in foreign_mixtures.BUGS:
        assert explained[0] > len(report.failing) / 2


# --- sessions ---------------------------------------------------------------------------------------


def asked(golden, results, bug=None):
    """Return what is said of an engine that answers all sessions, and no case."""
    assert not ask(golden, partial(Engine, bug=bug), results)
    return compare_golden(golden, results)


def test_a_right_engine_passes(golden, index, tmp_path):
    answered = [case for case in asked(golden, tmp_path).cases if case.state != "missing" and "." in case.id]
    assert len(answered) == sum(len(session["requests"]) for session in index["sessions"])
    assert {case.state for case in answered} == {"right"}
    assert max(case.off for case in answered) < 1e-6


@pytest.mark.parametrize(("bug", "flag"), one_in(8, [*ENGINES.items()], ENGINES, long=2))
def test_what_an_engine_keeps_is_named_first(golden, tmp_path, bug, flag):
    report = asked(golden, tmp_path, bug)
    assert report.status == 1
    assert report.found[0].flag == flag, report
    assert report.first_line.endswith(f"[{flag}]")


def test_a_session_is_judged_from_its_first_answer_on(golden, tmp_path):
    def start(base):
        engine = Engine(base)

        def answer(request):
            if request.merged or request.each:
                raise NotImplementedError("it has no means")
            if request.unload or request.generate:
                raise ValueError("it failed")
            return {"logits": engine(request).astype(np.float32)}

        return answer

    errors = ask(golden, start, tmp_path)
    left_out = ["merge-unmerge", "prompt-log-probabilities", "prompt-log-probabilities-head"]
    failed = ["base-beside-adapters.6", *(f"load-unload-load.{n}" for n in (1, 3, 4))]
    assert errors == {
        **dict.fromkeys(left_out, "NotImplementedError: it has no means"),  # also where a request before failed
        **dict.fromkeys([*failed, *(f"generation.{n}" for n in range(4))], "ValueError: it failed"),
    }
    report = compare_golden(golden, tmp_path)
    assert report.not_offered == report.json()["unanswered sessions"]
    assert {*report.not_offered} == {*left_out, "generation"}
    assert {case.id for case in report.cases if case.state == "missing" and "." in case.id} == {*failed}


def test_answers_are_written_however_they_lie_in_memory(golden, index, tmp_path):
    """A file has their bytes row by row, also where a program has its tokens first."""
    answered = []

    def answer(request):
        answered.append(np.arange(len(request.prompts) * 128.0).reshape(128, -1).T)
        return answered[-1]

    assert not ask(golden, lambda base: answer, tmp_path)
    ids = [f"{session['id']}.{n}" for session in index["sessions"] for n, _ in enumerate(session["requests"])]
    for id, z in zip(ids, answered, strict=True):
        np.testing.assert_array_equal(load_file(tmp_path / f"{id}.safetensors")["logits"], z)


def test_answers_after_each_token_are_judged_by_the_last(golden, index, tmp_path):
    """And only there; log-probabilities of some tokens are judged as in a case."""
    session, rng = index["sessions"][0], np.random.default_rng(0)
    for n, request in enumerate(session["requests"]):
        ours = load_file(golden / request["answers"])
        before = rng.standard_normal((len(request["prompts"]), 5, ours["logits"].shape[-1]))
        z = np.concatenate([before, ours["signature.the-previous-adapter-answers" if n == 1 else "logits"][:, None]], 1)
        saved(as_given("all" if n < 2 else "some", z), tmp_path / f"{session['id']}.{n}.safetensors")
    answered = [case for case in compare_golden(golden, tmp_path).cases if "." in case.id]
    assert [case.state for case in answered] == ["right", "wrong", "right", "right"]
    assert "the-previous-adapter-answers" in answered[1].flags


def test_answers_at_each_position_are_judged_at_all(golden, index, tmp_path):
    """By logits, or by log-probabilities of all tokens or of the prompt's own, as engines give them."""
    (session,) = [session for session in index["sessions"] if session["id"] == "prompt-log-probabilities-head"]
    head, flag = session["requests"][1], "log-probabilities-within-the-prompt-lack-the-heads-adapter"
    ours, own = load_file(golden / head["answers"]), np.array(head["prompts"])[:, 1:, None]
    path = tmp_path / f"{session['id']}.1.safetensors"

    def outcome(tensors):
        saved(tensors, path)
        return next(case for case in compare_golden(golden, tmp_path).cases if case.id == path.stem)

    for name, state, flags in (("each.logits", "right", ()), (f"each.signature.{flag}", "wrong", (flag,))):
        z = ours[name].astype(np.float64)
        chosen = {"log_probabilities": np.take_along_axis(log_softmax(z), own, -1), "ids": own}
        for tensors in (as_given("all", z), as_given("probabilities", z), chosen):
            found = outcome(tensors)
            assert (found.state, found.flags) == (state, flags), found
    z = ours["each.logits"].copy()
    z[:, 2] += 1
    assert outcome({"logits": z}).text.endswith("; right up to position 1")
    assert outcome({"logits": z[:, -1]}).text == "logits has shape (2, 128), expected (2, 9, 128)"


@pytest.mark.parametrize(
    ("times", "named"), [(2, False), (9, False), (11, True), (50, True), (29_000, True), (31_000, False)]
)
def test_rounding_is_far_off_and_within_the_lowest_precision(golden, index, tmp_path, times, named):
    """By more than ten tolerances of float64, and at most the widest, 30,000 of them; a request before was right."""
    session, tolerance = index["sessions"][0], index["tolerance"]["float64"]
    for n in range(2):
        z = load_file(golden / session["requests"][n]["answers"])["logits"].astype("f8")
        save_file({"logits": z + n * times * tolerance}, tmp_path / f"{session['id']}.{n}.safetensors")
    report = compare_golden(golden, tmp_path)
    found = next(case for case in report.cases if case.id == f"{session['id']}.1")
    assert found.flags == (("earlier-requests-leave-rounding",) if named else ())
    assert [diagnosis.flag for diagnosis in report.found] == [*found.flags]
    (tmp_path / f"{session['id']}.0.safetensors").unlink()
    assert not compare_golden(golden, tmp_path).found


def test_rounding_that_explains_most_is_named_first(golden, index, tmp_path):
    session = index["sessions"][0]
    for n, request in enumerate(session["requests"]):
        ours = load_file(golden / request["answers"])
        z = ours["signature.the-previous-adapter-answers" if n == 1 else "logits"] + (0.01 if n > 1 else 0)
        save_file({"logits": z}, tmp_path / f"{session['id']}.{n}.safetensors")
    found = compare_golden(golden, tmp_path).found
    assert [len(diagnosis.cases) for diagnosis in found] == [2, 1]
    assert found[0].flag == "earlier-requests-leave-rounding"
