"""Names and regular expressions of a configuration mean what they mean to PEFT, and never take long."""

import contextlib
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.guards import boundedpatterns as patterns
from minilora.guards.boundedpatterns import Matching
from minilora.guards.boundedprocess import BoundedProcess

from ..support.memory import traced


@contextlib.contextmanager
def refused(folder, match, key=None):
    """Expect an error that names the configuration's file, the key in it, and what is wrong."""
    with pytest.raises(FileRefused, match=match) as error:
        yield
    text = str(error.value)
    assert text.startswith(f"'{folder}/adapter_config.json': {key or ''}")
    assert "None" not in text
    assert len(text) < 700
    assert text.isprintable()


def write(folder, modules, **config):
    """Write an adapter of rank 2 as PEFT does, with these modules and keys of the configuration."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ones((2, 3), "f4")
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ones((4, 2), "f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


MODULES = ["enc.q_proj", "enc.k_proj", "dec.0.q_proj", "dec.10.Fc", "q_proj", "a+b", "decX0.q_proj", "x.a-b"]


def peft_key(keys, module):
    """PEFT's own rule, as it is written there (peft.utils.other.get_pattern_key)."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), module)


PARTS = [
    "enc",
    "dec",
    ".",
    r"\.",
    "q_proj",
    "0",
    "10",
    "Fc",
    "^",
    "$",
    "a",
    "-",
    r"\+",
    ".*",
    r"\d+",
    "(q|k)_proj",
    "X",
]


@given(keys=st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join), unique=True, max_size=6))
def test_the_first_pattern_that_matches_is_peft_s(tmp_path_factory, keys):
    with Matching(tmp_path_factory.getbasetemp()) as matching:
        numbers = matching.first("alpha_pattern", keys, MODULES)
    for module, number in zip(MODULES, numbers, strict=True):
        assert (module if number is None else keys[number]) == peft_key(keys, module)


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ({"q_proj": 7, "enc.q_proj": 8}, 7),  # the first that matches
        ({"enc.q_proj": 8, "q_proj": 7}, 8),
        ({".*": 7, "^enc\\.q_proj": 8}, 7),  # an expression before a name
        ({"^enc\\.q_proj": 8, ".*": 7}, 8),
        ({"proj": 7}, 4),  # an end of the path, but not from a dot on
        ({r"enc\.(q|k)_proj": 7}, 7),
        ({r".*q_proj": 7}, 7),
        ({"^q_proj": 7}, 4),
        ({"q_proj$": 7}, 7),
        ({r"layers\.[0-9]+\.q_proj": 7}, 4),
        ({"encXq_proj": 7}, 4),
        ({"e.c.q_proj": 7}, 7),  # a bare dot stands for any character
        ({r"e\.c.q_proj": 7}, 4),
        ({r"(?<!k)q_proj": 7}, 7),
        ({r"(?<=enc\.)q_proj": 7}, 7),
        ({r"(?!k)._proj": 7}, 7),
        ({r"(?i)Q_PROJ": 7}, 7),  # Python 3.10 takes the flag there for all of the pattern
        ({r"(?i:Q)_proj": 7}, 7),
        ({r"Q_PROJ": 7}, 4),
        ({"x)|(enc": 7}, 4),
        ({"enc)|(x": 7}, 7),  # PEFT's parentheses close early: "enc" need not be the end
    ],
)
def test_patterns_match_as_in_peft(tmp_path, pattern, alpha):
    folder = write(tmp_path, ["enc.q_proj", "head"], alpha_pattern=pattern)
    assert load_adapter(folder)["enc.q_proj"].alpha == alpha


def test_a_key_that_is_the_path_itself_counts_last(tmp_path):
    """As an expression "a+b" does not match the path "a+b", but PEFT then looks it up as it is."""
    folder = write(tmp_path, ["a+b", "aab"], alpha_pattern={"a+b": 7}, rank_pattern={"x+": 9})
    assert {name: lora.alpha for name, lora in load_adapter(folder).items()} == {"a+b": 7, "aab": 7}
    folder = write(tmp_path, ["a+b", "aab"], alpha_pattern={"a+b": 7, r"^a\+.": 8})
    assert {name: lora.alpha for name, lora in load_adapter(folder).items()} == {"a+b": 8, "aab": 7}


@pytest.mark.parametrize(
    ("targets", "stranger"),
    [
        (["q_proj", "head"], None),
        (["enc.q_proj", "head"], None),
        (["enc.*", "head"], "enc.q_proj"),  # in a list, names
        (["proj", "head"], "enc.q_proj"),
        (["q_proj"], "head"),
        (r".*(q_proj|head)", None),
        (r"(?i)ENC\.Q_PROJ|Head", None),
        (r"(?!dec).*", None),
        (r"(?!enc).*", "enc.q_proj"),
        ("q_proj|head", "enc.q_proj"),  # an expression is for the whole path
    ],
)
def test_targets_name_modules_as_in_peft(tmp_path, targets, stranger):
    folder = write(tmp_path, ["enc.q_proj", "head"], target_modules=targets)
    if stranger is None:
        assert load_adapter(folder).keys() == {"enc.q_proj", "head"}
    else:
        with refused(tmp_path, f"target_modules does not name '{stranger}'"):
            load_adapter(folder)


def test_targets_are_taken_letter_for_letter(tmp_path):
    folder = write(tmp_path, ["enc.a+b", "x"], target_modules=["a+b", "x"], exclude_modules=["enc.a.b", "a"])
    assert load_adapter(folder).keys() == {"enc.a+b", "x"}


@pytest.mark.parametrize(
    ("config", "stranger"),
    [
        ({"layers_to_transform": [0, 12]}, None),
        ({"layers_to_transform": 0}, "m.layers.12.q"),
        ({"layers_to_transform": [0, 2]}, "m.layers.12.q"),
        ({"layers_to_transform": []}, None),
        ({"layers_to_transform": None}, None),
        ({"layers_to_transform": [7], "target_modules": ["m.layers.0.q", "m.layers.12.q"]}, None),  # whole paths
        ({"layers_to_transform": [7], "target_modules": ["m.layers.0.q", "q"]}, "m.layers.12.q"),
        ({"layers_to_transform": [7], "target_modules": ".*q"}, None),
        ({"layers_to_transform": [0, 12], "layers_pattern": "layers"}, None),
        ({"layers_to_transform": [0, 12], "layers_pattern": ["h", "lay.*"]}, None),
        ({"layers_to_transform": [0, 12], "layers_pattern": ["h", "m"]}, "m.layers.0.q"),
        ({"layers_to_transform": [0, 12], "layers_pattern": ""}, None),
    ],
)
def test_layers_to_transform_are_numbered_as_in_peft(tmp_path, config, stranger):
    folder = write(tmp_path, ["m.layers.0.q", "m.layers.12.q"], **({"target_modules": ["q"]} | config))
    if stranger is None:
        assert len(load_adapter(folder)) == 2
    else:
        with refused(
            tmp_path, "does not name the layer of", f"layers_to_transform does not name the layer of '{stranger}'"
        ):
            load_adapter(folder)


@pytest.mark.parametrize(("path", "number"), [("010", 10), ("10", 10), ("0100", 100), ("00", 0)])
def test_a_layers_number_may_have_zeros_before_it(tmp_path, path, number):
    folder = write(tmp_path, [f"m.layers.{path}.q"], target_modules=["q"], layers_to_transform=[number])
    assert len(load_adapter(folder)) == 1
    folder = write(tmp_path, [f"m.layers.{path}.q"], target_modules=["q"], layers_to_transform=[1])
    with refused(tmp_path, "does not name the layer of"):
        load_adapter(folder)


def test_a_key_that_is_a_path_means_that_path(tmp_path):
    """As PEFT does, where no pattern matches: read as an expression, a+b is one or more a, and b."""
    folder = write(tmp_path, ["a+b", "c"], r=5, lora_alpha=7, rank_pattern={"a+b": 2, "c": 2}, alpha_pattern={"a+b": 3})
    found = load_adapter(folder)
    assert {path: (adapter.rank, adapter.alpha) for path, adapter in found.items()} == {"a+b": (2, 3), "c": (2, 7)}


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_what_is_no_expression_is_named_with_its_key(tmp_path, key):
    folder = write(tmp_path, ["a.b"], **{key: "a(" if "modules" in key else {"a(": 2}})
    with refused(tmp_path, "is not a regular expression", f"{key}: 'a\\('".replace("\\", "")):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"layers_to_transform": "0"}, "layers_to_transform is '0', expected an integer"),
        ({"layers_to_transform": [0, True]}, r"layers_to_transform is \[0, True\], expected an integer"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern is 3, expected a list of names"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern: '\\(' is not a regular expression"),
        ({"exclude_modules": [""]}, r"exclude_modules is \[''\], expected a list of names"),
    ],
)
def test_layers_that_cannot_be_numbered_are_refused(tmp_path, config, match):
    with refused(tmp_path, match):
        load_adapter(write(tmp_path, ["m.layers.0.q"], **({"target_modules": ["q"]} | config)))


# --- what is refused ---


HOSTILE = [r"(\w+\s?)+X", r"((a|a)*)*[bc]", r"(?:a|(?:aa)+)+[bc]", r"([a-z]+)*\1\d", r"(?=(a+)+[bc])a"]
KEYS = ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"]


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        *((key, HOSTILE[0]) for key in KEYS),
        *(pytest.param(KEYS[0], pattern, marks=pytest.mark.long) for pattern in HOSTILE[1:]),
    ],
)
def test_an_endless_regular_expression_is_stopped(tmp_path, monkeypatch, key, pattern):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.1)
    folder = write(tmp_path, ["a" * 64 + "!"], **{key: pattern if "modules" in key else {pattern: 2}})
    with refused(folder, r"matching takes more than 0\.1 s\. Name the modules by their whole paths", f"{key}: "):
        load_adapter(folder)


def test_an_expression_that_fills_the_memory_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "MATCHING_MEMORY", 1 << 26)
    folder = write(tmp_path, ["a" * 2_000_000], alpha_pattern={"(a|b)*(?=c)": 2})
    with refused(folder, "matching cannot be done: it fills more than 67 MB of memory", "alpha_pattern: "):
        load_adapter(folder)


def test_where_no_time_remains_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(BoundedProcess, "ask", None)
    with Matching(tmp_path / "adapter_config.json") as matching:
        matching.end = 0.0
        with refused(tmp_path, "takes more than 3 s", "first: matching"):
            matching.first("first", ["a+"], ["a"])
        with refused(tmp_path, "takes more than 3 s", "named: matching"):
            matching.named("named", ["a"], ["a"])
        with refused(tmp_path, "takes more than 3 s", "whole: matching"):
            matching.whole("whole", "a", ["a"])


def test_the_time_is_for_all_patterns_together(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.4)
    table = {rf".*(a|b)+{n}[cd]": 1 for n in range(300)}
    folder = write(tmp_path, [f"m{i}." + "ab" * 2000 for i in range(50)], alpha_pattern=table)
    with refused(folder, "matching takes more than 0.4 s", "alpha_pattern: "):
        load_adapter(folder)


def test_the_time_of_one_question_is_gone_for_the_next(tmp_path):
    with Matching(tmp_path / "adapter_config.json") as matching:
        before = matching.remaining("key")
        assert matching.whole("key", "(a|b)+", ["ab" * 100_000]) == [True]
        assert matching.remaining("key") < before - matching.process.used + 0.01
        assert matching.process.seconds == pytest.approx(patterns.MATCHING_SECONDS, abs=0.5)


@pytest.mark.parametrize(
    "pattern",
    ["(", "[" * 999, "(?R)?a", "(a)(?i)b", r"\p{L}+", "[[:alpha:]]", "(?x)(a)", "(" * 9000 + "a" + ")" * 9000],
)
def test_what_pefts_engine_refuses_is_refused(tmp_path, pattern):
    shown = re.escape(repr(pattern)) if len(pattern) < 100 else ".*"
    with refused(tmp_path, f"{shown} is not a regular expression: ", "alpha_pattern: "):
        load_adapter(write(tmp_path, ["a"], alpha_pattern={pattern: 1}))


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("(a){e<=1}", "a{e<=1}"),  # what another engine takes for an approximate match
        ("(?x:a b)", "ab"),
        (r"f\{(99999|x)\}(f)", "f{x}f"),
        ("(c{100}){100}", "c" * 10_000),
    ],
)
def test_an_expression_means_what_it_means_to_peft(tmp_path, pattern, path):
    folder = write(tmp_path, [path], alpha_pattern={pattern: 7})
    assert load_adapter(folder)[path].alpha == (7 if peft_key([pattern], path) == pattern else 4)


def test_short_names_and_dots_at_odd_places_are_found(tmp_path):
    with Matching(tmp_path) as matching:
        for module in ("a.b.c", "ab.c.d", "a..b", "a.b.c.d.e"):
            for end in {module[i:] for i in range(len(module)) if i == 0 or module[i - 1] == "."}:
                assert matching.named("key", ["x", end], [module]) == [True]
            for other in ("b.", "c.d.", ".", "a", "ab", "..b", ""):
                assert matching.named("key", [other], [module]) == [False]
        assert matching.named("key", [".x", "", "x"], [".x", "x.", "y.x"]) == [True, True, True]
        assert matching.first("key", ["y", "x"], [".x"]) == [1]


# --- linear time ---


def many(count):
    """Layers with a rank and an alpha of their own, named as in a large model."""
    names = [f"model.layers.{i // 7}.self_attn.{'abcdefg'[i % 7]}_proj" for i in range(count)]
    shapes = [(1 + i % 3, 2) for i in range(count)]
    return {
        name: LoRA(np.ones(shape, "f4"), np.ones(shape[::-1], "f4"), float(i + 1))
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


@pytest.mark.long
@pytest.mark.parametrize("escaped", [True, False])
def test_thousands_of_own_alphas_run_no_expression(tmp_path, monkeypatch, escaped):
    """3,000 layers take 0.2 s; matching each pattern with each path would take 9,000,000 steps."""
    layers = many(3000 if escaped else 500)
    save_adapter(tmp_path, layers)
    if not escaped:  # as people write them
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["rank_pattern"] = {name: lora.rank for name, lora in layers.items()}
        config["alpha_pattern"] = {name: lora.alpha for name, lora in layers.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(BoundedProcess, "ask", None)
    compared = []
    real = patterns._Plain.find

    def find(self, text):
        compared.extend(self.by_length.get(len(text), ()))
        return real(self, text)

    monkeypatch.setattr(patterns._Plain, "find", find)
    start = time.process_time()
    loaded = load_adapter(tmp_path)
    assert time.process_time() - start < 5
    assert len(compared) < 20 * len(layers)
    assert {name: (lora.rank, lora.alpha) for name, lora in loaded.items()} == {
        name: (lora.rank, lora.alpha) for name, lora in layers.items()
    }


def test_a_path_of_many_dots_takes_little_time_and_memory(tmp_path):
    path = ".".join("ab" * 25_000)
    write(tmp_path, [path], target_modules=["b", "a.b"], alpha_pattern={"^a.b": 2, "a": 3, "b.a.b": 7, "b": 4})
    start = time.process_time()
    with traced() as memory:
        assert load_adapter(tmp_path)[path].alpha == 7
    assert time.process_time() - start < 3
    assert memory.peak < 40e6


@pytest.mark.long
@pytest.mark.parametrize("part", [".", r"\.", *(pytest.param(part, marks=pytest.mark.long) for part in ("a.", "a"))])
def test_a_long_plain_pattern_takes_little_memory(tmp_path, part):
    """A regular expression that judged all of it would take 60 MB."""
    pattern = part * (300_000 // len(part))
    with traced() as memory:
        paths = [pattern.replace("\\", ""), "y" * 300_000]
        assert Matching(tmp_path).first("alpha_pattern", ["x", pattern], paths) == [1, 1 if part == "." else None]
    assert memory.peak < 15e6
