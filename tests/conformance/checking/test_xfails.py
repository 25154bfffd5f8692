"""Known failures: the file is strict both ways, and the same ids stand in it, in JSON and in pytest's names."""

import json
from types import SimpleNamespace

import pytest

from minilora.checks import FileRefused
from minilora.conformance import check
from minilora.conformance.checking.xfails import Judged, github_error, read

from ..implementations import OURS, implementation, with_kinds

LINEAR = vars(OURS["linear"])


def wrong_at_rank_1(x, weight, bias, A, *more):
    return LINEAR["forward"](x, weight, bias, A, *more) + (len(A) == 1)


WRONG = check(implementation(forward=wrong_at_rank_1), name="mine")
ID = "linear-6-forward"


def test_a_file_has_an_id_and_a_reason_a_line(tmp_path):
    file = tmp_path / "known.txt"
    file.write_text(
        "\ufeff# ours\n\nlinear-6-forward  rank 1: issue 12 # stays\n\tconv2d-2-slope\tdilation\r\n", encoding="utf-8"
    )
    assert read(file) == {"linear-6-forward": "rank 1: issue 12 # stays", "conv2d-2-slope": "dilation"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a  reason\nlinear-6-forward\n", "line 2: expected an id and a reason, got 'linear-6-forward'"),
        (b"a  one\n\na  two\n", "line 3: 'a' stands there twice"),
        (b"\xff\xfe", "it is no text in UTF-8"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(tmp_path, content, said):
    file = tmp_path / "known.txt"
    file.write_bytes(content)
    with pytest.raises(FileRefused) as refused:
        read(file)
    assert str(refused.value).endswith(said)


@pytest.mark.parametrize(
    ("known", "status", "said"),
    [
        ([], 1, "mine: WRONG, in float64"),
        ([ID], 0, "1 of 1 known failures fail as they should"),
        ([ID, "linear-5-forward"], 1, "linear-5-forward is known to fail, and passes: take its line out"),
        ([ID, "linear-99-forward"], 1, "linear-99-forward is known to fail, and is no case here: take its line out"),
        (["linear-5-forward"], 1, f"not known to fail: {ID}"),
    ],
)
def test_known_failures_are_strict_both_ways(known, status, said):
    judged = Judged(WRONG, dict.fromkeys(known, "a reason"))
    assert judged.status == status
    assert said in str(judged)
    assert ("fails as is known" in str(judged)) is (ID in known)
    assert ("WRONG" in str(judged)) is (ID not in known)


def test_what_is_not_offered_cannot_be_known_to_fail():
    judged = Judged(check(SimpleNamespace(forward=LINEAR["forward"])), {"linear-0-slope": "a reason"})
    assert judged.status == 1
    assert judged.stale == {"linear-0-slope": "is not offered"}


@pytest.mark.parametrize(
    ("required", "missing"),
    [
        ([], []),
        (["forward", "slope", "merge"], ["rslora: slope", "rslora: merge"]),
        (["adam"], []),  # of the linear layer alone
        (["start"], ["rslora: start"]),
        (["codes"], ["codes"]),  # of a kind that is not there
        (["forward", "output dtype"], ["output dtype"]),
    ],
)
def test_a_claim_that_is_required_must_be_offered(required, missing):
    report = check(with_kinds(rslora=SimpleNamespace(forward=OURS["rslora"].forward)))
    assert report.passed
    judged = Judged(report, {}, required)
    assert judged.missing == missing
    assert judged.status == bool(missing)
    assert [line for line in str(judged).splitlines() if "required" in line] == [
        f"{text} is required, and not offered" for text in missing
    ]


def test_a_claim_is_required_of_the_kinds_that_have_it():
    """Slots have no start of their own."""
    judged = Judged(check(with_kinds(**OURS)), {}, ["start", "codes", "output dtype"])
    assert judged.missing == []


def test_json_says_what_fails_and_what_is_known():
    found = Judged(WRONG, {ID: "rank 1", "linear-0-merge": "gone"}).as_dict()
    assert json.loads(json.dumps(found)) == {
        "status": 1,
        "failing": [ID],
        "unexpected": [],
        "known": {ID: "rank 1", "linear-0-merge": "gone"},
        "stale": {"linear-0-merge": "passes"},
        "missing": [],
    }


def test_annotations_tell_what_is_not_known():
    assert Judged(WRONG, {ID: "rank 1"}).annotations() == []
    (text,) = Judged(WRONG).annotations()
    assert text == f"mine: {WRONG.diagnoses[0]}"
    stale = Judged(WRONG, {ID: "rank 1", "linear-0-merge": "gone"}).annotations()
    assert stale == ["linear-0-merge is known to fail, and passes: take its line out"]


def test_an_annotation_is_one_line():
    assert github_error("50 %\nof\r it") == "::error title=minilora conformance::50 %25%0Aof%0D it"


def test_what_is_known_is_marked_and_comes_after_what_is_new():
    embedding = {**vars(OURS["embedding"])}
    forward = embedding["forward"]
    embedding["forward"] = lambda *arrays: forward(*arrays) + 1
    linear = SimpleNamespace(**LINEAR | {"forward": wrong_at_rank_1})
    report = check(with_kinds(linear=linear, embedding=SimpleNamespace(**embedding)))
    lines = report.text([ID]).splitlines()
    assert lines[0].startswith("embedding: ")
    assert not lines[0].endswith(" (known)")
    assert any(line.endswith(" (known)") for line in lines[1:])
    assert not any(line.endswith(" (known)") for line in report.text().splitlines())
