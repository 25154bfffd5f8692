"""Sessions: right engines pass, and what an engine keeps from one request to the next is named."""

import json
from functools import partial

import pytest
from safetensors.numpy import load_file, save_file

from minilora.conformance.golden.asking import ask
from minilora.conformance.golden.judging import compare

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


@pytest.mark.parametrize("bug", PLANTED)
def test_what_an_engine_keeps_is_named_first(alone, tmp_path, bug):
    verdict = judged(alone, tmp_path, bug)
    assert not verdict.passed
    assert next(iter(verdict.diagnoses)) == PLANTED[bug], verdict
    assert verdict.names[PLANTED[bug]] in str(verdict).splitlines()[0]
