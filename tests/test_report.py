"""A report: its verdict and first line, what is known to fail, strict both ways, and what programs read."""

import os
from types import SimpleNamespace

import pytest

from minilora.conformance import check
from minilora.conformance.checking.kindreport import KindReport, outcome
from minilora.report import (
    Diagnosis,
    Outcome,
    Report,
    check_replaced,
    github_error,
    links,
    read_known,
    save_json,
)
from minilora.texts import FileRefused

from .conformance.implementations import OURS, with_kinds


def report(known=(), **more):
    """Two of six cases fail, one without an answer; one mistake explains the other."""
    states = {"a": "right", "b": "wrong", "c": "missing", "d": "not offered", "e": "refused", "f": "cannot be told"}
    cases = [Outcome(id, state, "off by 1" if state == "wrong" else "") for id, state in states.items()]
    found = [Diagnosis("B is turned", "b-is-turned", "me/mine #3", ("b",))]
    return Report("mine", cases=cases, **{"found": found, "known": dict.fromkeys(known, "a reason")} | more)


STALE = {"a": "passes", "d": "is not offered", "e": "is refused", "f": "cannot be told", "x": "is no case here"}


@pytest.mark.parametrize(
    ("known", "first", "rest"),
    [
        ([], "WRONG: B is turned (made in me/mine #3) [b-is-turned]", []),
        (["b", "c"], "fails as is known: 1 right, 1 wrong, 1 missing, 1 refused",
         ["2 of 2 known failures fail as they should"]),
        (["b"], "WRONG: 1 of 3 cases have no answer", ["1 of 1 known failures fail as they should",
                                                       "not known to fail: c"]),
        *((["b", "c", id], f"WRONG: {id} is known to fail, and {what}: take its line out",
           ["2 of 3 known failures fail as they should", f"{id} is known to fail, and {what}: take its line out"])
          for id, what in STALE.items()),
    ],
)  # fmt: skip
def test_known_failures_are_strict_both_ways(known, first, rest):
    found = report(known)
    verdict = first.partition(":")[0]
    assert (found.verdict, found.status) == (verdict, int(verdict == "WRONG"))
    lines = str(found).splitlines()
    assert lines[0] == found.first_line == f"mine: {first}"
    assert [line for line in lines[1:] if "known failures" in line or "known to fail" in line] == rest


def test_known_failures_have_an_id_and_a_reason_a_line(tmp_path):
    file = tmp_path / "known.txt"
    file.write_text(
        "\ufeff# ours\n\nlinear-6-forward  rank 1: issue 12 # stays\n\tconv2d-2-slope\tdilation\r\n", encoding="utf-8"
    )
    assert read_known(file) == {"linear-6-forward": "rank 1: issue 12 # stays", "conv2d-2-slope": "dilation"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a  reason\nlinear-6-forward\n", "line 2: expected an id and a reason, got 'linear-6-forward'"),
        (b"a  one\n\na  two\n", "line 3: 'a' stands there twice"),
        (b"\xff\xfe", "it is no text in UTF-8"),
    ],
)
def test_an_unsound_file_of_known_failures_is_refused(tmp_path, content, said):
    file = tmp_path / "known.txt"
    file.write_bytes(content)
    with pytest.raises(FileRefused) as refused:
        read_known(file)
    assert str(refused.value).endswith(said)


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
    absent = {text.partition(": ")[2] for text in report.json()["not offered"] if text.startswith("rslora: ")}
    assert {"slope", "start"} <= absent
    assert "adam" not in absent
    report.require(required)
    assert repr(report) == str(report)  # at a prompt
    assert report.missing == missing
    assert (report.verdict, report.status) == (("WRONG", 1) if missing else ("passed", 0))
    said = [line for line in str(report).splitlines()[1:] if "required" in line]
    assert said == [f"{text} is required, and not offered" for text in missing]


@pytest.mark.parametrize("content", ["mine", "[]", "{}", '{"format": 2}', '{"verdict": "passed"}'])
def test_a_report_takes_the_place_of_nothing_else(tmp_path, content):
    file = tmp_path / "found.json"
    check_replaced(file)  # which is new
    save_json(file, report())
    check_replaced(file)
    file.write_text(content)
    with pytest.raises(ValueError) as refused:
        check_replaced(file)
    assert str(refused.value) == f"--json {str(file)!r} is there already and has no report, expected another file"
    assert file.read_text() == content


def test_annotations_tell_what_is_not_known():
    title = "::error title=minilora conformance::"
    assert report(["b", "c"]).annotations() == []
    assert report().annotations() == [f"{title}mine: B is turned (made in me/mine #3)"]
    assert report(["b"]).annotations() == [f"{title}mine: WRONG: 1 of 3 cases have no answer"]
    assert report(["c"], found=[]).annotations() == [f"{title}mine: WRONG: b: off by 1"]
    assert report(["b", "c", "a"]).annotations() == [f"{title}a is known to fail, and passes: take its line out"]
    assert github_error("50 %\nof\r it", "minilora audit") == "::error title=minilora audit::50 %25%0Aof%0D it"


def test_what_is_known_is_told_last():
    found = report(["b"], found=[Diagnosis("old", "old", cases=("b",)), Diagnosis("new", "new", cases=("c", "g"))])
    found.cases.append(Outcome("g", "wrong"))
    assert found.first_line == "mine: WRONG: new [new]"
    assert str(found).splitlines()[1] == "  old [old] (explains 1 of 2 wrong cases, known)"
    assert [diagnosis["flag"] for diagnosis in found.json()["diagnoses"]] == ["new", "old"]


def test_a_diagnosis_within_the_words_of_another_has_its_line():
    found = [Diagnosis("B is turned twice", "turned-twice", cases=("c",)), Diagnosis("B is turned", "turned")]
    assert str(report(found=found)).splitlines()[1] == "  B is turned [turned]"


def test_a_stale_line_is_not_said_beside_its_case():
    assert report(["a", "b"]).shown(all=True).splitlines()[3:5] == [
        "  a  right",
        "  b  wrong, as is known (a reason): off by 1",
    ]


def test_lines_stay_where_nothing_is_said_at_length():
    shown = [report(lines=["in short"], rows=rows).shown(all=True) for rows in ([], ["at length"])]
    assert [("in short" in text, "at length" in text) for text in shown] == [(True, False), (False, True)]


@pytest.mark.parametrize("count", [5, 6])
def test_up_to_five_cases_without_an_answer_have_rows(count):
    lines = Report("mine", cases=[Outcome(f"c{i}", "missing", "no file") for i in range(count)]).own_lines(all=False)
    rows = [f"  c{i}  missing: no file" for i in range(5)]
    assert lines == [f"{count} missing", *(rows if count == 5 else ["  missing: c0, c1, c2, c3, c4 and 1 more"])]


def test_a_kind_of_which_a_part_is_known_is_wrong():
    found = KindReport("mine", cases=[outcome(id, "forward", "", "off by 1") for id in "ab"])
    words = [found.block(known, all=False)[0].partition(",")[0] for known in ("", "a", "ab")]
    assert words == ["linear: WRONG", "linear: WRONG", "linear: fails as is known"]


def test_a_report_says_what_it_was_made_with():
    found, of_libraries = report().json(), pytest.importorskip("threadpoolctl").threadpool_info()
    assert found["kernel"] in [library["architecture"] for library in of_libraries if "architecture" in library]
    assert set(found["versions"]) == {"minilora", "numpy", "python"}


def test_a_verdict_without_a_text_stands_alone():
    assert str(Report("mine", word="SUSPICIOUS")) == "mine: SUSPICIOUS"


REASON = "6 of 6 modules cannot be compared: {}: it is for 4 experts, and the model has 3"
LONG = "a" * 30 + " " + "b" * 90
FIRST_LINES = [  # a report's name and its text, and what stands for both in the first line
    ("mine", REASON.format("'x'"), "mine", REASON.format("'x'")),
    ("mine", REASON.format(f"'/home/me and you/{LONG}/x'"), "mine", REASON.format("'x'")),
    ("mine", REASON.format(f"'../{'c' * 80}/x'"), "mine", REASON.format("'x'")),
    (LONG, REASON.format("'/x/y'"), f"{'a' * 17} ... {'b' * 17}", REASON.format("'/x/y'")),
    (LONG, REASON.format(f"'/{LONG}/x'"), f"{'a' * 17} ... {'b' * 17}", REASON.format("'x'")),
    (LONG, "it is empty", LONG, "it is empty"),
    ("mine", "v" * 134, "mine", "v" * 134),  # as long as a line may be
    ("mine", f"'q/k' is not {'v ' * 80}", "mine", f"'k' is not {' '.join('v' * 60)}..."),
]


@pytest.mark.parametrize(("name", "text", "named", "said"), FIRST_LINES)
def test_a_long_name_or_path_does_not_cost_the_reason(name, text, named, said):
    found = Report(name, word="UNDECIDED", text=text, flag="a-flag")
    assert found.first_line == f"{named}: UNDECIDED: {said} [a-flag]"
    assert len(found.first_line) <= 160
    assert found.json()["text"] == text


def test_an_address_is_made_of_each_source():
    assert links("") == []
    assert links("me/mine #3, peft 0.17.0, https://x.org/y") == [
        "https://github.com/me/mine/issues/3",
        "https://pypi.org/project/peft/0.17.0/",
        "https://x.org/y",
    ]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_a_report_that_finds_no_place_leaves_the_old_one(tmp_path):
    import resource

    (tmp_path / "r.json").write_text("{}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_json(tmp_path / "r.json", report(text="x" * 20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.json", "{}")]
