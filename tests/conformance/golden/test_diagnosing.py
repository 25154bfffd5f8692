"""Engines written by hand, one for each row of mistakes: of them the logits alone are seen.

An engine is `foreign_reader`'s decoder, which shares no line with ours, with updates that are written out here.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import Llama
from minilora.conformance.golden.diagnosing import diagnose
from minilora.conformance.golden.misreadings import MISREADINGS
from minilora.conformance.golden.mistakes import further_mistakes_of, mistakes_of
from minilora.conformance.golden.subject import read_subject
from minilora.language.config import LlamaConfig
from tests.support.language import write_folder
from tests.support.sample import one_in

from . import foreign_reader

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
    save_file({n: np.ascontiguousarray(a, "f4") for n, a in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of twelve layers, and an adapter of all its linear layers, rank-stabilised and with patterns."""
    folder = tmp_path_factory.mktemp("files")
    write_folder(folder / "model", decoder())
    peft(folder / "adapter", CONFIG, drawn(PATHS))
    return folder


def answered(folder, z, computed_in=None, **tensors):
    file = folder / "answers.safetensors"
    arrays = {"prompts": IDS} | ({} if z is None else {"logits": z}) | tensors
    metadata = {"computed_in": computed_in} if computed_in else None
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, file, metadata)
    return file


def diagnosed(files, z, folder, **more):
    return diagnose(files / "model", files / "adapter", answered(folder, z, **more))


# --- engines ----------------------------------------------------------------------------------------------------------


class Engine:
    """A decoder and the updates of an adapter, written out: alpha over the root of the rank, with two patterns."""

    def __init__(self, folder):
        self.config, self.base = foreign_reader.base_of(folder / "model", None)
        self.pairs = drawn(PATHS)

    def alpha(self, path):
        return 20 if path == "model.layers.1.mlp.up_proj" else 7

    def s(self, path):
        return self.alpha(path) / (2 if path.endswith("o_proj") else 3) ** 0.5

    def of(self, path, pair):
        """The update of a module with these factors."""
        A, B = pair
        return self.s(path) * B @ A

    @property
    def updates(self):
        return {path: self.of(path, pair) for path, pair in self.pairs.items()}

    def each(self, change):
        """All updates, each changed."""
        return {path: change(path, update) for path, update in self.updates.items()}

    def with_scale(self, scale):
        return {path: scale(path, len(A)) * B @ A for path, (A, B) in self.pairs.items()}

    def with_factors(self, change):
        return {path: self.of(path, change(path, *pair)) for path, pair in self.pairs.items()}

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

    def last_after(self, first, last):
        """The logits after the last token, where all others' keys and values are those of other weights."""
        rows = []
        for ids in IDS:
            cache = {}
            foreign_reader.logits(self.config, first, ids, cache=cache)
            rows.append(foreign_reader.logits(self.config, last, ids, cache=cache)[-1])
        return np.stack(rows)


@pytest.fixture(scope="module")
def engine(files):
    return Engine(files)


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


def bfloat16(x):
    bits = x.astype("f4").view("u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view("f4").astype("f8")


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
    "alpha-is-divided-by-the-largest-rank": lambda e: e.with_scale(lambda p, r: e.alpha(p) / 3),
    **{f"alpha-{a}-is-taken": lambda e, a=a: e.with_scale(lambda p, r: a / r) for a in (8, 16, 32)},
    **{f"alpha-{a}-is-taken-over-the-root": lambda e, a=a: e.with_scale(lambda p, r: a / r**0.5) for a in (8, 16, 32)},
    # rows of golden's table, a few of which its own foreign readers do not make
    "the-adapter-is-not-applied": lambda e: {},
    "the-update-is-added-twice": lambda e: e.each(lambda p, u: 2 * u),
    "the-update-is-subtracted": lambda e: e.each(lambda p, u: -u),
    "rslora-root-is-ignored": lambda e: e.with_scale(lambda p, r: e.alpha(p) / r),
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
    "merged-in-bfloat16": rounded(bfloat16),
    "merged-in-float16": rounded(float16),
    "all-weights-in-bfloat16": rounded(bfloat16, all=True),
    "all-weights-in-float16": rounded(float16, all=True),
    "the-base-in-bfloat16": rounded(bfloat16, base=True),
    "the-base-in-float16": rounded(float16, base=True),
    "keys-and-values-are-the-bases": lambda e: e.last_after(e.base, e.weights(e.updates)),
    "the-last-token-is-the-bases": lambda e: e.last_after(e.weights(e.updates), e.base),
    "rope-turns-neighbours": lambda e: e.logits(e.weights(e.updates), bug="neighbours"),
    "attention-is-scaled-by-hidden-size-over-heads": lambda e: e.logits(e.weights(e.updates), bug="hidden size"),
    "there-is-a-temperature": lambda e: e.logits(e.weights(e.updates)) / 0.7,
    "the-update-has-another-strength": lambda e: e.logits(e.weights(e.each(lambda p, u: 1.37 * u))),
}
"""The same, where it is no other update: the logits, (P, T, V) or (P, V)."""


FLAGS = [*UPDATES, *OTHERWISE]


@pytest.mark.parametrize("flag", one_in(9, FLAGS, FLAGS))
def test_an_engine_is_named_by_its_mistake(files, engine, tmp_path, flag):
    z = OTHERWISE[flag](engine) if flag in OTHERWISE else engine.logits(engine.weights(UPDATES[flag](engine)))
    report = diagnosed(files, z.astype("f4"), tmp_path)
    assert (report.json()["flags"], report.status) == ([flag], 1), str(report)
    assert f"[{flag}]" in report.first_line


def test_every_row_about_any_model_has_an_engine(files):
    subject = read_subject(files / "model", files / "adapter")
    golden = {row.flag for row in MISREADINGS} - {"rows-of-q-and-k-are-permuted", "rows-of-q-and-k-are-not-permuted"}
    own = {row.flag for row in (*mistakes_of(subject), *further_mistakes_of(subject))} - golden
    assert own - {*UPDATES, *OTHERWISE} == set()
