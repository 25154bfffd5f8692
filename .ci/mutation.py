"""Run mutmut and hold its result against the survivors that are known, each with the reason why it changes nothing.

    python .ci/mutation.py [--known] [--sample COUNT] [core] [rim] [judge] [layers] [doors] [changed] [MODULE ...]

The core is the mathematics; the rim is what reads and writes files; the judge is what judges the numbers and files of
others; layers are what networks and variants are made of; doors are a language model and the command line; changed is
what a change touches: what differs from MINILORA_BASE, by default the commit before. MODULE is any module, such as
layers/norm; those that `PARTS` mutates together with it come along. A score below the bar fails the run. A mutant that
survives and is not on the list is a hole in the tests, and is shown; so is one on the list that is no longer made. No
test is run on those on the list, on which all tests together would run, unless `--known` says so: then one that was
killed is shown too. One whose function or line is gone from the package ends every run before it begins.

Of the judge, the layers and the doors a few files are drawn, and of those COUNT mutants, `SAMPLE` by default; of the
other parts all are tried, or COUNT. Each commit draws others; MINILORA_MUTANTS=TEXT draws by a text, so that a run can
be repeated.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / ".ci" / "surviving_mutants.txt"
BARS = {"core": 0.98, "rim": 0.95, "judge": 0.95, "layers": 0.98, "doors": 0.95, "changed": 0.95}
SAMPLE, FILES = 60, 16
"""How many mutants are tried of a part that is drawn, and of how many files."""
DRAWN = ("judge", "layers", "doors")
"""The parts with too many mutants to try them all: their modules, and tests, are folders."""
IN_PROCESSES = {
    "minilora": ("conformance/plugin", "conformance/test_implementation", "conformance/checking/child"),
    "tests": ("conformance/test_plugin", "conformance/checking/test_child"),
}
"""Of the judge, what runs in processes of its own, where no mutant is planted."""
CHANGED = 2
"""The most words and signs of a line that a mutant changes, such as the point and the digits of a number."""
KILLED = ("killed", "timeout", "segfault")
COPIED = ("minilora", "tests", "examples", "README.md", "LICENSE", "pyproject.toml")

PARTS = {
    "core": (
        (
            (
                *("lora", "linear", "losses", "optim", "schedule", "layer", "layers/mlp"),
                *("layers/activation", "layers/flatten", "fast/adam", "fast/residual"),
            ),
            (
                *("test_gradients", "test_lora", "test_linear", "test_losses", "test_optim", "test_schedule"),
                *("test_layer", "test_adaptation", "test_checks", "test_texts", "test_defaults", "test_growth"),
                "test_likely_mistakes",
                *("layers/test_mlp", "layers/test_nf4", "layers/test_quantized", "layers/test_activation"),
                *("variants/test_variants", "variants/test_own_variant", "test_quantization"),
                *("fast/test_adam", "fast/test_page_is_what_runs", "fast/test_speed_changes_nothing"),
                *("verify/test_instances", "verify/test_closed_form"),
                *("language/test_thawed_alone", "language/test_nexttoken"),
                *("devices/test_two_libraries", "devices/test_devices"),
            ),
        ),
        (
            ("layers/nf4", "layers/quantized", "variants/loftq", "quantization"),
            (
                *("layers/test_nf4", "layers/test_quantized", "test_quantization"),
                *("test_gradients", "devices/test_layers_on_devices"),
            ),
        ),
        (
            ("verify/gradcheck", "verify/closed_form"),
            ("verify/test_gradcheck", "verify/test_closed_form", "devices/test_two_libraries"),
        ),
    ),
    "rim": (
        (
            ("files/disk", "files/dtypes", "files/tensors"),
            (
                *("files/test_disk", "files/test_readers", "files/test_tensors", "test_texts", "files/test_merge"),
                *("files/test_merge_kinds", "files/test_peft_folder", "files/test_adapters", "files/test_modelfolder"),
                *("language/files/test_weights", "language/files/test_npz"),
                *("language/files/test_gguf", "language/files/test_save"),
            ),
        ),
        (
            ("files/merge", "files/placement", "files/modelfolder", "files/experts", "files/expert_adapters"),
            (
                *("files/test_merge", "files/test_modelfolder", "files/test_merge_kinds", "files/test_merge_experts"),
                *("files/test_expert_adapters", "files/test_placement"),
            ),
        ),
        (
            ("files/checkpoint",),
            ("files/test_checkpoint", "test_training", "language/test_training_on_text"),
        ),
        (
            ("files/patterns",),
            ("files/test_patterns", "files/test_peft_config"),
        ),
        (
            ("files/adapters", "files/peft", "files/inspection"),
            (
                *("files/test_adapters", "files/test_peft_folder", "files/test_peft_names", "files/test_peft_config"),
                *("files/test_expert_adapters", "files/test_inspection", "files/test_disk", "files/test_patterns"),
            ),
        ),
    ),
    "judge": ((("conformance", "report", "audit", "exercises"), ("conformance", "test_report", "audit", "exercises")),),
    "layers": ((("layers", "variants", "fast"), ("test_gradients", "layers", "variants", "fast")),),
    "doors": ((("language", "cli"), ("language", "cli")),),
}
"""Modules that are mutated together, and the tests that are about them: all tests would take hours."""
SLOW = ("killed_while", "little_memory", "endless", "three_blocks_of_memory", "live_page", "index_of_fields")
"""What tests are about that no mutant waits for, by words of their names: slow ones of files, one that counts bytes, of
which each call of a function with mutants takes some, and those that read the site."""


def check_paths() -> None:
    """Refuse to begin where the table, or the list of survivors, names a file that has moved."""
    groups = [group for part in PARTS.values() for group in part]
    paths = {f"minilora/{module}" for modules, _ in groups for module in modules}
    paths |= {f"tests/{test}" for _, tests in groups for test in tests}
    paths |= {f"{folder}/{name}" for folder, names in IN_PROCESSES.items() for name in names}
    missing = sorted(path for path in paths if not (ROOT / path).is_dir() and not (ROOT / f"{path}.py").is_file())
    prefixes = tuple(f"minilora.{module.replace('/', '.')}." for modules, _ in groups for module in modules)
    missing += sorted(mutant for mutant in known_survivors() if not mutant.startswith(prefixes))
    if missing:
        raise SystemExit("no such file, or of no module of the table:\n    " + "\n    ".join(missing))
    if stale := stale_entries(known_survivors(), functions()):
        raise SystemExit(f"of no function, or of no line, that is there, in {KNOWN.name}:\n    " + "\n    ".join(stale))


def functions() -> dict[str, str]:
    """Return the text of each function of the package, its lines in one, by the name that `described` gives it."""
    found: dict[str, str] = {}
    for file in (ROOT / "minilora").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines()]
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        inside = [(module, node) for node in ast.parse(text).body]
        for path, node in inside:  # which grows
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inside += [(f"{path}.{node.name}", inner) for inner in node.body]
            if isinstance(node, ast.FunctionDef):
                found[f"{path}.{node.name}"] = " ".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def stale_entries(mutants: Iterable[str], texts: dict[str, str]) -> list[str]:
    """Return the mutants whose function is gone, or whose line no change of one word makes of what stands there."""
    return [mutant for mutant in mutants if not _can_be_made(*mutant.split(": ", 1), texts)]


def _can_be_made(function: str, line: str, texts: dict[str, str]) -> bool:
    if function not in texts:
        return False
    # mutmut also writes a text in capitals or between two XX, and `(x) and False` in the place of a condition x.
    line = re.sub(r"\) (and False|or True)|[()]|XX", "", line).lower()
    text = re.sub(r"[()]", "", texts[function]).lower()
    start = max(n for n in range(len(line) + 1) if line[:n] in text)
    end = min(n for n in range(start, len(line) + 1) if line[n:] in text)
    return len(re.findall(r"\w+|\S", line[start:end])) <= CHANGED


def configure(folder: Path, modules: tuple[str, ...], tests: tuple[str, ...]) -> None:
    """Let mutmut, in a copy of the repository, mutate those modules and run those tests."""
    file = folder / "pyproject.toml"
    before, head, settings = file.read_text(encoding="utf-8").partition("[tool.mutmut]")
    settings = settings.replace('-profile=mutation"]', f'-profile=mutation", "-k", "not {" and not ".join(SLOW)}"]')
    assert SLOW[0] in settings
    selected = [file_or_folder(f"tests/{test}") for test in tests]
    left_out = [f"--ignore=tests/{test}.py" for test in IN_PROCESSES["tests"]]
    lines = [
        f"only_mutate = {[f'minilora/{module}.py' for module in modules]}",
        f"pytest_add_cli_args_test_selection = {[*selected, *left_out]}",
        'also_copy = ["examples"]',
    ]
    file.write_text(before + head + settings.rstrip() + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


def file_or_folder(path: str) -> str:
    """Return the path of a file or of a folder, which the table has without an ending."""
    return path if (ROOT / path).is_dir() else f"{path}.py"


def seed() -> str:
    """Return what a sample is drawn by."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("MINILORA_MUTANTS") or commit.stdout.strip() or "no commit"


def drawn_modules(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Draw some of the modules of folders."""
    places = [ROOT / "minilora" / folder for folder in folders]
    files = [path for place in places for path in sorted(place.rglob("[!_]*.py")) or [place.with_suffix(".py")]]
    modules = {path.relative_to(ROOT / "minilora").with_suffix("").as_posix() for path in files}
    return tuple(sorted(Random(seed()).sample(sorted(modules - {*IN_PROCESSES["minilora"]}), FILES)))


def changed_modules() -> set[str]:
    """Return the modules of the package that the change touches."""
    base = os.environ.get("MINILORA_BASE") or "HEAD~1"
    command = ["git", "diff", "--name-only", "--diff-filter=d", base, "--", "minilora/*.py"]
    found_paths = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # a clone may lack the base
    paths = found_paths.stdout.split() if found_paths.returncode == 0 else []
    return {path.removeprefix("minilora/").removesuffix(".py") for path in paths if "/_" not in path}


def with_tests(modules: set[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return modules with the tests that are about them: those of `PARTS`, or of their folder."""
    found: dict[tuple[str, ...], list[str]] = {}
    listed = {module: tests for part in ("core", "rim") for names, tests in PARTS[part] for module in names}
    listed["gradients"] = ("test_training",)  # tests/test_gradients.py is about the layers
    for module in sorted(modules - {*IN_PROCESSES["minilora"]}):
        folder, _, name = module.partition("/")
        own = folder if name else f"test_{folder}"
        tests = (own,) if (ROOT / file_or_folder(f"tests/{own}")).exists() else ()
        if folder in PARTS["layers"][0][0]:
            tests = ("test_gradients", *tests)  # where a layer has its claims
        if tests := listed.get(module) or tests:
            found.setdefault(tests, []).append(module)
    return [(tuple(names), tests) for tests, names in found.items()]


def known_survivors() -> dict[str, str]:
    """Read the list: a mutant as `described` gives it, and the reason."""
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("  ## ", 1) for line in lines)


def diff_of(name: str, folder: Path) -> str:
    """Return what a mutant changes."""
    show = [sys.executable, "-m", "mutmut", "show", name]
    return subprocess.run(show, cwd=folder, capture_output=True, text=True, check=True).stdout


def described(name: str, diff: str) -> str:
    """Return the function that a mutant is of, and the line as the mutant has it."""
    changed = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    function = re.sub(r"__mutmut_\d+$", "", name).replace("xǁ", "").replace("ǁ", ".").replace(".x_", ".")
    return f"{function}: {' '.join(changed)}"


def copy_to(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)


def run_mutmut(folder: Path, *options: str) -> dict[str, str]:
    """Return what became of each mutant that was tried, by its name."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTEST_DEBUG_TEMPROOT": str(folder)}
    run = [sys.executable, str(ROOT / ".ci" / "collected_once.py"), str(os.cpu_count() or 1), *options]
    with (folder / "mutmut.log").open("w") as log:
        code = subprocess.run(run, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    left_out = folder / "left_out.txt"
    for name in left_out.read_text(encoding="utf-8").splitlines() if left_out.exists() else ():
        print(f"left out, for it fails in mutmut's copy without a mutant: {name}")
    results = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    listing = subprocess.run(results, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    fates = dict(re.findall(r"^\s*(\S+): (.+?)\s*$", listing, flags=re.MULTILINE))
    fates = {name: fate for name, fate in fates.items() if fate != "not checked"}
    if not fates:
        print((folder / "mutmut.log").read_text()[-3000:])
        raise SystemExit(f"mutmut made no mutants (exit code {code})")
    return fates


def judged(part: str, *, run_known: bool, count: int | None) -> bool:
    """Run a part, say what became of its mutants, and return whether that is as it must be."""
    groups = PARTS.get(part) or [group for groups in PARTS.values() for group in groups if part in group[0]]
    if part == "changed" and not (groups := with_tests(changed_modules())):
        print("changed: no module is", flush=True)
        return True
    if not groups and (ROOT / "minilora" / f"{part}.py").is_file():
        groups = with_tests({part})
    if not groups:
        raise SystemExit(f"{part} is no part: expected {', '.join(BARS)}, or a module such as layers/norm")
    prefixes = tuple(f"minilora.{module.replace('/', '.')}." for group in groups for module in group[0])
    known = {mutant for mutant in known_survivors() if mutant.startswith(prefixes)}
    options = ["--known"] * run_known
    if part in DRAWN:
        groups = [(drawn_modules(folders), tests) for folders, tests in groups]
    if sampled := part in (*DRAWN, "changed") or count is not None:
        each = -(-(count or SAMPLE) // len(groups))
        options += ["--sample", str(each), seed()]
        print(f"{part}: at most {each} mutants of each of {len(groups)} groups, drawn by {seed()}", flush=True)
    counts: Counter[str] = Counter()
    survivors: set[str] = set()
    for group in groups:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_to(folder)
            configure(folder, *group)
            fates = run_mutmut(folder, *options)
            counts.update(fates.values())
            alive = [name for name, fate in fates.items() if fate not in KILLED]
            survivors |= {described(name, diff_of(name, folder)) for name in alive}
    # A mutant with a reason computes the same as the code: no test can kill it, and none should be asked to.
    total, killed = sum(counts.values()) - len(survivors & known), sum(counts[fate] for fate in KILLED)
    print(f"{part}: {killed} killed of {total} that differ from the code ({killed / total:.1%}): {dict(counts)}")
    for mutant in sorted(survivors - known):
        print(f"survived, and no reason is known why that is right:\n    {mutant}")
    for mutant in sorted(known - survivors) if not sampled else ():
        print(f"on the list of survivors, but killed or no longer made:\n    {mutant}")
    bar = BARS.get(part) or BARS["core" if set(groups) <= set(PARTS["core"]) else "rim"]
    print(f"{part}: bar {bar:.0%}; {len(survivors)} survivors, {len(known)} on the list with a reason", flush=True)
    return killed / total >= bar


def main() -> int:
    """Return the exit code."""
    check_paths()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--known", action="store_true", help="try those on the list of survivors too")
    parser.add_argument("--sample", type=int, metavar="COUNT", help="of each part, try as many as this")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(BARS)}, or a module such as layers/norm")
    options = parser.parse_args()
    held = [judged(part, run_known=options.known, count=options.sample) for part in options.parts or BARS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
