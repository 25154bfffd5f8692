"""Run mutmut and hold its result against the survivors that are known, each with the reason why it changes nothing.

    python .ci/mutation.py [core] [rim] [MODULE ...]

The core is the mathematics, as [tool.mutmut] in pyproject.toml has it; the rim is what reads and writes files, all of
it, or the modules that are mutated together with the one named. A score below the bar fails the run. A mutant that
survives and is not on the list is a hole in the tests, and is shown; so is one on the list that was killed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / ".ci" / "surviving_mutants.txt"
BARS = {"core": 0.98, "rim": 0.95}
KILLED = ("killed", "timeout", "segfault")
COPIED = ("minilora", "tests", "examples", "README.md", "LICENSE", "pyproject.toml")

RIM = (
    (("writing", "errors", "basefile"), ("writing", "errors", "merge")),
    (("merge", "layouts"), ("merge", "kinds", "layouts")),
    (("checkpoint", "checkpointfile", "state"), ("checkpoint", "training/test_train", "training/test_text")),
    (("tensorfile", "patterns"), ("tensorfile", "adapters", "patterns", "merge", "errors")),
    (("adapters", "adapterfolder", "kinds"), ("adapters", "kinds", "writing")),
    (("peftconfig", "inspection"), ("adapters", "patterns", "inspection", "kinds")),
)
"""Modules of minilora/files, and the tests in tests/files that are about them: all tests would take hours."""
SLOW = (
    *(
        "killed_at_random",
        "killed_while",
        "killed_in_each",
        "two_writers",
        "little_memory",
        "to_fill_the_memory",
        "widened_whole",
        "thousands_of",
    ),
    *("many_dots", "more_names", "time_is_for", "endless"),
)
"""What the slow tests of files are about, by words of their names. No mutant waits for them."""


def configure_rim(folder: Path, modules: tuple[str, ...], tests: tuple[str, ...]) -> None:
    """Let mutmut, in a copy of the repository, mutate those modules of minilora/files and run those tests."""
    file = folder / "pyproject.toml"
    before, _, core = file.read_text(encoding="utf-8").partition("[tool.mutmut]")
    arguments = re.search(r"^pytest_add_cli_args = \[(.*)\]$", core, flags=re.MULTILINE)
    assert arguments is not None
    selected = [f"tests/{test}.py" if "/" in test else f"tests/files/test_{test}.py" for test in tests]
    lines = [
        "[tool.mutmut]",
        'source_paths = ["minilora"]',
        f"only_mutate = {[f'minilora/files/{module}.py' for module in modules]}",
        f'pytest_add_cli_args = [{arguments[1]}, "-k", "not {" and not ".join(SLOW)}"]',
        f"pytest_add_cli_args_test_selection = {selected}",
    ]
    file.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


def known_survivors() -> dict[str, str]:
    """Read the list: a mutant as `described` gives it, and the reason."""
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("  ## ", 1) for line in lines)


def described(name: str, folder: Path) -> str:
    """Return the function that a mutant is of, and the line as the mutant has it."""
    show = [sys.executable, "-m", "mutmut", "show", name]
    diff = subprocess.run(show, cwd=folder, capture_output=True, text=True, check=True).stdout
    changed = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    function = re.sub(r"__mutmut_\d+$", "", name).replace("xǁ", "").replace("ǁ", ".").replace(".x_", ".")
    return f"{function}: {' '.join(changed)}"


def copy_to(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)


def run_mutmut(folder: Path) -> dict[str, str]:
    """Return what became of each mutant, by its name."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".ci")}
    run = [sys.executable, "-m", "mutmut", "run", "--max-children", str(os.cpu_count() or 1)]
    with (folder / "mutmut.log").open("w") as log:
        code = subprocess.run(run, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    results = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    listing = subprocess.run(results, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^\s*(\S+): (.+?)\s*$", listing, flags=re.MULTILINE))
    if not found:
        print((folder / "mutmut.log").read_text()[-3000:])
        raise SystemExit(f"mutmut made no mutants (exit code {code})")
    return found


def judged(part: str) -> bool:
    """Run a part, say what became of its mutants, and return whether that is as it must be."""
    groups = [None] if part == "core" else [group for group in RIM if part == "rim" or part in group[0]]
    if not groups:
        raise SystemExit(f"{part} is no part: expected core, rim, or a module of the rim")
    prefixes = tuple(f"minilora.files.{module}." for group in groups if group for module in group[0])
    known = {m for m in known_survivors() if m.startswith(prefixes or "minilora.") and (prefixes or ".files." not in m)}
    counts: Counter[str] = Counter()
    survivors: set[str] = set()
    for group in groups:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_to(folder)
            if group:
                configure_rim(folder, *group)
            found = run_mutmut(folder)
            counts.update(found.values())
            survivors |= {described(name, folder) for name, fate in found.items() if fate not in KILLED}
    total, killed = sum(counts.values()), sum(counts[fate] for fate in KILLED)
    print(f"{part}: {total} mutants, {killed} killed ({killed / total:.1%}): {dict(counts)}")
    for mutant in sorted(survivors - known):
        print(f"survived, and no reason is known why that is right:\n    {mutant}")
    for mutant in sorted(known - survivors):
        print(f"on the list of survivors, but killed or no longer made:\n    {mutant}")
    bar = BARS.get(part, BARS["rim"])
    print(f"{part}: bar {bar:.0%}; {len(survivors)} survivors, {len(known)} on the list with a reason", flush=True)
    return killed / total >= bar


def main() -> int:
    """Return the exit code."""
    parts = sys.argv[1:] or list(BARS)
    return 1 if False in [judged(part) for part in parts] else 0


if __name__ == "__main__":
    sys.exit(main())
