"""Problems and answers as files: what they hold, and what is said of a program that answers them."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import __version__, cli
from minilora.conformance import CannotRun, vectors
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.tolerance import round_to
from minilora.files.tensors import FLOATS

from .implementations import OURS, dora_init, full_norm, functions_of, step

C = Path(__file__).parents[2] / "examples" / "conformance" / "lora.c"
FULL = {**OURS, "dora-full": functions_of(full_norm, init=dora_init)}
del FULL["combine"]  # whose singular vectors are not the same bits everywhere


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = tmp_path_factory.mktemp("vectors") / "made"
    assert vectors.write(made) == len(vectors.VECTORS)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same without the flags of all kinds but one: to see which bugs a case shows takes most of the time."""
    made, flags = tmp_path_factory.mktemp("vectors") / "made", vectors.Vector.flags
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vectors.Vector, "flags", lambda vector: flags(vector) if vector.kind == "linear" else [])
        assert vectors.write(made) == len(vectors.VECTORS)
    return made


def index_of(folder):
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def answer(file, kind):
    """What this library's own layers answer to a case, with nothing but the file."""
    p = load_file(file)
    if kind == "fused":
        return of_slots(p)
    if kind == "experts":
        return of_experts(p)
    base = [p["packed"], p["absmax"]] if kind == "nf4" else [p["weight"]]
    adapter = [p["lora_A"], p["lora_B"], float(p["alpha"][0])]
    more = [p[name] for name in ("magnitude", "mask") if name in p]
    steps = {name: tuple(map(int, p[name])) for name in ("stride", "padding", "dilation") if name in p}
    nested = {"nested_absmax": p["nested_absmax"], "mean": float(p["mean"][0])} if "mean" in p else {}
    functions, layer = FULL[kind], [*base, p.get("bias"), *adapter, *more]
    grads = functions.backward(p["dy"], p["x"], *layer, **steps, **nested)
    found = {
        "y": functions.forward(p["x"], *layer, **steps, **nested),
        "merged": functions.merge(*base, *adapter, *(more if kind != "dropout" else []), **nested),
    }
    found |= {name: grads[of] for name, of in vectors.NAMES.items() if grads.get(of) is not None}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def of_experts(p):
    """The same of experts, one column of lora_B after the other."""
    layer = [p["weight"], p["lora_A"], p["lora_B"], float(p["alpha"][0])]
    E, ids, y, merged = len(p["weight"]), p["expert_ids"], [], p["weight"].astype(float)
    r = len(p["lora_A"]) // E
    for e, k in np.ndindex(E, r):
        merged[e] += layer[3] / r * np.outer(p["lora_B"][:, k * E + e], p["lora_A"][e * r + k])
    y = np.stack([merged[e] @ row for e, row in zip(ids, p["x"], strict=True)])
    grads = OURS["experts"].backward(p["dy"], p["x"], *layer, ids)
    dx = np.stack([row @ merged[e] for e, row in zip(ids, p["dy"], strict=True)])
    found = {"y": y, "merged": merged, "dx": dx, "dA": grads["lora_A"], "dB": grads["lora_B"]}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def of_slots(p):
    """The same of a weight with slots, whose factors have a number each."""
    widths, functions = list(map(int, p["widths"])), OURS["fused"]
    A, B = ([p.get(f"{name}.{i}") for i in range(len(widths))] for name in ("lora_A", "lora_B"))
    slots = [A, B, list(map(float, p["alpha"])), widths]
    grads = functions.backward(p["dy"], p["x"], p["weight"], p.get("bias"), *slots)
    found = {"y": functions.forward(p["x"], p["weight"], p.get("bias"), *slots), "dx": grads["x"]}
    found["merged"] = functions.merge(p["weight"], *slots)
    for name, of in (("dA", "lora_A"), ("dB", "lora_B")):
        found |= {f"{name}.{i}": grad for i, grad in enumerate(grads[of]) if grad is not None}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def adam(file):
    p = load_file(file)
    params, state = {"lora_A": p["begin_A"], "lora_B": p["begin_B"]}, None
    for A, B in zip(p["grads_A"], p["grads_B"], strict=True):
        params, state = step(params, {"lora_A": A, "lora_B": B}, state)
    return {"end_A": params["lora_A"], "end_B": params["lora_B"]}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Answers to every case without groups, which this library's convolutions do not have."""
    made = tmp_path_factory.mktemp("results")
    for case in index_of(folder)["cases"]:
        file = folder / case["file"]
        if case["kind"] == "adam":
            save_file(adam(file), made / case["file"])
        elif "groups=1" in case["sizes"] or "groups" not in case["sizes"]:
            save_file(answer(file, case["kind"]), made / case["file"])
    return made


@pytest.mark.long
def test_our_own_answers_to_every_case_pass(folder, results):
    reports = vectors.compare(folder, results)
    assert [report.dtype for report in reports] == ["float64", "float32", "float16", "bfloat16"]
    for report in reports:
        assert report.passed, str(report)
        single, half = report.dtype == "float32", report.dtype.endswith("16")
        assert set(report.kinds) == set(FULL) - {"linear"} - (set() if single else {"nf4", "mixed"})
        assert report.claims.get("adam") == (None if half else "ok")
        assert report.habits["cases answered"] == ("13 of 13" if half else "15 of 15")
        for one in (report, *report.kinds.values()):
            assert one.claims["forward"] == one.claims["slope"] == one.claims["merge"] == "ok"


@pytest.mark.long
def test_the_answers_in_the_files_are_within_their_own_tolerance(folder, results):
    """So a program can judge itself, with the files alone."""
    index = index_of(folder)
    for case in index["cases"]:
        if (results / case["file"]).exists() and case["kind"] != "adam":
            right, found = load_file(folder / case["file"]), load_file(results / case["file"])
            assert found
            for name, array in found.items():
                allowed = index["tolerance"][case["dtype"]] * right[f"size.{name}"]
                assert (np.abs(array - right[name]) <= allowed).all(), (case["file"], name)


@pytest.mark.long
def test_every_flag_has_a_note_and_links(whole):
    index = index_of(whole)
    assert {flag for case in index["cases"] for flag in case["flags"]} == set(index["flags"])
    for bug in BUGS:
        if bug.flag in index["flags"]:
            assert index["flags"][bug.flag]["bug"] == bug.says
        else:  # a file has nothing of a start, and a gradient may be left out
            if bug.breaks in ("codes", "output dtype") or bug.kinds == ("combine",):
                continue
            trial = vectors.Vector(bug.kinds[0], 0, "float64").trial()
            assert bug.breaks in ("start", "alpha of 0", "row of zeros") or len(
                trial.answer(**bug.of(trial.problem))
            ) < len(trial.right)
    assert "https://github.com/rasbt/LLMs-from-scratch/issues/821" in index["flags"][
        "alpha-is-not-divided-by-the-rank"
    ]["made in"]  # fmt: skip
    assert "https://pypi.org/project/lora-pytorch/0.2.0/" in index["flags"]["dx-lacks-dy-w"]["made in"]
    assert all(link.startswith("https://") for note in index["flags"].values() for link in note["made in"])


def test_a_flag_is_a_bug_that_the_case_catches(folder):
    flags = {case["file"]: case["flags"] for case in index_of(folder)["cases"]}
    square, other = flags["linear-3-float64.safetensors"], flags["linear-0-float64.safetensors"]
    assert "merge-adds-the-change-transposed" in square
    assert "merge-adds-the-change-transposed" not in other
    assert "the-output-lacks-the-bias" in other
    assert "the-output-lacks-the-bias" not in flags["linear-1-float64.safetensors"]


@pytest.mark.long
def test_the_same_bits_are_written_again(whole, tmp_path):
    vectors.write(tmp_path / "again")
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_a_wrong_answer_in_a_file_is_named(folder, results, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in results.glob("*dora-*-float*.safetensors"):
        shutil.copy(file, wrong)
    for file in wrong.glob("dora-*-float64.safetensors"):
        found = load_file(file)
        save_file({**found, "dm": 0 * found["dm"]}, file)
    double, *others = vectors.compare(folder, wrong)
    assert not double.passed
    assert all(other.passed for other in others)
    assert double.first_line.startswith(f"{wrong}: WRONG: dora: DoRA's magnitude is not trained: ")
    assert cli.main(["vectors", str(folder), "--compare", str(wrong)]) == 1  # one precision is enough


# --- half precision, slots -----------------------------------------------------------------------


def test_half_precision_lies_in_files_of_its_own(folder):
    """A program that reads linear-* in float64 and float32 goes on doing so."""
    cases = index_of(folder)["cases"]
    for case in cases:
        assert case["file"].startswith("half-") == (case["dtype"] in ("float16", "bfloat16"))
    assert {case["kind"] for case in cases if case["dtype"] == "float16"} == set(FULL) - {"nf4", "mixed"}


def test_numbers_of_bfloat16_are_exact_in_float32(folder):
    p = load_file(folder / "half-linear-0-bfloat16.safetensors")
    for name in ("x", "dy", "weight", "bias", "lora_A", "lora_B"):
        assert p[name].dtype == np.float32
        assert np.array_equal(round_to(p[name], "bfloat16"), p[name])
    assert p["y"].dtype == np.float64
    assert load_file(folder / "half-linear-0-float16.safetensors")["x"].dtype == np.float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_is_judged_by_its_precision(folder, results, tmp_path, dtype):
    """Rounded to it once, it passes; rounded to it and off by a sixth, it does not."""
    name = f"half-linear-0-{dtype}.safetensors"
    right = load_file(folder / name)
    for times, passed in ((1.0, True), (7 / 6, False)):
        save_file({"y": round_to(times * right["y"], dtype)}, tmp_path / name)
        (report,) = vectors.compare(folder, tmp_path)
        assert (report.dtype, report.passed) == (dtype, passed)


def test_a_bug_in_half_precision_is_named(folder, results, tmp_path):
    for file in results.glob("half-linear-*-float16.safetensors"):
        found = load_file(file)
        save_file(found | {"dx": 0 * found["dx"]}, tmp_path / file.name)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.dtype == "float16"
    assert report.diagnoses == ["dx is zero"]


def test_answers_may_lie_in_bfloat16(folder, results, tmp_path):
    """Two bytes a number, as other languages write them."""
    name = "half-linear-0-bfloat16.safetensors"
    y = load_file(results / name)["y"]
    save_file({"y": y}, tmp_path / name)
    raw = (tmp_path / name).read_bytes().replace(b'"F32"', b'"BF16"')
    length = int.from_bytes(raw[:8], "little")
    header = raw[8:].partition(b"}}")[0].replace(f"{4 * y.size}]".encode(), f"{2 * y.size}]".encode()) + b"}}"
    assert length
    bits = y.astype(FLOATS["BF16"]).tobytes()
    (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + bits)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.passed
    assert report.claims["forward"] == "ok"


def test_a_slots_gradient_that_is_missing_is_told(folder, results, tmp_path, capsys):
    name = "fused-0-float64.safetensors"
    found = load_file(results / name)
    save_file({key: a for key, a in found.items() if key != "dB.2"}, tmp_path / name)
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path)]) == 2
    assert f"{name}' has nothing for lora_B of slot 2, expected shape (4, 3)" in capsys.readouterr().err
    save_file({key: a for key, a in found.items() if "dB" not in key}, tmp_path / name)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.kinds["fused"].diagnoses == ["no file has dB; there are dA, dx, merged, y"]


def test_slots_that_are_exchanged_are_named_from_files(folder, results, tmp_path):
    """k's update in v's rows and v's in k's."""
    for file in results.glob("fused-*-float64.safetensors"):
        p = load_file(folder / file.name)
        base = p["x"] @ p["weight"].T + p.get("bias", 0)
        widths = list(map(int, p["widths"]))
        update, ends = p["y"] - base, np.cumsum(widths)
        if len(widths) == 3:
            k, v = (slice(end - widths[1], end) for end in ends[1:])
            update[:, k], update[:, v] = update[:, v].copy(), update[:, k].copy()
            if widths[0] == widths[1]:
                continue
        else:
            update = np.roll(update, widths[0], axis=1)
        save_file({"y": base + update}, tmp_path / file.name)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.kinds["fused"].diagnoses[0].startswith("slots of one width are exchanged")


# --- the command line, and what it refuses --------------------------------------------------------


def test_the_command_writes_and_compares(folder, results, tmp_path, capsys):
    assert cli.main(["vectors", str(folder), "--compare", str(results)]) == 0
    assert capsys.readouterr().out.startswith(f"{results}: passed: ")
    (tmp_path / "wrong").mkdir()
    found = load_file(results / "linear-0-float64.safetensors")
    save_file({**found, "y": 2 * found["y"]}, tmp_path / "wrong" / "linear-0-float64.safetensors")
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path / "wrong")]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'wrong'}: WRONG: the output is off by ")


def test_a_folder_that_is_there_is_left_alone(folder, capsys):
    before = (folder / "index.json").read_bytes()
    assert cli.main(["vectors", str(folder)]) == 2
    assert "is there already, expected the name of a new folder" in capsys.readouterr().err
    assert (folder / "index.json").read_bytes() == before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no file of answers, expected names such as 'linear-0-float64.safetensors'"),
        ({"linear-0-float64.safetensors": b"\xff" * 20}, "header too large"),
        ({"linear-0-float64.safetensors": {"grad_A": np.ones(3)}}, "has grad_A, expected y, dx, dA, dB, dm, merged"),
    ],
)
def test_what_is_no_answer_is_refused(folder, tmp_path, capsys, files, said):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            save_file(content, tmp_path / name)
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_vectors_are_no_answers_to_themselves(folder, capsys):
    assert cli.main(["vectors", str(folder), "--compare", str(folder)]) == 2
    assert "has the vectors, expected a folder with what a program answered" in capsys.readouterr().err


def test_vectors_under_another_spelling_are_no_answers(folder, tmp_path):
    (tmp_path / "beside").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, folder.parent / "nowhere" / ".." / folder.name, tmp_path / "beside" / ".." / "link"):
        (folder.parent / "nowhere").mkdir(exist_ok=True)
        with pytest.raises(CannotRun, match="has the vectors"):
            vectors.compare(folder, name)


def test_results_that_are_no_folder_are_refused(folder, tmp_path, capsys):
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' is no folder" in capsys.readouterr().err


def test_answers_that_some_files_lack_are_counted(folder, results, tmp_path):
    for number in range(3):
        name = f"linear-{number}-float64.safetensors"
        found = load_file(results / name)
        save_file({k: a for k, a in found.items() if k != "dA" or number}, tmp_path / name)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.passed
    assert report.habits["cases answered"] == "3 of 15, dA in 2"


def test_a_gradient_under_another_name_is_told(folder, results, tmp_path):
    for number in range(3):
        found = load_file(results / f"linear-{number}-float64.safetensors")
        renamed = {"lora_A" if name == "dA" else name: array for name, array in found.items()}
        save_file(renamed, tmp_path / f"linear-{number}-float64.safetensors")
    (report,) = vectors.compare(folder, tmp_path)
    assert report.diagnoses == ["no file has dA; there are dB, dx, lora_A, merged, y"]
    assert report.claims["slope"] == report.diagnoses[0]
    assert [case.id for case in report.cases if case.failed] == [f"linear-{number}-slope" for number in range(3)]


def test_a_comparison_may_be_written_as_json(folder, results, tmp_path, capsys):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir()
    for file in results.glob("*rslora-*.safetensors"):
        shutil.copy(file, right)
    shutil.copytree(right, wrong)
    found = load_file(wrong / "rslora-3-float32.safetensors")
    save_file({**found, "y": found["y"] + 1}, wrong / "rslora-3-float32.safetensors")
    for folder_of, status, failing in ((right, 0, []), (wrong, 1, ["rslora-3-forward"])):
        line = ["vectors", str(folder), "--compare", str(folder_of), "--json", str(tmp_path / "found.json")]
        assert cli.main(line) == status
        told = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
        assert told["status"] == status
        found = {one["dtype"]: one["failing"] for one in told["precisions"]}
        assert found == {"float64": [], "float32": failing, "float16": [], "bfloat16": []}
    assert cli.main(["vectors", str(tmp_path / "new"), "--json", "found.json"]) == 2
    assert "--json needs --compare: it is about the verdicts" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_program_may_answer_the_output_alone(folder, results, tmp_path):
    for file in results.glob("*-0-float64.safetensors"):
        save_file({"y": load_file(file)["y"]}, tmp_path / file.name)
    (report,) = vectors.compare(folder, tmp_path)
    assert report.passed, str(report)
    for one in (report, *report.kinds.values()):
        assert (one.claims["forward"], one.claims["slope"], one.claims["merge"]) == ("ok", "not offered", "not offered")


def test_an_answer_of_adam_that_is_missing_is_named(folder, results, tmp_path):
    found = load_file(results / "adam-float64.safetensors")
    save_file({"end_A": found["end_A"]}, tmp_path / "adam-float64.safetensors")
    (report,) = vectors.compare(folder, tmp_path)
    assert report.claims["adam"] == "adam-float64.safetensors has no end_B"
    assert report.first_line == f"{tmp_path}: WRONG: adam-float64.safetensors has no end_B"


def of_another_version(folder, file, numbers, **changed):
    """Write a folder with one case of these numbers."""
    folder.mkdir()
    save_file(numbers, folder / file)
    kind, _, dtype = file.removesuffix(".safetensors").split("-")
    index = changed.pop("index") | {"minilora": "0.0.1", "cases": [{"file": file, "kind": kind, "dtype": dtype}]}
    (folder / "index.json").write_text(json.dumps(index | changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("times", "tolerance", "diagnosis"),
    [
        (1.5, 1e-14, None),
        (1.5 + 1e-10, 1e-14, "the update has another scaling"),
        (1.5 + 1e-10, 1e-9, None),
        (3, 1e-14, "alpha is not divided by the rank"),
    ],
)
def test_a_folder_of_another_version_is_judged_by_its_own_numbers(folder, tmp_path, times, tolerance, diagnosis):
    """Other arrays, answers and tolerances than this version's: a mistake in them has its name all the same."""
    rng, name = np.random.default_rng(0), "linear-0-float64.safetensors"
    p = load_file(folder / name) | {"x": rng.standard_normal((7, 5)), "lora_A": rng.standard_normal((2, 5))}
    base, update = p["x"] @ p["weight"].T + p["bias"], p["x"] @ p["lora_A"].T @ p["lora_B"].T
    p["y"] = base + 1.5 * update
    of_another_version(tmp_path / "old", name, p, index=index_of(folder), tolerance={"float64": tolerance})
    (tmp_path / "mine").mkdir()
    save_file({"y": base + times * update}, tmp_path / "mine" / name)
    (report,) = vectors.compare(tmp_path / "old", tmp_path / "mine")
    assert report.passed is (diagnosis is None)
    assert report.habits["cases answered"] == "1 of 1"
    assert diagnosis is None or report.diagnoses[0].startswith(diagnosis)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("linear-99-float64.safetensors", f"is no case of minilora {__version__}: compare by the one that wrote it"),
        ("linear-1-float64.safetensors", "does not hold its problem, N=4 in=3 out=6 r=4 alpha=10"),
    ],
)
def test_a_problem_that_this_version_does_not_know_is_refused(folder, tmp_path, file, said):
    p = load_file(folder / "linear-0-float64.safetensors")
    of_another_version(tmp_path / "old", file, p, index=index_of(folder))
    (tmp_path / "mine").mkdir()
    save_file(p, tmp_path / "mine" / file)
    with pytest.raises(CannotRun) as refused:
        vectors.compare(tmp_path / "old", tmp_path / "mine")
    assert str(refused.value) == f"{str(tmp_path / 'old' / file)!r} {said}"


def test_kinds_or_a_starter_set_are_written_alone(tmp_path, capsys):
    assert cli.main(["vectors", str(tmp_path / "starter"), "--starter"]) == 0
    assert cli.main(["vectors", str(tmp_path / "two"), "--kind", "conv1d,adam", "--kind", "nf4"]) == 0
    first, second = index_of(tmp_path / "starter"), index_of(tmp_path / "two")
    assert [case["file"] for case in first["cases"]] == [
        f"linear-{number}-{dtype}.safetensors" for number in range(7) for dtype in ("float64", "float32")
    ]
    assert {case["kind"] for case in second["cases"]} == {"conv1d", "nf4", "adam"}
    for made in ("starter", "two"):
        there = {file.name for file in (tmp_path / made).iterdir()}
        assert there == {"index.json", *(case["file"] for case in index_of(tmp_path / made)["cases"])}
        flags = {flag for case in index_of(tmp_path / made)["cases"] for flag in case["flags"]}
        assert flags == set(index_of(tmp_path / made)["flags"])
    capsys.readouterr()
    assert cli.main(["vectors", str(tmp_path / "none"), "--kind", "linear,none"]) == 2
    assert "--kind: there is no kind 'none'; there are linear, rslora, " in capsys.readouterr().err
    assert cli.main(["vectors", str(tmp_path / "two"), "--compare", str(tmp_path), "--starter"]) == 2
    assert "expected them without --compare" in capsys.readouterr().err


# --- a program in C -------------------------------------------------------------------------------


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
@pytest.mark.parametrize(("bug", "code"), [(None, 0), ("-DFORGET_SCALING", 1)])
def test_a_program_in_c_goes_the_whole_round(folder, tmp_path, capsys, bug, code):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    build = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", *filter(None, [bug]), str(C), "-o", "lora"]
    subprocess.run(build, check=True, cwd=tmp_path)
    (tmp_path / "results").mkdir()
    cases = sorted(map(str, folder.glob("linear-*.safetensors")))
    subprocess.run(["./lora", "results", *cases], check=True, cwd=tmp_path)
    assert cli.main(["vectors", str(folder), "--compare", str(tmp_path / "results")]) == code
    out = capsys.readouterr().out
    assert out.count("15 of 15") == 2
    said = "WRONG: alpha is not divided by the rank: " if bug else "passed: "
    assert out.startswith(f"{tmp_path / 'results'}: {said}")


def test_the_program_in_c_is_short():
    assert len(C.read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        *[("rslora-8-float32", shape) for shape in [(0,), (), (3, 2, 1)]],
        *[(case, (0,)) for case in ("linear-8-float64", "conv2d-4-float64")],
    ],
)
def test_an_answer_of_another_shape_is_said(folder, tmp_path, case, shape):
    """Also where it is the only one, and where the right one is zero."""
    save_file({"dA": np.zeros(shape)}, tmp_path / f"{case}.safetensors")
    (report,) = vectors.compare(folder, tmp_path)
    (one,) = report.kinds.values() or [report]
    assert not report.passed
    assert one.claims["slope"].startswith(f"lora_A's gradient has shape {shape}, expected (")
    assert any(text in one.claims["slope"] for text in one.diagnoses)


def test_verdicts_never_take_the_place_of_what_is_compared(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "made")
    (tmp_path / "results").mkdir()
    name = "linear-0-float64.safetensors"
    save_file({"y": load_file(folder / name)["y"]}, tmp_path / "results" / name)
    for output in (tmp_path / "made" / "index.json", tmp_path / "made" / name, tmp_path / "results" / name):
        before = output.read_bytes()
        line = ["vectors", str(tmp_path / "made"), "--compare", str(tmp_path / "results"), "--json", str(output)]
        assert cli.main(line) == 2, output
        assert "is a file of what is compared, expected another file" in capsys.readouterr().err
        assert output.read_bytes() == before
