"""The list of mutants that no test can kill, each of which is of code that is there."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mutation():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("mutation", ROOT / ".ci" / "mutation.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_every_mutant_on_the_list_can_still_be_made(mutation):
    known = mutation.known_survivors()
    assert len(known) > 100
    assert mutation.stale_entries(known, mutation.functions()) == []


LINES = {
    "m.f: return zip(a, b, strict=False)": True,
    "m.f: return zip(a, b, strict=None)": True,
    "m.f: return zip(a, b, )": True,
    'm.f: raise ValueError("XXno such pairXX")': True,
    'm.f: raise ValueError("NO SUCH PAIR")': True,
    "m.f: if (len(a) > 1) and False:": True,
    "m.f: if len(a) >= 1:": True,
    "m.f: return zip(a, b, c, d, strict=False)": False,  # of a line that was rewritten
    'm.f: raise ValueError("no pair of such a size")': False,
    "m.g: return zip(a, b, strict=False)": False,
}
"""Entries of the list, and whether a mutant of the function below may read so."""
F = 'def f(a, b): if len(a) > 1: raise ValueError("no such pair") return zip(a, b, strict=True)'


@pytest.mark.parametrize("entry", LINES)
def test_an_entry_without_its_function_or_line_is_stale(mutation, entry):
    assert (mutation.stale_entries([entry], {"m.f": F}) == []) is LINES[entry]


def test_a_stale_entry_ends_each_run_before_it_begins(mutation, monkeypatch, tmp_path):
    entry = "minilora.lora.gone: return 1"
    (tmp_path / "known.txt").write_text(f"{entry}  ## no matter\n")
    monkeypatch.setattr(mutation, "KNOWN", tmp_path / "known.txt")
    monkeypatch.setattr(mutation, "judged", lambda *part, **more: pytest.fail("mutants are drawn"))
    with pytest.raises(SystemExit, match=entry):
        mutation.main()


def test_methods_and_functions_inside_are_found_by_name(mutation):
    found = mutation.functions()
    assert found["minilora.lora.LoRA.forward"].startswith("def forward(self, ")
    assert "minilora.cli.main" in found
    assert len(found) > 1000
