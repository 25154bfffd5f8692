"""Names and regular expressions of a configuration mean what they mean to PEFT, and are stopped."""

import contextlib
import json
import re
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.files import patterns
from minilora.files.patterns import are_named, first_matches, within_time


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


PARTS = ["enc", "dec", "q_proj", "0", "10", "Fc", "a", "X"]
PARTS += [".", r"\.", "^", "$", "-", r"\+", ".*", r"\d+", "(q|k)_proj"]


@given(keys=st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join), unique=True, max_size=6))
def test_the_first_pattern_that_matches_is_peft_s(keys):
    for module, number in zip(MODULES, first_matches(keys, MODULES), strict=True):
        assert (module if number is None else keys[number]) == peft_key(keys, module)


@pytest.mark.parametrize(
    "pattern",
    [
        *({"q_proj": 7, "enc.q_proj": 8}, {"enc.q_proj": 8, "q_proj": 7}),  # the first that matches
        *({".*": 7, r"^enc\.q_proj": 8}, {r"^enc\.q_proj": 8, ".*": 7}),  # an expression before a name
        *({"proj": 7}, {"^q_proj": 7}, {"q_proj$": 7}),  # an end of the path from a dot on
        *({r"enc\.(q|k)_proj": 7}, {r".*q_proj": 7}, {r"layers\.[0-9]+\.q_proj": 7}, {"encXq_proj": 7}),
        *({"e.c.q_proj": 7}, {r"e\.c.q_proj": 7}),  # a bare dot stands for any character
        *({r"(?<!k)q_proj": 7}, {r"(?<=enc\.)q_proj": 7}, {r"(?!k)._proj": 7}, {r"(?i:Q)_proj": 7}, {r"Q_PROJ": 7}),
        *({"x)|(enc": 7}, {"enc)|(x": 7}),  # PEFT's parentheses close early: "enc" need not be the end
    ],
)
def test_patterns_match_as_in_peft(tmp_path, pattern):
    folder = write(tmp_path, ["enc.q_proj", "head"], alpha_pattern=pattern)
    assert load_adapter(folder)["enc.q_proj"].alpha == pattern.get(peft_key(pattern, "enc.q_proj"), 4)


def test_a_key_that_is_the_path_itself_counts_last(tmp_path):
    """As an expression "a+b" does not match the path "a+b", but PEFT then looks it up as it is."""
    folder = write(tmp_path, ["a+b", "aab"], alpha_pattern={"a+b": 7}, rank_pattern={"x+": 9})
    assert {name: lora.alpha for name, lora in load_adapter(folder).items()} == {"a+b": 7, "aab": 7}
    folder = write(tmp_path, ["a+b", "aab"], alpha_pattern={"a+b": 7, r"^a\+.": 8})
    assert {name: lora.alpha for name, lora in load_adapter(folder).items()} == {"a+b": 8, "aab": 7}
    folder = write(tmp_path, ["a+b", "c"], r=5, lora_alpha=7, rank_pattern={"a+b": 2, "c": 2}, alpha_pattern={"a+b": 3})
    assert {path: (lora.rank, lora.alpha) for path, lora in load_adapter(folder).items()} == {
        "a+b": (2, 3),
        "c": (2, 7),
    }


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
    assert load_adapter(write(tmp_path, ["my_lm_head"], target_modules="all-linear")).keys() == {"my_lm_head"}


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
            tmp_path,
            "although there are tensors for it$",
            f"layers_to_transform does not name the layer of '{stranger}', ",
        ):
            load_adapter(folder)


@pytest.mark.parametrize(("path", "number"), [("010", 10), ("10", 10), ("0100", 100), ("00", 0)])
def test_a_layers_number_may_have_zeros_before_it(tmp_path, path, number):
    folder = write(tmp_path, [f"m.layers.{path}.q"], target_modules=["q"], layers_to_transform=[number])
    assert len(load_adapter(folder)) == 1
    folder = write(tmp_path, [f"m.layers.{path}.q"], target_modules=["q"], layers_to_transform=[1])
    with refused(tmp_path, "does not name the layer of"):
        load_adapter(folder)


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_what_is_no_expression_is_named_with_its_key(tmp_path, key):
    folder = write(tmp_path, ["a.b"], **{key: "a(" if "modules" in key else {"a(": 2}})
    with refused(tmp_path, "is not a regular expression", f"{key}: 'a\\('".replace("\\", "")):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"layers_to_transform": "0"}, r"Expected `int \| array`, got `str` - at `\$.layers_to_transform`"),
        ({"layers_to_transform": [0, True]}, r"Expected `int`, got `bool` - at `\$.layers_to_transform\[1\]`"),
        (
            {"layers_to_transform": [0], "layers_pattern": 3},
            r"Expected `str \| array`, got `int` - at `\$.layers_pattern`",
        ),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern: '\\(' is not a regular expression"),
        ({"exclude_modules": [""]}, r"Expected `str` of length >= 1 - at `\$.exclude_modules\[0\]`"),
    ],
)
def test_layers_that_cannot_be_numbered_are_refused(tmp_path, config, match):
    with refused(tmp_path, match):
        load_adapter(write(tmp_path, ["m.layers.0.q"], **({"target_modules": ["q"]} | config)))


# --- what is refused ---


HOSTILE = [r"(\w+\s?)+X", r"((a|a)*)*[bc]", r"(?:a|(?:aa)+)+[bc]", r"([a-z]+)*\1\d", r"(?=(a+)+[bc])a"]


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_an_endless_regular_expression_is_stopped(tmp_path, monkeypatch, key):
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    folder = write(tmp_path, ["a" * 64 + "!"], **{key: HOSTILE[0] if "modules" in key else {HOSTILE[0]: 2}})
    way = "Name the modules by their full paths, or use fewer and simpler regular expressions"
    with refused(folder, rf"{key}: matching takes more than 0\.01 s\. {way}$"):
        load_adapter(folder)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_every_kind_of_endless_expression_is_stopped(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    with pytest.raises(ValueError, match="matching takes more than"), within_time():
        are_named(pattern, ["a" * 64 + "!"])


def test_a_handler_of_the_timers_signal_is_put_back():
    for before in (lambda *_: None, signal.SIG_DFL):
        signal.signal(signal.SIGVTALRM, before)
        with within_time():
            assert signal.getsignal(signal.SIGVTALRM) is not before
        assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_another_thread_is_not_stopped():
    """It gets no signals; it must not ask for one either."""
    found = []

    def match():
        with within_time():
            found.extend(are_named(["b"], ["a.b", "ab"]))

    thread = threading.Thread(target=match)
    thread.start()
    thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("pattern", ["(", "(?R)?a", "(a)(?i)b", r"\p{L}+", "(?x)(a)", "(" * 9000 + "a" + ")" * 9000])
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
def test_an_expression_means_what_it_means_to_peft(pattern, path):
    assert first_matches([pattern], [path]) == [0 if peft_key([pattern], path) == pattern else None]


def test_short_names_and_dots_at_odd_places_are_found():
    for module in ("a.b.c", "ab.c.d", "a..b", "a.b.c.d.e"):
        for end in {module[i:] for i in range(len(module)) if i == 0 or module[i - 1] == "."}:
            assert are_named(["x", end], [module]) == [True]
        for other in ("b.", "c.d.", ".", "a", "ab", "..b", ""):
            assert are_named([other], [module]) == [False]
    assert are_named([".x", "", "x"], [".x", "x.", "y.x"]) == [True, True, True]
    assert first_matches(["y", "x"], [".x"]) == [1]


def test_patterns_as_they_are_saved_are_looked_up(tmp_path, monkeypatch):
    """Each of thousands of expressions on each of thousands of paths would take seconds."""
    layers = {f"model.layers.{i}.q_proj": LoRA(np.ones((1, 2)), np.ones((2, 1)), float(i + 1)) for i in range(600)}
    save_adapter(tmp_path, layers)
    monkeypatch.setattr(patterns, "compiled", None)
    assert first_matches(json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"], [*layers]) == [
        *(None, *range(599))
    ]
