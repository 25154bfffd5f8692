"""Names and regular expressions of a configuration mean what they mean to PEFT, and never take long."""

import contextlib
import json
import re
import time

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.guards import boundedpatterns as patterns
from minilora.guards.boundedpatterns import Clock, Patterns

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
    clock = Clock(tmp_path_factory.getbasetemp())
    found = Patterns(clock, "alpha_pattern", keys)
    for module in MODULES:
        number = found.first(module)
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
    folder = write(tmp_path, ["a" * 10_001], **{key: "a.+" if "modules" in key else {"a.+": 2}})
    with refused(tmp_path, "is too long for a regular expression", f"{key}: the path"):
        load_adapter(folder)


def test_no_time_left_is_said_before_an_expression_is_compiled(tmp_path):
    clock = Clock(tmp_path / "adapter_config.json")
    clock.end = 0.0
    with refused(tmp_path, "matching takes more than", "rank_pattern: "):
        patterns.compiled(clock, "rank_pattern", "a|b", shown="a|b")


def test_a_layer_too_long_to_be_numbered_is_named(tmp_path):
    path = f"m.layers.1.{'q' * 10_001}"
    folder = write(tmp_path, [path], target_modules=["q" * 10_001], layers_to_transform=[1])
    with refused(tmp_path, "is too long for a regular expression", "layers_pattern: the path"):
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


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern", [r"(\w+\s?)+X", r"((a|a)*)*[bc]", r"(?:a|(?:aa)+)+[bc]", r"([a-z]+)*\1\d", r"(?=(a+)+[bc])a"]
)
def test_an_endless_regular_expression_is_stopped(tmp_path, monkeypatch, key, pattern):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.02)
    # The last character keeps the engine from seeing at once that nothing can match.
    folder = write(tmp_path, ["a" * 64 + "!"], **{key: pattern if "modules" in key else {pattern: 2}})
    start = time.process_time()
    try:
        load_adapter(folder)
    except FileRefused as error:
        assert str(error).startswith(f"'{folder}/adapter_config.json': {key}")  # noqa: PT017
    assert time.process_time() - start < 2


def test_a_match_is_given_the_time_that_is_left(tmp_path):
    clock, asked = Clock(tmp_path / "adapter_config.json"), []

    def match(module, timeout):
        asked.append((module, timeout))
        if module == "slow":
            raise TimeoutError
        return module == "yes"

    assert [patterns.matched(clock, "key", match, module) for module in ("yes", "no")] == [True, False]
    with refused(tmp_path, "takes more than 3 s", "key: matching"):
        patterns.matched(clock, "key", match, "slow")
    assert [module for module, _ in asked] == ["yes", "no", "slow"]
    assert 3 > asked[0][1] >= asked[1][1] >= asked[2][1] > 2
    with refused(tmp_path, "takes more than 3 s", "other: matching"):  # and none is left for what comes after
        patterns.matched(clock, "other", match, "yes")
    with refused(tmp_path, "takes more than 3 s", "third: matching"):
        Patterns(clock, "third", ["a"]).first("a")


def test_the_time_is_for_all_patterns_together(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.2)
    table = {rf".*(a|b)+{n}[cd]": 1 for n in range(300)}
    folder = write(tmp_path, [f"m{i}." + "ab" * 2000 for i in range(50)], alpha_pattern=table)
    start = time.process_time()
    advice = "Name the modules by their whole paths, which takes no time, or use simpler and fewer regular expressions"
    with refused(folder, f"matching takes more than 0.2 s. {advice}$", "alpha_pattern: "):
        load_adapter(folder)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("(", "not a regular expression"),
        ("[" * 999, "not a regular expression"),
        ("(" * 500 + "a" + ")" * 500, "characters, over 1000"),
        ("(" * 400 + "a" + ")" * 400, "not a regular expression"),
        ("[[:alpha:]]", "holds '\\[:'"),
        ("(a){e<=1}", "holds '{'"),
        ("(?x)a{6 4}", "holds '{'"),
        ("(?ix)(a)b", r"holds '\(\?x\)'"),
        ("(?x:a b)", r"holds '\(\?x\)'"),
        (r"\p{L}+", "holds '{'"),
        ("(?R)?a", "not a regular expression"),
        ("(a)(?i)b", "not a regular expression"),
        ("((a{99}){99}){99}", "multiply to 1e.06, over 10,000"),
        ("(a{99999})", "multiply to 1e.05, over 10,000"),
        ("(a{,99999})", "multiply to 1e.05, over 10,000"),
        ("(a{9,})" * 5, "multiply to 6e.04, over 10,000"),
        ("[a-z]" * 200 + "x", "has 1001 characters, over 1000"),
        ("(ab){5001}(c){2}", "multiply to 1e.04, over 10,000"),
        ("(?i-x:a)", r"holds '\(\?x\)'"),
        ("(?ux)a", r"holds '\(\?x\)'"),
        ("a{1}{", "holds '{'"),
    ],
)
def test_an_expression_that_cannot_be_run_is_refused(tmp_path, pattern, match):
    for config in ({"alpha_pattern": {pattern: 1}}, {"target_modules": pattern}):
        (key,) = config
        with refused(tmp_path, match, f"{key}: "):
            load_adapter(write(tmp_path, ["a"], **config))
        if len(pattern) < 100:
            with refused(tmp_path, re.escape(repr(pattern))):
                load_adapter(tmp_path)


def test_counts_and_braces_within_bounds_are_taken(tmp_path):
    """As many as multiply to 10,000; an open end counts as its beginning, and what is escaped not at all."""
    table = {
        r"l\d{1,2}\.(a){100}": 7,
        r"l\d{,9}\.b{100}": 8,
        r"(c{100}){100}": 9,
        r"(d{1}){1}(d{10000})": 10,
        r"(e{1,}){9}(e{1000,})": 11,
        r"f\{(99999|x)\}(f)": 12,
        r"g[\d:]+(h)": 14,
        "[a-z]" * 200: 13,
    }
    modules = [
        "l12." + "a" * 100,
        "l12." + "b" * 100,
        "c" * 10_000,
        "d" * 10_000,
        "e" * 1010,
        "f{x}f",
        "z" * 200,
        "g1:h",
    ]
    folder = write(tmp_path, [m for m in modules if len(m) <= patterns.MAX_SUBJECT], alpha_pattern=table)
    loaded = load_adapter(folder)
    found = [loaded[module].alpha for module in modules]
    assert found == [7, 8, 9, 4, 11, 12, 13, 14]  # the engine's (d{1}){1}(d{10000}) is one letter longer


def test_the_limits_themselves_are_taken(tmp_path, monkeypatch):
    pattern = "(a)" * 333 + "a"
    assert len(pattern) == patterns.MAX_PATTERN
    assert load_adapter(write(tmp_path, ["a" * 334], alpha_pattern={pattern: 7}))["a" * 334].alpha == 7
    clock = Clock(tmp_path)
    clock.end = time.process_time() + 0.9  # less than a second is time enough
    assert 0 < clock.left("key") <= 0.9


def test_expressions_are_not_kept_from_one_file_for_the_next(tmp_path):
    before = len(regex._main._cache)
    load_adapter(write(tmp_path, ["a"], alpha_pattern={"a(b|c)?" + "d?" * 7: 7}))
    assert len(regex._main._cache) == before


def test_a_path_too_long_for_an_expression_is_named(tmp_path):
    longest = "a" * patterns.MAX_SUBJECT
    assert load_adapter(write(tmp_path, [longest], alpha_pattern={"a+": 7}))[longest].alpha == 7
    with refused(tmp_path, "the path 'aaa.* too long for a regular expression; name it as it is", "alpha_pattern: "):
        load_adapter(write(tmp_path, [longest + "a"], alpha_pattern={"a+": 7}))
    assert load_adapter(write(tmp_path, [longest + "a"], alpha_pattern={longest + "a": 7}))[longest + "a"].alpha == 7


def test_short_names_and_dots_at_odd_places_are_found(tmp_path):
    for module in ("a.b.c", "ab.c.d", "a..b", "a.b.c.d.e"):
        for end in {module[i:] for i in range(len(module)) if i == 0 or module[i - 1] == "."}:
            assert Patterns(Clock(tmp_path), "key", ["x", end], literal=True).first(module) == 1
        for other in ("b.", "c.d.", ".", "a", "ab", "..b", ""):
            assert Patterns(Clock(tmp_path), "key", [other], literal=True).first(module) is None
    assert Patterns(Clock(tmp_path), "key", [".x", "", "x"], literal=True).first(".x") == 0
    assert Patterns(Clock(tmp_path), "key", [""], literal=True).first("x.") == 0
    assert Patterns(Clock(tmp_path), "key", ["y", "x"], literal=True).first(".x") == 1


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
    monkeypatch.setattr(patterns, "matched", None)
    monkeypatch.setattr(patterns, "compiled", None)
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
        found = Patterns(Clock(tmp_path), "alpha_pattern", ["x", pattern])
    assert memory.peak < 15e6
    assert found.first(pattern.replace("\\", "")) == 1
    assert found.first("y" * 300_000) == (1 if part == "." else None)


def test_keys_that_repeat_are_found_in_linear_time(tmp_path):
    write(tmp_path, ["a"])
    text = "{" + ",".join(f'"k{i}":0' for i in range(100_000)) + ',"k99999":0}'
    (tmp_path / "adapter_config.json").write_text(text)
    start = time.process_time()
    with pytest.raises(FileRefused, match="the key 'k99999' stands twice"):
        load_adapter(tmp_path)
    assert time.process_time() - start < 3


def test_nothing_runs_over_a_pattern_that_is_too_long(tmp_path, monkeypatch):
    """Splitting its flags off took forty times its size."""
    monkeypatch.setattr(patterns, "FLAGS", None)
    with refused(tmp_path, r"rank_pattern: '\(\?i\).* has 3000000 characters, over 1000"):
        Patterns(Clock(tmp_path / "adapter_config.json"), "rank_pattern", ["(?i)" * 750_000])
