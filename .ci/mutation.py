"""Run mutmut and hold its result against the survivors that are known, each with the reason why it changes nothing.

    python .ci/mutation.py

A mutant that survives and is not on the list is a hole in the tests, and fails the run; so does a score under 98 %. One
that is on the list and was killed is only told.
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
BAR = 0.98
KILLED = ("killed", "timeout", "segfault")
COPIED = ("minilora", "tests", "examples", "README.md", "LICENSE", "pyproject.toml")


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


def run_mutmut(folder: Path) -> dict[str, str]:
    """Return what became of each mutant, by its name."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
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


def main() -> int:
    """Return the exit code."""
    known = known_survivors()
    with tempfile.TemporaryDirectory() as folder:
        found = run_mutmut(Path(folder))
        survivors = {described(name, Path(folder)) for name, fate in found.items() if fate not in KILLED}
    counts = Counter(found.values())
    killed = sum(counts[fate] for fate in KILLED)
    score = killed / len(found)
    print(f"{len(found)} mutants, {killed} killed ({score:.1%}): {dict(counts)}")
    new, gone = sorted(survivors - known.keys()), sorted(known.keys() - survivors)
    for mutant in new:
        print(f"survived, and no reason is known why that is right:\n    {mutant}")
    for mutant in gone:
        print(f"on the list of survivors, but killed or no longer made:\n    {mutant}")
    print(f"bar {BAR:.0%}; {len(survivors)} survivors, {len(known)} on the list with a reason")
    return 1 if new or score < BAR else 0


if __name__ == "__main__":
    sys.exit(main())
