"""Engines written by hand, one for each row of mistakes: of them the logits alone are seen.

An engine is `foreign_reader`'s decoder, which shares no line with ours, with updates that are written out here.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama
from minilora.cli import main
from minilora.conformance.golden.bases import write_base
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.diagnosing import Candidate, diagnose, plausible
from minilora.conformance.golden.folder import write_adapter
from minilora.conformance.golden.misreadings import MISREADINGS
from minilora.conformance.golden.mistakes import further_mistakes_of, mistakes_of
from minilora.conformance.golden.reading import Reading
from minilora.conformance.golden.subject import compute_dtype, read_subject
from minilora.conformance.naming import Wrong
from minilora.language import save_llama
from minilora.language.config import LlamaConfig
from tests.support.compare import refused
from tests.support.language import write_folder
from tests.support.sample import one_in

from . import foreign_mixtures, foreign_reader
from .conftest import FORMS, as_given, log_softmax, saved
from .living_engine import to_bfloat16
from .test_readers import READERS

V, LAYERS, WIDTH, D = 29, 12, 16, 8
IDS = np.random.default_rng(5).integers(0, V, (2, 5))
SHAPES = {
    "self_attn.q_proj": (4 * D, WIDTH), "self_attn.k_proj": (2 * D, WIDTH), "self_attn.v_proj": (2 * D, WIDTH),
    "self_attn.o_proj": (WIDTH, 4 * D), "mlp.gate_proj": (20, WIDTH), "mlp.up_proj": (20, WIDTH),
    "mlp.down_proj": (WIDTH, 20),
}  # fmt: skip
"""Keys and values are square."""
KINDS = [name.partition(".")[2] for name in SHAPES]
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7, "use_rslora": True,
    "target_modules": [*KINDS, "lm_head"],
    "alpha_pattern": {"layers.1.mlp.up_proj": 20}, "rank_pattern": {"o_proj": 2}, "bias": "none",
}  # fmt: skip


def decoder(layers=LAYERS, **more):
    theta = (1 / 0.3) ** 2  # as `write_folder` has it
    sizes = {
        "vocab_size": V, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": D, "rms_norm_eps": 1e-5,
        "frequencies": tuple(theta ** (-np.arange(0, D, 2) / D)),
    }  # fmt: skip
    config, rng = LlamaConfig(**sizes | more), np.random.default_rng(0)
    shapes = config.shapes().items()
    arrays = {n: rng.standard_normal(s) * s[-1] ** -0.5 + (len(s) == 1) for n, s in shapes}
    return Llama.build(config, {n: a.astype("f4").astype("f8") for n, a in arrays.items()})


def drawn(paths):
    """The factors of modules, by path."""
    rng, pairs = np.random.default_rng(1), {}
    for path in paths:
        out, width = SHAPES.get(".".join(path.split(".")[-2:]), (V, WIDTH))
        r = 2 if path.endswith("o_proj") else 3
        pairs[path] = rng.standard_normal((r, width)) * width**-0.5, 0.3 * rng.standard_normal((out, r))
    return {path: tuple(factor.astype("f4").astype("f8") for factor in pair) for path, pair in pairs.items()}


PATHS = [*(f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SHAPES), "lm_head"]


def peft(folder, config, pairs, **more):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{p}.lora_A.weight": A for p, (A, _) in pairs.items()}
    tensors |= {f"base_model.model.{p}.lora_B.weight": B for p, (_, B) in pairs.items()} | more
    saved(tensors, folder / "adapter_model.safetensors", dtype="f4")
    return folder


# --- engines ----------------------------------------------------------------------------------------------------------


class Engine:
    """A decoder and the updates of an adapter, written out, beside the files of both."""

    def __init__(self, folder, model, config, paths, scale, write=write_folder):
        """`scale` is of a path and its rank."""
        self.model, self.pairs = folder / "model", drawn(paths)
        write(self.model, model)
        self.adapter = peft(folder / "adapter", config, self.pairs)
        self.config, self.base = foreign_reader.base_of(self.model, None)
        self.s = {path: scale(path, len(A)) for path, (A, _) in self.pairs.items()}

    @property
    def updates(self):
        return self.with_factors(lambda path, A, B: (A, B))

    def each(self, change):
        """All updates, each changed."""
        return {path: change(path, update) for path, update in self.updates.items()}

    def with_scale(self, scale):
        return {path: scale(path, len(A)) * B @ A for path, (A, B) in self.pairs.items()}

    def with_factors(self, change):
        changed = {path: change(path, *pair) for path, pair in self.pairs.items()}
        return {path: self.s[path] * B @ A for path, (A, B) in changed.items()}

    def only(self, test):
        return {path: update for path, update in self.updates.items() if test(path)}

    def moved(self, to):
        """The updates of each layer in another one; `to` has the numbers of those that act."""
        return {re.sub(r"\d+", lambda m: str(to[int(m[0])]), path): update for path, update in self.updates.items()
                if layer(path) is None or layer(path) in to}  # fmt: skip

    def weights(self, updates):
        W = dict(self.base)
        for path, update in updates.items():
            W[f"{path}.weight"] = W[f"{path}.weight"] + update
        return W

    def logits(self, W, **how):
        return np.stack([foreign_reader.logits(self.config, W, ids, **how) for ids in IDS])

    def at(self, s, base=None, **how):
        """The logits with a scaling of all updates, or of each path's; `base` has arrays in place of the model's."""
        scale = s if callable(s) else lambda path, r: s
        return self.logits(self.weights(self.with_scale(scale)) | (base or {}), **how)

    def last_after(self, first, last, prompts=IDS):
        """The logits after the last token, where all others' keys and values are those of other weights."""
        rows = []
        for ids in prompts:
            cache = {}
            foreign_reader.logits(self.config, first, ids, cache=cache)
            rows.append(foreign_reader.logits(self.config, last, ids, cache=cache)[-1])
        return np.stack(rows)

    def diagnosed(self, folder, z, *, adapter=None, computed_in=None, **tensors):
        """The report of these logits, or of other tensors that are answered."""
        arrays = {"prompts": IDS} | ({} if z is None else {"logits": z}) | tensors
        metadata = {"computed_in": computed_in} if computed_in else None
        saved({name: a for name, a in arrays.items() if a is not None}, folder / "answers.safetensors", metadata)
        return diagnose(self.model, adapter or self.adapter, folder / "answers.safetensors")


def alpha(path):
    return 20 if path == "model.layers.1.mlp.up_proj" else 7


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of twelve layers, and an adapter of all its linear layers, rank-stabilised and with patterns."""
    return Engine(tmp_path_factory.mktemp("large"), decoder(), CONFIG, PATHS, lambda path, r: alpha(path) / r**0.5)


def layer(path):
    return int(path.split(".")[2]) if path.startswith("model.layers.") else None


def kind(path):
    return path.rpartition(".")[2]


def half(update, inputs=False):
    kept = update.copy()
    if inputs:
        kept[:, update.shape[1] // 2 :] = 0
    else:
        kept[len(update) // 2 :] = 0
    return kept


def in_heads(order):
    """A change of lora_B's rows of queries and keys within each head."""

    def change(path, A, B):
        rows = np.concatenate([np.array(order) + start for start in range(0, len(B), D)])
        return A, B[rows] if kind(path) in ("q_proj", "k_proj") else B

    return change


def of_another(name, other):
    """All updates, those of one kind of module with the factors of another kind."""
    return lambda e: e.with_factors(lambda p, A, B: e.pairs[p.replace(name, other)])


def float16(x):
    return x.astype("f4").astype("f2").astype("f8")


def without(*kinds):
    return lambda e: e.only(lambda p: kind(p) not in kinds)


def layers(test):
    return lambda e: e.only(lambda p: layer(p) is None or test(layer(p)))


UPDATES = {
    "layers-are-shifted-up": lambda e: e.moved({i: (i + 1) % 12 for i in range(12)}),
    "layers-are-shifted-down": lambda e: e.moved({i: (i + 11) % 12 for i in range(12)}),
    "layers-are-one-too-high": lambda e: e.moved({i: i + 1 for i in range(11)}),
    "layers-are-one-too-low": lambda e: e.moved({i: i - 1 for i in range(1, 12)}),
    "layers-are-reversed": lambda e: e.moved({i: 11 - i for i in range(12)}),
    "layers-are-sorted-as-text": lambda e: e.moved({0: 0, 1: 1, 10: 2, 11: 3} | {i: i + 2 for i in range(2, 10)}),
    "the-first-half-of-the-layers-alone": layers(lambda i: i in (0, 1, 2, 3, 4, 5)),
    "the-second-half-of-the-layers-alone": layers(lambda i: i in (6, 7, 8, 9, 10, 11)),
    "every-second-layer-alone": layers(lambda i: i in (0, 2, 4, 6, 8, 10)),
    "every-other-layer-alone": layers(lambda i: i in (1, 3, 5, 7, 9, 11)),
    "layer-0-for-all": lambda e: e.with_factors(lambda p, A, B: e.pairs[re.sub(r"\d+", "0", p)]),
    **{f"layer-{i}-is-left-out": layers(lambda j, i=i: j != i) for i in range(12)},
    **{f"layer-{i}-alone": lambda e, i=i: e.only(lambda p: layer(p) == i) for i in range(12)},
    **{f"{name.replace('_', '-')}-alone": lambda e, name=name: e.only(lambda p: kind(p) == name)
       for name in (*KINDS, "lm_head")},
    "rows-of-q-and-k-are-not-permuted": lambda e: e.with_factors(in_heads([0, 2, 4, 6, 1, 3, 5, 7])),
    "rows-of-q-and-k-are-permuted": lambda e: e.with_factors(in_heads([0, 4, 1, 5, 2, 6, 3, 7])),
    "heads-of-k-and-v-are-exchanged": lambda e: e.each(
        lambda p, u: np.concatenate([u[8:], u[:8]]) if kind(p) in ("k_proj", "v_proj") else u),
    "k-v-are-left-out": without("k_proj", "v_proj"),
    "q-k-are-left-out": without("q_proj", "k_proj"),
    "q-k-v-are-left-out": without("q_proj", "k_proj", "v_proj"),
    "gate-up-are-left-out": without("gate_proj", "up_proj"),
    "o-down-are-left-out": without("o_proj", "down_proj"),
    "q-and-v-alone": lambda e: e.only(lambda p: kind(p) in ("q_proj", "v_proj")),
    "gate-twice": of_another("up_proj", "gate_proj"),
    "up-twice": of_another("gate_proj", "up_proj"),
    "lora-a-of-q-for-all": lambda e: e.with_factors(
        lambda p, A, B: (e.pairs[re.sub("[kv]_proj", "q_proj", p)][0] if kind(p) in ("k_proj", "v_proj") else A, B)),
    "one-device-of-two-alone": lambda e: e.each(lambda p, u: half(u, inputs=kind(p) in ("o_proj", "down_proj"))),
    "half-of-the-outputs-alone": lambda e: e.each(lambda p, u: half(u)),
    "half-of-the-inputs-alone": lambda e: e.each(lambda p, u: half(u, inputs=True)),
    "half-of-the-ranks-alone": lambda e: e.with_factors(lambda p, A, B: (A[:1], B[:, :1])),
    "a-square-update-is-transposed": lambda e: e.each(lambda p, u: u.T if kind(p) in ("k_proj", "v_proj") else u),
    "the-update-is-halved": lambda e: e.each(lambda p, u: u / 2),
    "alpha-is-divided-by-the-largest-rank": lambda e: e.with_scale(lambda p, r: alpha(p) / 3),
    **{f"alpha-{a}-is-taken": lambda e, a=a: e.with_scale(lambda p, r: a / r) for a in (8, 16, 32)},
    **{f"alpha-{a}-is-taken-over-the-root": lambda e, a=a: e.with_scale(lambda p, r: a / r**0.5) for a in (8, 16, 32)},
    # rows of golden's table, a few of which its own foreign readers do not make
    "the-adapter-is-not-applied": lambda e: {},
    "the-update-is-added-twice": lambda e: e.each(lambda p, u: 2 * u),
    "the-update-is-subtracted": lambda e: e.each(lambda p, u: -u),
    "rslora-root-is-ignored": lambda e: e.with_scale(lambda p, r: alpha(p) / r),
    "alpha-pattern-is-dropped": lambda e: e.with_scale(lambda p, r: 7 / r**0.5),
    "there-is-no-scaling": lambda e: e.with_scale(lambda p, r: 1),
    "lm-head-is-left-out": without("lm_head"),
    "the-mlp-is-left-out": lambda e: e.only(lambda p: "mlp" not in p),
    "gate-and-up-are-swapped": lambda e: {
        {"gate_proj": p.replace("gate", "up"), "up_proj": p.replace("up", "gate")}.get(kind(p), p): u
        for p, u in e.updates.items()},
    "the-last-rank-is-dropped": lambda e: e.with_factors(lambda p, A, B: (A[:-1], B[:, :-1])),
}  # fmt: skip
"""By the flag that is to be named: the updates that an engine adds to the weights."""


def rounded(change, *, base=False, all=False):
    """An engine whose base, or whose merged weights, are rounded."""

    def z(e):
        W = {n: change(a) for n, a in e.base.items()} if base else e.base
        merged = {f"{p}.weight": W[f"{p}.weight"] + u for p, u in e.updates.items()}
        W = {**W, **(merged if base or all else {n: change(a) for n, a in merged.items()})}
        return e.logits({n: change(a) for n, a in W.items()} if all else W)

    return z


OTHERWISE = {
    "merged-in-bfloat16": rounded(to_bfloat16),
    "merged-in-float16": rounded(float16),
    "all-weights-in-bfloat16": rounded(to_bfloat16, all=True),
    "all-weights-in-float16": rounded(float16, all=True),
    "the-base-in-bfloat16": rounded(to_bfloat16, base=True),
    "the-base-in-float16": rounded(float16, base=True),
    "keys-and-values-are-the-bases": lambda e: e.last_after(e.base, e.weights(e.updates)),
    "the-last-token-is-the-bases": lambda e: e.last_after(e.weights(e.updates), e.base),
    "rope-turns-neighbours": lambda e: e.logits(e.weights(e.updates), bug="neighbours"),
    "attention-is-scaled-by-hidden-size-over-heads": lambda e: e.logits(e.weights(e.updates), bug="hidden size"),
    "there-is-a-temperature": lambda e: e.logits(e.weights(e.updates)) / 0.7,
    "the-update-has-another-strength": lambda e: e.logits(e.weights(e.each(lambda p, u: 1.37 * u))),
}
"""The same, where it is no other update: the logits, (P, T, V) or (P, V)."""


SENTENCES = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
"""What a report says of each mistake that is no row of golden's table, for the large engine's adapter."""


def test_every_row_makes_the_weights_of_its_engine(large):
    subject = read_subject(large.model, large.adapter)
    rows = {row.flag: row for row in (*mistakes_of(subject), *further_mistakes_of(subject))}
    for flag, updates in UPDATES.items():
        parts = dict(rows[flag].replaced_in(subject))
        given = parts.pop("given", lambda given: given)(subject.given)
        changed = subject.arrays | Reading(**parts, product=lambda x, W: x @ W.T).changed(
            subject.arrays, [(given, 1.0)]
        )
        for name, expected in large.weights(updates(large)).items():
            assert np.abs(changed[name] - expected).max() < 1e-12, (flag, name)
    of_golden = {row.flag for row in MISREADINGS}
    assert [f"{flag}: {row.says}" for flag, row in rows.items() if flag not in of_golden] == SENTENCES
    assert not {"the-weights-of-adapters-are-ignored", "the-previous-adapter-stays-on"} & {*rows}  # of several adapters
    golden = {row.flag for row in MISREADINGS} - {"rows-of-q-and-k-are-permuted", "rows-of-q-and-k-are-not-permuted"}
    assert {*rows} - golden - {*UPDATES, *OTHERWISE} == set()


MARKS = (pytest.mark.long, *4 * [pytest.mark.full])  # by default the weights alone, and the small model's logits
FLAGS = [pytest.param(flag, marks=MARKS[i % 5]) for i, flag in enumerate([*UPDATES, *OTHERWISE])]


@pytest.mark.parametrize("flag", FLAGS)
def test_an_engine_is_named_by_its_mistake(large, tmp_path, flag):
    z = OTHERWISE[flag](large) if flag in OTHERWISE else large.logits(large.weights(UPDATES[flag](large)))
    report = large.diagnosed(tmp_path, z.astype("f4"))
    assert (report.json()["flags"], report.status) == ([flag], 1), str(report)
    assert f"[{flag}]" in report.first_line


# --- a small model: what is given, and how ----------------------------------------------------------------------------

QV = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
PLAIN = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of one layer, and a plain adapter."""
    return Engine(tmp_path_factory.mktemp("small"), decoder(1), PLAIN, QV, lambda path, r: 7 / 3)


@pytest.mark.parametrize("flag", one_in(3, [*OTHERWISE], OTHERWISE))
def test_what_is_no_other_update_is_named(small, tmp_path, flag):
    report = small.diagnosed(tmp_path, OTHERWISE[flag](small).astype("f4"))
    assert (report.json()["flags"], report.status) == ([flag], 1), str(report)


@pytest.mark.parametrize(
    ("right", "rounded", "is_possible"),
    [
        ((2.0, 3.0), (10.0, 1.0), True),
        ((2.0, 3.0), (5.0, 1.1), False),  # nearer, and not clearly
        ((2.0, 3.0), (11.0, 0.3), False),
        ((1.0, 0.3), (0.5, 0.01), False),  # what is right is near enough
    ],
)
def test_a_rounding_is_possible_where_it_is_clearly_nearer(right, rounded, is_possible):
    """By the answer that is off most, and the typical one, in tolerances."""
    row = Wrong("r", "r", {"rounded": ("merged", "bfloat16")})
    found = plausible([Candidate([], *right), Candidate([row], *rounded)])
    assert ([row] in [one.rows for one in found]) is is_possible
    for typical, count in ((0.75, 2), (0.76, 1)):  # what is clearly nearer rules others out
        near, far = (Candidate([Wrong(flag, flag, {})], 1.0, t) for flag, t in (("a", 0.25), ("b", typical)))
        assert plausible([Candidate([], 2.0, 1.0), far, near]) == [near, far][:count]


@pytest.mark.parametrize(
    ("largest", "typical", "same"), [(1e-3, 0, True), (0, 1e-3, True), (2e-3, 0, False), (0, 2e-3, False)]
)
def test_candidates_are_the_same_up_to_a_thousandth(largest, typical, same):
    """In tolerances: by the answer that is off most, and by the typical one."""
    assert Candidate([], largest, typical).is_same(Candidate([], 0, 0)) is same
    assert Candidate([], 0, 0).is_same(Candidate([], largest, typical)) is same


@pytest.mark.parametrize("form", one_in(5, FORMS, FORMS))
def test_answers_are_judged_in_every_form(small, tmp_path, form):
    given = {"right": small.at(7 / 3), "there-is-no-scaling": small.at(1)}
    given |= {"there-is-a-temperature": small.at(7 / 3) / 1.4} if form.startswith("some") else {}
    for flag, z in given.items():
        report = small.diagnosed(tmp_path, None, **as_given(form, z))
        assert report.json()["flags"] == [flag] * (flag != "right"), str(report)
        assert report.status == (flag != "right")
        assert flag != "there-is-a-temperature" or report.text == "all logits are divided by a temperature of 1.4"


def off_at_one_logit(engine):
    z = engine.at(7 / 3).astype("f4")  # of which a logit may be off by 1e-4
    z[1, 2, 3] += 5e-4
    return {"logits": z}


UNNAMED = {
    "one logit is off": off_at_one_logit,
    "a temperature is not negative": lambda e: {"logits": -e.at(7 / 3)},
    "all logits are zero": lambda e: {"logits": 0 * e.at(0)},
    "probabilities contradict": lambda e: {"logits": e.at(7 / 3), "log_probabilities": log_softmax(e.at(1))},
}


@pytest.mark.parametrize("name", UNNAMED)
def test_what_no_mistake_explains_is_wrong(small, tmp_path, name):
    report = small.diagnosed(tmp_path, None, **UNNAMED[name](small))
    assert (report.verdict, report.json()["flags"]) == ("WRONG", []), str(report)


@pytest.mark.parametrize(("off", "status"), [(9e-4, 0), (2e-3, 1)])
def test_a_large_models_answers_may_be_off_as_ours_are(small, tmp_path, monkeypatch, off, status):
    """It is computed in float32, also where the engine says float64."""
    monkeypatch.setattr("minilora.conformance.golden.subject.LARGE", 0)
    z = small.at(7 / 3)
    z[0, 0, 0] += off
    assert small.diagnosed(tmp_path, z, computed_in="float64").status == status


def test_a_model_of_more_than_40_million_numbers_is_large():
    head = (4_000, 10_000)
    assert compute_dtype([head]) is np.float64
    assert compute_dtype([head, (1,)]) is np.float32


def kohya(folder, *alphas):
    tensors = {}
    for path, alpha in zip(QV, alphas, strict=True):
        name = f"lora_te_{path.replace('.', '_')}"
        tensors |= dict(zip((f"{name}.lora_down.weight", f"{name}.lora_up.weight"), drawn(QV)[path], strict=True))
        tensors |= {} if alpha is None else {f"{name}.alpha": np.array(float(alpha))}
    return saved(tensors, folder / "a.safetensors", dtype="f4")


def mlx(folder, **parameters):
    (folder / "a").mkdir()
    tensors = {}
    for path, (A, B) in drawn(QV).items():
        tensors |= {f"{path}.lora_a": A.T, f"{path}.lora_b": B.T}
    saved(tensors, folder / "a" / "adapters.safetensors", dtype="f4")
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "dropout": 0.0, **parameters}}
    (folder / "a" / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "a"


FORMATS = {
    "PEFT, alpha 0": (lambda f: peft(f / "a", PLAIN | {"lora_alpha": 0}, drawn(QV)), 0),
    "PEFT": (lambda f: peft(f / "a", PLAIN, drawn(QV)), 7 / 3),
    "PEFT, no alpha": (lambda f: peft(f / "a", PLAIN | {"lora_alpha": None}, drawn(QV)), 8 / 3),
    "kohya, no alpha": (lambda f: kohya(f, None, None), 1),
    "kohya": (lambda f: kohya(f, 6, 3), lambda path, r: {"q_proj": 2, "v_proj": 1}[kind(path)]),
    "MLX": (lambda f: mlx(f, scale=5.0), 5),
    "an old MLX": (lambda f: mlx(f, alpha=40.0), 40 / 3),
}


@pytest.mark.parametrize("name", one_in(2, [*FORMATS], FORMATS))
def test_adapters_of_every_program_are_taken_as_it_means_them(small, tmp_path, name):
    write, s = FORMATS[name]
    report = small.diagnosed(tmp_path, small.at(s), adapter=write(tmp_path))
    assert report.verdict == "RIGHT", str(report)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_exported_adapter_is_that_which_it_was_made_of(tmp_path, kind):
    """Rows of queries and keys stand in another order in a Llama's file, and in their own in a Qwen2's."""
    pytest.importorskip("gguf")
    rope = {"rope_type": "default", "rope_theta": 1e2 / 9}
    model = decoder(1, model_type=kind, attention_bias=kind == "qwen2", rope=rope)
    config, paths = PLAIN | {"target_modules": ["q_proj", "k_proj"]}, [path.replace("v_", "k_") for path in QV]
    engine = Engine(tmp_path, model, config, paths, lambda path, r: 7 / 3, lambda path, model: save_llama(model, path))
    command = ["export", str(engine.adapter), "--model", str(engine.model), "-o", str(tmp_path / "a.gguf")]
    assert main(command) == 0
    report = engine.diagnosed(tmp_path, engine.at(7 / 3), adapter=tmp_path / "a.gguf")
    assert report.verdict == "RIGHT", str(report)


def test_modules_in_full_of_which_nothing_is_applied_are_named(small, tmp_path):
    head = {"base_model.model.lm_head.weight": np.random.default_rng(5).standard_normal((V, WIDTH))}
    adapter = peft(tmp_path / "a", PLAIN | {"modules_to_save": ["lm_head"]}, drawn(QV), **head)
    report = small.diagnosed(tmp_path, small.at(0), adapter=adapter)
    assert report.json()["flags"] == ["nothing-in-the-file-is-applied"], str(report)
    assert report.text == (
        "nothing in the file is applied, neither factors nor modules trained in full: this is the base"
    )


def test_a_log_probability_may_be_off_twice_as_far(small, tmp_path):
    p = log_softmax(small.at(7 / 3)).astype("f4")
    p[0, 0, 0] += 1.5e-4
    assert small.diagnosed(tmp_path, None, log_probabilities=p).verdict == "RIGHT"


@pytest.mark.parametrize("times", [0.07, -0.3, 14.5])
def test_another_strength_is_measured(small, tmp_path, times):
    found = small.diagnosed(tmp_path, small.at(times * 7 / 3)).json()
    assert found["flags"] == ["the-update-has-another-strength"]
    assert found["text"] == f"the update acts with {times} times the strength given by its files"
    assert found["strength"] == pytest.approx(times)


def test_prompts_of_one_or_two_tokens_are_judged(small, tmp_path):
    one = small.diagnosed(tmp_path, small.at(7 / 3)[:, :1], prompts=IDS[:, :1].astype(np.int32))
    assert one.verdict == "RIGHT"
    ids = np.array([[0, V - 1]])
    z = small.last_after(small.base, small.weights(small.updates), ids)
    two = small.diagnosed(tmp_path, z, prompts=ids)
    assert "keys-and-values-are-the-bases" in two.json()["flags"], str(two)


def test_of_one_token_a_cache_of_the_bases_is_told(small, tmp_path):
    flags = small.diagnosed(tmp_path, small.at(0)[:, :1], prompts=IDS[:, :1]).json()["flags"]
    assert {"the-adapter-is-not-applied", "keys-and-values-are-the-bases"} <= {*flags}


# --- the base's own logits --------------------------------------------------------------------------------------------

OTHER_BASE = {"model.norm.weight": np.full(WIDTH, 2.0)}


def in_bfloat16(times):
    """Logits of weights in bfloat16 with updates of this scaling, all off by five tolerances."""

    def z(engine):
        W = engine.weights(engine.with_scale(lambda path, r: times))
        exact = engine.logits({name: to_bfloat16(array) for name, array in W.items()})
        return exact + 5e-5 * np.random.default_rng(0).choice([-1, 1], exact.shape)

    return z


BESIDE = {
    "right": (lambda m: m.at(7 / 3), lambda m: m.at(0), [], "right"),
    "the adapter is wrong": (lambda m: m.at(1), lambda m: m.at(0), ["there-is-no-scaling"], "right"),
    "a temperature": (lambda m: m.at(7 / 3) / 0.7, lambda m: m.at(0) / 0.7, ["there-is-a-temperature"], "wrong"),
    "weights in bfloat16, and no scaling": (
        in_bfloat16(1), in_bfloat16(0), ["all-weights-in-bfloat16", "there-is-no-scaling"], "wrong"),
    "a temperature, and no adapter": (
        lambda m: m.at(0) / 0.7, lambda m: m.at(0) / 0.7, ["there-is-a-temperature", "the-adapter-is-not-applied"],
        "wrong"),
    "neighbours": (
        lambda m: m.at(7 / 3, bug="neighbours"), lambda m: m.at(0, bug="neighbours"), ["rope-turns-neighbours"],
        "wrong"),
    "another base": (lambda m: m.at(7 / 3, OTHER_BASE), lambda m: m.at(0, OTHER_BASE), [], "wrong"),
    "a temperature with the adapter alone": (lambda m: m.at(7 / 3) / 0.7, lambda m: m.at(0), [], "right"),
}  # fmt: skip
"""An engine's logits, the base's own, the flags to be named, and what the base is."""


@pytest.mark.parametrize("name", one_in(3, [*BESIDE], BESIDE))
def test_a_wrong_base_is_told_from_a_wrong_adapter(small, tmp_path, name):
    z, base, flags, of_base = BESIDE[name]
    for rows in ((slice(None),), (slice(None), -1)) if name == "the adapter is wrong" else [(slice(None),)]:
        report = small.diagnosed(tmp_path, z(small)[rows], base_logits=base(small)[rows])
        assert (report.json()["flags"], report.json()["base"]) == (flags, of_base), str(report)
        assert report.status == (name != "right")
        assert report.text.startswith("the base's own logits are wrong") == (of_base == "wrong")


def test_a_temperature_divides_the_bases_logits_too(small, tmp_path):
    report = small.diagnosed(tmp_path, small.at(7 / 3) / 0.7, base_logits=small.at(0) / 0.7)
    assert report.text == "the base's own logits are wrong: all logits are divided by a temperature of 0.7"


# --- how far off is right ---------------------------------------------------------------------------------------------


def test_a_precision_that_nobody_declared_is_told(small, tmp_path):
    z = small.at(7 / 3) + np.random.default_rng(0).uniform(-0.02, 0.02, (2, 5, V))
    report = small.diagnosed(tmp_path, z.astype("f4"))
    assert report.text.startswith("as if computed in float16 (if that is intended, declare computed_in); none of the ")
    assert small.diagnosed(tmp_path, z, computed_in="float16").status == 0
    rounded = OTHERWISE["all-weights-in-bfloat16"](small)
    assert small.diagnosed(tmp_path, rounded, computed_in="bfloat16").verdict == "RIGHT"


def test_logits_that_an_adapter_hardly_moves_decide_nothing(small, tmp_path):
    z = small.at(0.01) + np.random.default_rng(0).uniform(-0.2, 0.2, (2, 5, V))
    adapter = peft(tmp_path / "weak", PLAIN | {"lora_alpha": 0.03}, drawn(QV))
    report = small.diagnosed(tmp_path, z, adapter=adapter, computed_in="bfloat16")
    assert (report.verdict, report.status) == ("UNDECIDED", 2), str(report)
    assert "the-adapter-is-not-applied" in report.json()["flags"]
    assert report.found == []


def test_the_nearest_is_named_only_where_it_is_near(small, tmp_path):
    noise = np.random.default_rng(0).standard_normal((2, 5, V))
    far, near = (small.diagnosed(tmp_path, small.at(s) + e) for s, e in ((7 / 3, noise), (0, 1e-3 * noise)))
    told, measured = far.json(), {"", "there-is-a-temperature", "the-update-has-another-strength"}
    rows = {one["flag"] for one in told["candidates"]}.union(*told["same"].values()) - measured
    assert far.text == f"none of the {len(rows)} known mistakes fits"
    assert re.fullmatch(r"none of the \d+ known mistakes fits; the nearest: the adapter is not applied: .*", near.text)
    assert far.text.split(";")[0] == near.text.split(";")[0]


ONES, PROMPTS = np.ones((2, 5, V)), "expected prompts, token ids (P, T) of dtype I64 or I32, but "
MANY = np.zeros((2, 32769), int)
LOGITS = "there is no answer in it, expected logits (P, T, V) or (P, V), or log_probabilities"
UNKNOWN = "prompts has ids outside the model's vocabulary of 29"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logits": ONES}, f"{PROMPTS}there is none"),
        ({"prompts": IDS.astype("f4"), "logits": ONES}, f"{PROMPTS}it has dtype F32 and shape [2, 5]"),
        ({"prompts": IDS[0], "logits": ONES}, f"{PROMPTS}it has dtype I64 and shape [5]"),
        ({"prompts": IDS[:0], "logits": ONES}, f"{PROMPTS}it has dtype I64 and shape [0, 5]"),
        ({"prompts": MANY, "logits": ONES}, "prompts has shape [2, 32769], expected at most 65,536 ids"),
        ({"prompts": MANY[:, :-1]}, LOGITS),
        ({"prompts": IDS}, LOGITS),
        ({"prompts": IDS, "merged.model.norm.weight": np.ones(3)}, LOGITS),
        ({"prompts": IDS + V - IDS.max(), "logits": ONES}, UNKNOWN),
        ({"prompts": IDS - IDS.min() - 1, "logits": ONES}, UNKNOWN),
        ({"prompts": IDS, "logits": ONES[:, 1:]}, "logits has shape (2, 4, 29), expected (2, 5, 29)"),
        ({"prompts": IDS, "logits": ONES * np.nan},
         "logits holds NaN or infinity: [0, 0, 0] is nan, the first of 290 among 290"),
        ({"prompts": IDS, "logits": ONES, "base_logits": ONES[..., :3]},
         "base_logits has shape (2, 5, 3), expected (2, 5, 29)"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(small, tmp_path, tensors, message):
    with refused(f"{str(tmp_path / 'answers.safetensors')!r}: {message}"):
        small.diagnosed(tmp_path, None, **{"prompts": None} | tensors)


def with_head(*shape):
    return {"config": PLAIN | {"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight": np.ones(shape)}


def holding(value, part):
    pairs = drawn(QV)
    pairs[QV[1]][part][1, 2] = value
    return pairs


OF_ANOTHER_LAYER = {path.replace("layers.0", "layers.9"): pair for path, pair in drawn(QV).items()}
NOT_FINITE = "'model.layers.0.self_attn.v_proj' holds NaN or infinity: see `minilora audit`"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pairs": OF_ANOTHER_LAYER},
         "'model.layers.9.self_attn.q_proj' is incomplete or not in this model: see `minilora audit`"),
        ({"pairs": holding(np.nan, 0)}, NOT_FINITE),
        ({"pairs": holding(np.inf, 1)}, NOT_FINITE),
        (with_head(V, WIDTH + 1), f"'lm_head' has shape {(V, WIDTH + 1)}, expected the model's {(V, WIDTH)}"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(small, tmp_path, files, said):
    adapter = peft(tmp_path / "a", **{"config": PLAIN, "pairs": drawn(QV)} | files)
    with refused(f"{str(adapter)!r}: {said}"):
        small.diagnosed(tmp_path, ONES, adapter=adapter)


def test_a_model_that_holds_infinity_is_refused(small, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    arrays = load_file(tmp_path / "model" / "model.safetensors")
    arrays["model.norm.weight"][3] = np.inf
    saved(arrays, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with refused(f"{str(tmp_path / 'model')!r}: 'model.norm.weight' holds NaN or infinity"):
        read_subject(tmp_path / "model", small.adapter)


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        ({"use_dora": True}, "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
         "'model.layers.0.self_attn.q_proj' (linear, with A, B, magnitude) is not supported by `minilora diagnose`"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight",
         "'lm_head.weight' is not supported with a mixture of experts"),
    ],
)  # fmt: skip
def test_what_is_not_computed_beside_a_mixture_is_refused(tmp_path, config, name, said):
    base = next(case for case in CASES if case.id == "experts-double").base
    write_base(tmp_path / "base", base)
    path = "model.layers.0.self_attn.q_proj"
    out, width = base.arrays[f"{path}.weight"].shape
    pairs = {path: (np.ones((3, width)), np.ones((out, 3)))}
    more = {f"base_model.model.{name}": np.ones(base.arrays[name].shape if name in base.arrays else out)}
    adapter = peft(tmp_path / "a", PLAIN | {"target_modules": ["q_proj"]} | config, pairs, **more)
    with refused(f"{str(adapter)!r}: {said}"):
        read_subject(tmp_path / "base", adapter)


# --- golden adapters --------------------------------------------------------------------------------------------------

MADE = {
    "lora-bias": ["no bias"],
    "rslora-with-patterns": ["no root", "no rank_pattern", "no alpha_pattern", "last pattern"],
    "dora-rslora": ["no magnitude", "norm of W", "no root"],
    "tied-embedding": ["no embedding", "embedding reshaped", "tied head"],
    "modules-to-save": ["no modules to save"],
    "bias-lora-only": ["no trained bias"],
    "file-in-bfloat16": ["bits as float16"],
    "experts-double": [
        "B expert-slowest", "A expert-fastest", "the next expert", "expert 0 for all", "the scaling in a loop",
        "the packed rank", "the last expert", "up and gate", "interleaved",
    ],
    "experts-shared": ["not renormalised as said", "shared linears"],
}  # fmt: skip
"""By golden case, mistakes that the foreign readers make of its adapter."""


@pytest.mark.parametrize("id", MADE)
@pytest.mark.parametrize("rows", [slice(1), pytest.param(slice(1, None), marks=pytest.mark.long)])
def test_foreign_readers_mistakes_with_golden_adapters_are_named(id, rows, tmp_path):
    case = next(case for case in CASES if case.id == id)
    ((config, tensors),) = case.files()
    write_base(tmp_path / "base", case.base)
    write_adapter(tmp_path / "adapter", config, tensors, case.stored)
    entry = {"id": id, "base": "base", "adapter": "adapter", "prompts": case.prompts.tolist()}
    index = {"base": "base", "bases": {"base": {"experts": case.base.mixture is not None}}, "cases": [entry]}
    for bug in [*MADE[id], None][rows]:
        z = foreign_reader.answer(tmp_path, index, entry, bug)
        answers = saved({"prompts": case.prompts, "logits": z.astype("f4")}, tmp_path / "answers.safetensors")
        flags = diagnose(tmp_path / "base", tmp_path / "adapter", answers).json()["flags"]
        assert (READERS | foreign_mixtures.BUGS)[bug] in flags if bug else flags == [], bug


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("refused-empty", "there is no adapter in it: see `minilora audit`"),
        ("pissa-raw", "init_lora_weights is 'pissa': convert it to an adapter over the original base"),
        (
            "trained-tokens",
            "'model.embed_tokens.token_adapter.trainable_tokens_delta' is not supported by `minilora diagnose`",
        ),
    ],
)
def test_golden_adapters_that_are_not_computed_are_refused(golden, id, said):
    adapter, case = golden / "adapters" / id, next(case for case in CASES if case.id == id)
    with refused(f"{str(adapter)!r}: {said}"):
        read_subject(golden / "bases" / case.base.name, adapter)
