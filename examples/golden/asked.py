"""What the engines' scripts share: an engine is asked all golden cases or, with --sessions, all sessions.

    python ENGINE.py GOLDEN RESULTS [WAY] [--cases BEGINNING]      the cases, or those whose ids begin so
    python ENGINE.py GOLDEN RESULTS [WAY] --sessions               the sessions; needs minilora installed

A WAY is a precision, or whatever else the engine's script names.
"""

import argparse
import json
from pathlib import Path

from safetensors.numpy import save_file


def options(doc, ways=("",)):
    """Return what the command line says: golden, results, way, sessions, cases; and the index of the golden folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("results", type=Path)
    if ways != ("",):
        parser.add_argument("way", nargs="?", choices=ways)
    parser.add_argument("--sessions", action="store_true", help="ask the sessions, not the cases")
    parser.add_argument("--cases", default="", metavar="BEGINNING", help="only the cases whose ids begin so")
    found = parser.parse_args()
    found.golden = found.golden.resolve()
    found.results.mkdir(parents=True, exist_ok=True)
    return found, json.loads((found.golden / "index.json").read_text())


def given(case):
    """Return the adapters of a case, as (folder, weight)."""
    return case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]


def ask_cases(said, index, answered, notes=None, save=save_file):
    """Write what `answered` returns of each case, tensors by name; print why one has no answer."""
    for case in index["cases"]:
        if not case["id"].startswith(said.cases):
            continue
        case.setdefault("base", index["base"])
        try:
            tensors = answered(case)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            lines = str(error).strip().splitlines() or [""]
            print(f"{case['id']}: {type(error).__name__}: {lines[0][:160]}", flush=True)
            continue
        save(tensors, said.results / f"{case['id']}.safetensors", notes(case) if callable(notes) else notes)


def ask_sessions(said, start, computed_in=None):
    """Hand the sessions to an engine, and print what has no answer; see `minilora.conformance.golden.asking`."""
    from minilora.conformance.golden.asking import ask

    for id, error in ask(said.golden, start, said.results, computed_in=computed_in).items():
        print(f"{id}: {error[:200]}")
