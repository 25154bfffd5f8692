"""Hold the implementations that are installed against the suite, and write docs/recordings/other-implementations.json.

    python examples/measure/implementations.py [PYTHON ...]

Each PYTHON is an interpreter, such as that of a virtual environment, in which minilora and some of the implementations
are installed; by default the one that runs this. Every implementation is checked in a process of its own. What was
measured before for an implementation that is not found stays in the file.
"""

import json
import math
import re
import subprocess
import sys
from datetime import date

from written import RECORDINGS, ROOT, keep

HERE = ROOT / "examples" / "conformance"
FILE = RECORDINGS / "other-implementations.json"
# The wrapper of each, and the distribution whose version is reported.
WRAPPERS = {
    "peft_lora": "peft",
    "loralib_lora": "loralib",
    "torchtune_lora": "torchtune",
    "litgpt_lora": "litgpt",
    "lycoris_lora": "lycoris-lora",
    "keras_lora": "keras",
    "flax_lora": "flax",
    "mlx_lora": "mlx-lm",
    "lora_pytorch_lora": "lora-pytorch",
}
WHERE = r" \((N|in)=[^()]*(\([^()]*\)[^()]*)*\)(, in .*)?$"  # the problem that a diagnosis ends with, and the line
OFFERED = ("forward", "slope", "merge", "merged and back", "start", "adam", "cat", "linear", "svd")
CHECK = """
import importlib, json, sys, warnings
from importlib.metadata import version
warnings.simplefilter("ignore")
NAMES = ("orientation", "scaling", "detached_norm", "slots", "one_rank", "one_width")
sys.path.insert(0, sys.argv[1])
found = version(sys.argv[3])
from minilora.conformance import check
module = importlib.import_module(sys.argv[2])
declared = {
    kind: {name: value for name in NAMES if (value := getattr(one, name, None)) is not None}
    for kind, one in {"linear": module, **getattr(module, "kinds", {})}.items()
}
report = check(module, name=sys.argv[3]).as_dict()
print("\\n" + json.dumps({"version": found, "declared": declared, "report": report}))
"""


def checked(python, wrapper, distribution):
    """Check one implementation in a process of its own; None where it is not installed there."""
    command = [python, "-c", CHECK, str(HERE), wrapper, distribution]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if "PackageNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{distribution}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def entry(distribution, version, declared, report):
    """What the page's table shows of a report."""
    kinds = {"linear": report, **report["kinds"]}
    return {
        "implementation": distribution,
        "version": version,
        "date": date.today().isoformat(),
        "kinds": {kind: row(kind, one, declared[kind]) for kind, one in kinds.items()},
    }


def row(kind, report, declared):
    """Of one kind: what it offers, the digits to which that is right, and what is not as the formulas have it."""
    errors = report["errors"]
    if kind == "mixed":  # whose other answers are rounded to bfloat16
        errors = {name: errors[name] for name in ("lora_A", "lora_B") if name in errors}
    worst = max((math.inf if error is None else error for error in errors.values()), default=math.inf)
    offered = [claim for claim in OFFERED if report["claims"].get(claim, "not offered") != "not offered"]
    return {
        "dtype": report["dtype"],
        "declared": declared,
        "offers": offered,
        "digits": round(-math.log10(worst), 1) if 0 < worst < math.inf else None,
        "deviations": [re.sub(WHERE, "", said(diagnosis)) for diagnosis in report["diagnoses"]],
    }


def said(diagnosis):
    """What is wrong, and where that was made before."""
    return diagnosis["says"] + (f" (made in {diagnosis['source']})" if diagnosis["source"] else "")


def main(pythons):
    rows = (
        {one["implementation"]: one for one in json.loads(FILE.read_text())["implementations"]} if FILE.exists() else {}
    )
    for wrapper, distribution in WRAPPERS.items():
        for python in pythons:
            found = checked(python, wrapper, distribution)
            if found:
                rows[distribution] = entry(distribution, **found)
                print(distribution, found["version"], "passed" if found["report"]["passed"] else "deviates")
                break
        else:
            print(distribution, "is not installed")
    known = [rows[name] for name in WRAPPERS.values() if name in rows]
    keep(FILE, __file__, {"implementations": known})


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
