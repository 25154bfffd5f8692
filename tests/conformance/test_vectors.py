"""Test vectors: the contents of the files, and the reports on programs that answer them."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import __version__, cli
from minilora.conformance import CannotRun, vectors
from minilora.conformance.problems.bugs import BUGS, bugs_of
from minilora.conformance.problems.tolerance import round_to
from minilora.files.dtypes import FLOATS
from minilora.report import links

from .implementations import OURS, dora_init, full_norm, functions_of, step

C = Path(__file__).parents[2] / "examples" / "conformance" / "lora.c"
FULL = {**OURS, "dora-full": functions_of(full_norm, init=dora_init)}
del FULL["combine"]  # the bits of its singular vectors depend on the machine


BITS = {
    "adam": "b959902ee580534d",
    "conv1d": "c6f81ce98f1771f2",
    "conv2d": "ac3c9276c9f78b3a",
    "dora": "1bfac17854217680",
    "dora-full": "82a1af7690f0040f",
    "dropout": "7c2d2d9009d58538",
    "embedding": "c0feef24b90b9b87",
    "experts": "630e496497c46137",
    "fused": "79837dd67b003db3",
    "linear": "aca3c019f1c8a8fe",
    "rslora": "57377767542d576c",
    "mixed": "b57783a5e0903a77",
    "nf4": "2c203730fb04c533",
}
"""The first half of the sha256 of each kind's files: one version writes the same bits on every machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write all vectors, but with flags for only a few of them, since finding the bugs that a case catches is slow."""
    made, flags = tmp_path_factory.mktemp("vectors") / "made", vectors.Vector.flags
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vectors.Vector, "flags", lambda vector: flags(vector) if vector in vectors.STARTER[:8] else [])
        assert vectors.write(made) == len(vectors.VECTORS)
    return made


@pytest.fixture
def compared(folder, tmp_path):
    """Return a function that judges answers, keyed by file name without suffix: it returns a report per precision."""

    def compare(answers, against=folder):
        (mine := tmp_path / "mine").mkdir(exist_ok=True)
        for name, arrays in answers.items():
            save_file({key: np.array(a, order="C") for key, a in arrays.items()}, mine / f"{name}.safetensors")
        return vectors.compare(against, mine).precisions

    return compare


def index_of(folder):
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def answer(folder, name):
    """Return the answers of the library's own layers to a case, read from nothing but its file."""
    p, kind = load_file(folder / f"{name}.safetensors"), name.removeprefix("half-").rsplit("-", 2)[0]
    if kind == "adam":
        return of_adam(p)
    if kind == "fused":
        return of_slots(p)
    base = [p["packed"], p["absmax"]] if kind == "nf4" else [p["weight"]]
    bias = [] if kind == "experts" else [p.get("bias")]
    adapter = [p["lora_A"], p["lora_B"], float(p["alpha"][0])]
    of_rows = [p[name] for name in ("mask", "expert_ids") if name in p]
    more = [p["magnitude"]] if "magnitude" in p else []
    steps = {name: tuple(map(int, p[name])) for name in ("stride", "padding", "dilation") if name in p}
    nested = {"nested_absmax": p["nested_absmax"], "mean": float(p["mean"][0])} if "mean" in p else {}
    functions, layer = FULL[kind], [*base, *bias, *adapter, *more, *of_rows]
    grads = functions.backward(p["dy"], p["x"], *layer, **steps, **nested)
    found = {
        "y": functions.forward(p["x"], *layer, **steps, **nested),
        "merged": functions.merge(*base, *adapter, *more, **nested),
    }
    found |= {name: grads[of] for name, of in vectors.ANSWER_NAMES.items() if grads.get(of) is not None}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def of_slots(p):
    """Return the answers to a case with slots, whose factors are numbered."""
    widths, functions = list(map(int, p["widths"])), OURS["fused"]
    A, B = ([p.get(f"{name}.{i}") for i in range(len(widths))] for name in ("lora_A", "lora_B"))
    slots = [A, B, list(map(float, p["alpha"])), widths]
    grads = functions.backward(p["dy"], p["x"], p["weight"], p.get("bias"), *slots)
    found = {"y": functions.forward(p["x"], p["weight"], p.get("bias"), *slots), "dx": grads["x"]}
    found["merged"] = functions.merge(p["weight"], *slots)
    for name, of in (("dA", "lora_A"), ("dB", "lora_B")):
        found |= {f"{name}.{i}": grad for i, grad in enumerate(grads[of]) if grad is not None}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def of_adam(p):
    params, state = {"lora_A": p["begin_A"], "lora_B": p["begin_B"]}, None
    for A, B in zip(p["grads_A"], p["grads_B"], strict=True):
        params, state = step(params, {"lora_A": A, "lora_B": B}, state)
    return {"end_A": params["lora_A"], "end_B": params["lora_B"]}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Write the answers to every case without groups, which this library's convolutions do not support."""
    made = tmp_path_factory.mktemp("results")
    for case in index_of(folder)["cases"]:
        if "groups=1" in case["sizes"] or "groups" not in case["sizes"]:
            save_file(answer(folder, case["file"].removesuffix(".safetensors")), made / case["file"])
    return made


@pytest.mark.long
def test_our_own_answers_to_every_case_pass(folder, results):
    whole = vectors.compare(folder, results)
    assert repr(whole) == str(whole)
    reports = whole.precisions
    assert [report.dtype for report in reports] == ["float64", "float32", "float16", "bfloat16"]
    for report in reports:
        assert report.passed, str(report)
        single, half = report.dtype == "float32", report.dtype.endswith("16")
        assert set(report.kinds) == set(FULL) - {"linear"} - (set() if single else {"nf4", "mixed"})
        assert report.claims.get("adam") == (None if half else "ok")
        assert report.habits["cases answered"] == ("13 of 13" if half else "15 of 15")
        for one in (report, *report.kinds.values()):
            assert one.claims["forward"] == one.claims["slope"] == one.claims["merge"] == "ok"
    index = index_of(folder)
    for case in (case for case in index["cases"] if case["kind"] != "adam" and (results / case["file"]).exists()):
        right = load_file(folder / case["file"])
        for name, array in load_file(results / case["file"]).items():  # a program can judge itself from the files
            allowed = index["tolerance"][case["dtype"]] * right[f"size.{name}"]
            assert (np.abs(array - right[name]) <= allowed).all(), (case["file"], name)


# --- the files ------------------------------------------------------------------------------------


def test_the_files_of_each_kind_have_the_same_bits(folder):
    found = {kind: hashlib.sha256() for kind in BITS}
    kinds = {case["file"]: case["kind"] for case in index_of(folder)["cases"]}
    assert kinds.keys() == {file.name for file in folder.iterdir()} - {"index.json"}
    for name in sorted(kinds):
        found[kinds[name]].update((folder / name).read_bytes())
    assert {kind: whole.hexdigest()[:16] for kind, whole in found.items()} == BITS


def test_the_index_has_one_line_for_each_entry(folder):
    text, things = (folder / "index.json").read_text(encoding="utf-8"), []
    for value in index_of(folder).values():
        pairs = value.items() if isinstance(value, dict) else ()
        things += [f"{json.dumps(key)}: {json.dumps(of)}" for key, of in pairs]
        things += map(json.dumps, value if isinstance(value, list) else ())
    assert [line.strip().rstrip(",") for line in text.splitlines() if line.startswith("  ")] == things
    rest = {line for line in text.splitlines() if not re.match('  | "', line)}
    assert rest == {"{", " ],", " },", " }", "}"}
    assert text.endswith("\n }\n}\n")
    assert index_of(folder)["minilora"] == __version__


@pytest.mark.long
def test_every_numeric_bug_is_caught_by_a_case(tmp_path):
    vectors.write(tmp_path / "made")
    index = index_of(tmp_path / "made")
    assert {flag for case in index["cases"] for flag in case["flags"]} == set(index["flags"])
    for bug in BUGS:
        if bug.flag in index["flags"]:
            assert index["flags"][bug.flag] == {"bug": bug.says, "breaks": bug.breaks, "made in": links(bug.source)}
        elif bug.kinds != ("combine",) and bug.breaks not in (
            "start",
            "alpha of 0",
            "row of zeros",
            "output dtype",
            "codes",
        ):
            trial = vectors.Vector(bug.kinds[0], 0, "float64").trial()  # the bug omits a gradient, as answers may
            assert len(trial.answer(**bug.replaced_in(trial.problem))) < len(trial.right)


def test_a_flag_is_a_bug_that_the_case_catches(folder):
    flags = {case["file"]: case["flags"] for case in index_of(folder)["cases"]}
    square, other = flags["linear-3-float64.safetensors"], flags["linear-0-float64.safetensors"]
    assert {*square, *other} <= {bug.flag for bug in bugs_of("linear")}
    assert "merge-adds-the-change-transposed" in square
    assert "merge-adds-the-change-transposed" not in other
    assert "the-output-lacks-the-bias" in other
    assert "the-output-lacks-the-bias" not in flags["linear-1-float64.safetensors"]
    assert index_of(folder)["flags"]["dx-lacks-dy-w"] == {
        "bug": "dx lacks dy W: the base passes no gradient, as under torch.no_grad()",
        "breaks": "slope",
        "made in": ["https://pypi.org/project/lora-pytorch/0.2.0/"],
    }


def test_only_the_selected_vectors_are_written(tmp_path, capsys):
    assert cli.main(["vectors", str(tmp_path / "starter"), "--starter"]) == 0
    assert cli.main(["vectors", str(tmp_path / "two"), "--kind", "conv1d,adam", "--kind", "nf4"]) == 0
    first, second = index_of(tmp_path / "starter"), index_of(tmp_path / "two")
    assert [case["file"] for case in first["cases"]] == [
        f"linear-{number}-{dtype}.safetensors" for number in range(7) for dtype in ("float64", "float32")
    ]
    assert {case["kind"] for case in second["cases"]} == {"conv1d", "nf4", "adam"}
    of_adam = [bug.flag for bug in BUGS if bug.breaks == "adam"]
    assert [case["flags"] for case in second["cases"] if case["kind"] == "adam"] == [of_adam, of_adam]
    for made, index in (("starter", first), ("two", second)):
        there = {file.name for file in (tmp_path / made).iterdir()}
        assert there == {"index.json", *(case["file"] for case in index["cases"])}
        assert {flag for case in index["cases"] for flag in case["flags"]} == set(index["flags"])
    capsys.readouterr()
    (tmp_path / "link").symlink_to("nowhere")
    for given, said in (
        (["none", "--kind", "linear,none"], "--kind: unknown kind 'none', expected linear, rslora, dora, "),
        (["two", "--compare", "starter", "--starter"], "select what is written, so they cannot be used with --compare"),
        (
            ["two", "--compare", "starter", "--kind", "nf4"],
            "select what is written, so they cannot be used with --comp",
        ),
        (["none", "--json", "found.json"], "--json needs --compare: without it there are no verdicts"),
        (["two"], "two' already exists, expected the name of a new folder"),
        (["link"], "link' already exists, expected the name of a new folder"),
    ):
        assert cli.main(["vectors", str(tmp_path / given[0]), *given[1:]]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- the answers of a program ---------------------------------------------------------------------


@pytest.mark.long
def test_a_wrong_answer_is_named_only_in_its_precision(folder, results, compared):
    answers = {file.stem: load_file(file) for file in results.glob("*dora-*-float*.safetensors")}
    wrong = {name: p | {"dm": 0 * p["dm"]} for name, p in answers.items() if name[:5] == "dora-" and "64" in name}
    double, *others = compared(answers | wrong)
    assert [report.dtype for report in others] == ["float32", "float16"]
    assert all(report.passed for report in others)
    assert [d.flag for d in double.every_diagnosis()] == ["dora-magnitude-is-not-trained"] * 2
    assert {case.claim for case in double.failing} == {"slope"}


def test_what_is_wrong_in_some_precisions_says_in_which(folder, compared, tmp_path):
    names = [f"{half}linear-0-{dtype}" for half, dtype in (("", "float64"), ("", "float32"), ("half-", "float16"))]
    answers = {name: load_file(folder / f"{name}.safetensors") for name in names}
    for count, where in ((3, ""), (2, "float64 and float32: "), (1, "float64: ")):
        lacking = {name: p["y"] - p["bias"] * (name in names[:count]) for name, p in answers.items()}
        compared({name: {"y": y} for name, y in lacking.items()})
        (one,) = vectors.compare(folder, tmp_path / "mine").found
        assert one.says == f"{where}the output lacks the bias"
        assert len(one.cases) == count


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_is_judged_by_its_precision(folder, compared, dtype):
    """An answer rounded to the precision passes; one that is off by a sixth as well does not."""
    name = f"half-linear-0-{dtype}"
    y = load_file(folder / f"{name}.safetensors")["y"]
    for times, passed in ((1.0, True), (7 / 6, False)):
        (report,) = compared({name: {"y": round_to(times * y, dtype)}})
        assert (report.dtype, report.passed) == (dtype, passed)


def test_answers_may_be_stored_in_bfloat16(folder, compared, tmp_path):
    """The file has two bytes per number, as other languages write them."""
    name = "half-linear-0-bfloat16.safetensors"
    y = round_to(load_file(folder / name)["y"], "bfloat16")
    header = json.dumps({"y": {"dtype": "BF16", "shape": y.shape, "data_offsets": [0, 2 * y.size]}}).encode()
    (tmp_path / "mine").mkdir()
    bits = y.astype(FLOATS["BF16"]).tobytes()
    (tmp_path / "mine" / name).write_bytes(len(header).to_bytes(8, "little") + header + bits)
    (report,) = compared({})
    assert report.claims["forward"] == "ok"


def without(p, *names):
    return {key: array for key, array in p.items() if key.partition(".")[0] not in names}


@pytest.mark.parametrize(
    ("changes", "diagnoses", "answered"),
    [
        ([lambda p: without(p, "dA"), dict, dict], [], "3 of 15, dA in 2"),
        ([lambda p: without(p, "dA", "dx", "dB", "merged")] * 2, [], "2 of 15"),
        ([lambda p: without(p, "dA") | {"lora_A": p["dA"]}], ["no file has dA, found dB, dx, lora_A, merged, y"],
         "1 of 15"),
        ([lambda p: {"dx": p["dx"]}], ["no file has dA and dB, found dx"], "1 of 15"),
    ],
)  # fmt: skip
def test_answers_that_are_left_out_are_counted(folder, compared, changes, diagnoses, answered):
    """Missing answers are no failure, unless some gradients are there and those of the factors are missing."""
    names = [f"linear-{number}-float64" for number in range(len(changes))]
    (report,) = compared({name: change(answer(folder, name)) for name, change in zip(names, changes, strict=True)})
    assert report.diagnoses == diagnoses
    assert report.passed is not bool(diagnoses)
    assert report.habits["cases answered"] == answered
    assert [case.id for case in report.cases if case.failed] == (["linear-0-slope"] if diagnoses else [])


def test_the_gradients_of_all_slots_are_required(folder, compared):
    found, said = answer(folder, "fused-0-float64"), "has nothing for lora_B of slot 2, expected shape (4, 3"
    with pytest.raises(CannotRun, match=re.escape(said)):
        compared({"fused-0-float64": {key: a for key, a in found.items() if key != "dB.2"}})
    (report,) = compared({"fused-0-float64": without(found, "dB")})
    assert report.kinds["fused"].diagnoses == ["no file has dB, found dA, dx, merged, y"]


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ({}, "ok"),
        ({"end_B": None}, "adam-float64.safetensors has no end_B"),
        ({"end_A": None}, "adam-float64.safetensors has no end_A"),
        ({"end_A": "begin_A", "end_B": "begin_B"}, "the step changes nothing"),
    ],
)
def test_adam_is_judged_by_its_final_parameters(folder, compared, ends, verdict):
    p = load_file(folder / "adam-float64.safetensors")
    found = {end: p[ends.get(end, end)] for end in ("end_A", "end_B") if ends.get(end, end)}
    (report,) = compared({"adam-float64": found})
    assert report.claims == {"adam": verdict}
    assert report.diagnoses == ([] if verdict == "ok" else [verdict])
    assert [(case.id, case.failed) for case in report.cases] == [("linear-adam", verdict != "ok")]


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-9), ("float32", 2e-6)])
def test_adam_has_a_tolerance_for_each_precision(folder, compared, dtype, most):
    for times, ok in ((0.8, True), (1.2, False)):
        ends = {end: load_file(folder / f"adam-{dtype}.safetensors")[end] for end in ("end_A", "end_B")}
        ends["end_A"][0, 0] += times * most
        (report,) = compared({f"adam-{dtype}": ends})
        assert (report.claims["adam"] == "ok") is ok


def test_an_answer_of_another_shape_is_reported(compared):
    """This holds even if it is the only answer, and if the right one is zero."""
    shapes = {"linear-8-float64": (0,), "conv2d-4-float64": (), "rslora-8-float32": (3, 2, 1)}
    double, single = compared({case: {"dA": np.zeros(shape)} for case, shape in shapes.items()})
    for report, shape in zip((double, *double.kinds.values(), *single.kinds.values()), shapes.values(), strict=True):
        said = f"lora_A's gradient has shape {shape}, expected ("
        assert report.claims["slope"].startswith(said)
        assert any(text.startswith(said) for text in report.diagnoses)
    assert [report.dtype for report in (double, *double.kinds.values())] == ["float64"] * 2
    assert [report.dtype for report in (single, *single.kinds.values())] == ["float32"] * 2
    assert [report.name for report in single.kinds.values()] == [f"{single.name}, rslora"]


# --- a folder of another version ------------------------------------------------------------------


def of_another_version(folder, file, numbers, **changed):
    """Write a folder of another version, with one case that has the given numbers."""
    folder.mkdir()
    save_file(numbers, folder / file)
    kind, _, dtype = file.removesuffix(".safetensors").split("-")
    index = changed.pop("index") | {"minilora": "0.0.1", "cases": [{"file": file, "kind": kind, "dtype": dtype}]}
    (folder / "index.json").write_text(json.dumps(index | changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("times", "tolerance", "size", "diagnosis"),
    [
        (1.5, 1e-14, 1, None),
        (1.5 + 1e-10, 1e-14, 1, "the update has a different scaling"),
        (1.5 + 1e-10, 1e-9, 1, None),
        (1.5 + 1e-10, 1e-14, 1e5, None),
        (3, 1e-14, 1, "alpha is not divided by the rank"),
    ],
)
def test_another_versions_folder_is_judged_by_its_numbers(
    folder, compared, tmp_path, times, tolerance, size, diagnosis
):
    """Arrays, answers, sizes and tolerances may differ from this version's; mistakes are still named."""
    rng, name = np.random.default_rng(0), "linear-0-float64.safetensors"
    p = load_file(folder / name) | {"x": rng.standard_normal((7, 5)), "lora_A": rng.standard_normal((2, 5))}
    base, update = p["x"] @ p["weight"].T + p["bias"], p["x"] @ p["lora_A"].T @ p["lora_B"].T
    p["y"], p["size.y"] = base + 1.5 * update, size * p["size.y"]
    of_another_version(tmp_path / "old", name, p, index=index_of(folder), tolerance={"float64": tolerance})
    (report,) = compared({"linear-0-float64": {"y": base + times * update}}, tmp_path / "old")
    assert report.passed is (diagnosis is None)
    assert report.habits["cases answered"] == "1 of 1"
    assert diagnosis is None or report.diagnoses[0].startswith(diagnosis)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "linear-99-float64.safetensors",
            f"is not a case of minilora {__version__}: compare with the version that wrote it",
        ),
        (
            "linear-1-float64.safetensors",
            "does not contain the problem that it is named after, N=4 in=3 out=6 r=4 alpha=10",
        ),
    ],
)
def test_a_problem_that_this_version_does_not_know_is_refused(folder, compared, tmp_path, file, said):
    p = load_file(folder / "linear-0-float64.safetensors")
    of_another_version(tmp_path / "old", file, p, index=index_of(folder))
    with pytest.raises(CannotRun) as refused:
        compared({file.removesuffix(".safetensors"): p}, tmp_path / "old")
    assert str(refused.value) == f"{str(tmp_path / 'old' / file)!r} {said}"


# --- files that are no answers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no file of answers, expected names such as 'linear-0-float64.safetensors'"),
        (b"\xff" * 20, "header too large"),
        ({"grad_A": np.ones(3)}, "has grad_A, expected y, dx, dA, dB, dm, merged"),
        ({"dm": np.ones(3)}, "has dm, expected y, dx, dA, dB, dm, merged"),
    ],
)
def test_files_without_answers_are_refused(folder, tmp_path, capsys, content, said):
    file = tmp_path / "linear-0-float64.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        save_file(content, file)
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / ".." / tmp_path.name / "link"):
        with pytest.raises(CannotRun, match="is the folder of the vectors, expected a folder with a program's answers"):
            vectors.compare(folder, name)


# --- a program in C -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
@pytest.mark.parametrize(("bug", "code"), [(None, 0), ("-DFORGET_SCALING", 1)])
def test_a_program_in_c_answers_the_vectors(folder, tmp_path, capsys, bug, code):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    build = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", *filter(None, [bug]), str(C), "-o", "lora"]
    subprocess.run(build, check=True, cwd=tmp_path)
    (tmp_path / "results").mkdir()
    cases = sorted(map(str, folder.glob("linear-*.safetensors")))
    subprocess.run(["./lora", "results", *cases], check=True, cwd=tmp_path)
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path / "results")]) == code
    out = capsys.readouterr().out
    assert out.count("15 of 15") == 2
    assert ("results: WRONG: alpha" if bug else "results: passed: ") in out.splitlines()[0]
    assert len(C.read_text(encoding="utf-8").splitlines()) < 200
