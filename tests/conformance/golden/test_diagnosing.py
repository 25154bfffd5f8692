"""Engines with one planted cause each, of which the logits alone are seen.

An engine is minilora's own loader over other files than the diagnosis gets: a configuration with a key less, tensors
under other names. So what it computes is not computed by the formulas that name the mistake.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, attach, load_adapter, merge
from minilora.checks import FileRefused
from minilora.cli import main
from minilora.conformance.golden.diagnosing import Candidate, Diagnosis, diagnose
from minilora.files.tensors import FLOATS
from minilora.language.config import LlamaConfig
from minilora.layer import walk
from tests.support.language import write_folder

V, LAYERS = 29, 4
IDS = np.random.default_rng(5).integers(0, V, (2, 5))
P = "base_model.model.model.layers."
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7, "use_rslora": True,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "alpha_pattern": {"layers.1.mlp.up_proj": 20}, "rank_pattern": {"o_proj": 2}, "bias": "none",
}  # fmt: skip


def decoder():
    """Four blocks; q_proj and o_proj are square."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=20, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, frequencies=(1.0, 0.3),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = config.shapes().items()
    return Llama.build(config, {n: rng.standard_normal(s) * s[-1] ** -0.5 + (len(s) == 1) for n, s in shapes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and an adapter of all its linear layers, rank-stabilised and with patterns."""
    folder, rng, tensors = tmp_path_factory.mktemp("files"), np.random.default_rng(1), {}
    model = decoder()
    write_folder(folder / "model", model)
    for path, layer in walk(model):
        if path.endswith(("_proj", "lm_head")):
            (out, width), r = layer.weight.shape, 2 if path.endswith("o_proj") else 3
            tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((r, width)) * width**-0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.3 * rng.standard_normal((out, r))
    adapter(folder / "adapter", CONFIG, tensors)
    return folder


def adapter(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def engine(files, tmp_path, config=None, tensors=lambda t: t, change=lambda m: m, drop=()):
    """The logits of an engine that reads these files otherwise."""
    settings = {k: v for k, v in (CONFIG | (config or {})).items() if k not in drop}
    misread = adapter(
        tmp_path / "misread", settings, tensors(load_file(files / "adapter" / "adapter_model.safetensors"))
    )
    model = attach(Llama.load(files / "model", dtype="float64"), load_adapter(misread, dtype="float64"))
    return change(model)(IDS)


def answered(tmp_path, name="logits", prompts=IDS, computed_in=None, **tensors):
    """A file with an engine's answers."""
    file = tmp_path / "answers.safetensors"
    save_file({"prompts": prompts} | tensors, file, {"computed_in": computed_in} if computed_in else None)
    return file


def diagnosed(files, file):
    return diagnose(files / "model", files / "adapter", file)


def moved(by, wraps=True):
    def change(tensors):
        new = {}
        for name, array in tensors.items():
            if name.startswith(P):
                number, _, rest = name.removeprefix(P).partition(".")
                if not wraps and not 0 <= int(number) + by < LAYERS:
                    continue
                name = f"{P}{(int(number) + by) % LAYERS}.{rest}"
            new[name] = array
        return new

    return change


def turned(tensors):
    """The update of q_proj and o_proj transposed: A^T and B^T exchanged."""
    new = dict(tensors)
    for name in tensors:
        if name.endswith("lora_A.weight") and ("q_proj" in name or "o_proj" in name):
            other = name.replace("lora_A", "lora_B")
            new[name], new[other] = tensors[other].T, tensors[name].T
    return new


def exchanged(one, other):
    names = {one: other, other: one}

    def change(tensors):
        return {".".join(names.get(part, part) for part in name.split(".")): array for name, array in tensors.items()}

    return change


def without(*parts):
    return lambda tensors: {n: a for n, a in tensors.items() if not any(part in n for part in parts)}


def in_each(part, change):
    return lambda tensors: {n: change(a) if part in n else a for n, a in tensors.items()}


def rounded(dtype, whole=False):
    """Merge, and round every weight that an adapter changed; or every weight of the model."""

    def change(model):
        merged = merge(model)
        for path, layer in walk(merged):
            if hasattr(layer, "weight") and (whole or path.endswith(("_proj", "lm_head"))):
                W = layer.weight
                layer.weight = W.astype(FLOATS[dtype]).astype("f8")
        return merged

    return change


HALF = [f"layers.{i}." for i in range(LAYERS // 2)]
CAUSES = {
    "nothing is applied": ("the-adapter-is-not-applied", {"tensors": lambda t: {n: 0 * a for n, a in t.items()}}),
    "twice": (
        "the-update-is-added-twice", {"config": {"lora_alpha": 14, "alpha_pattern": {"layers.1.mlp.up_proj": 40}}},
    ),
    "without the root": ("rslora-root-is-ignored", {"config": {"use_rslora": False}}),
    "alpha is the rank": (
        "there-is-no-scaling", {"config": {"use_rslora": False, "lora_alpha": 3, "alpha_pattern": {"o_proj": 2}}},
    ),
    "the pattern of alphas dropped": ("alpha-pattern-is-dropped", {"drop": ["alpha_pattern"]}),
    "the next layer's": (
        "layers-are-shifted-up", {"tensors": moved(1), "config": {"alpha_pattern": {"layers.2.mlp.up_proj": 20}}},
    ),
    "the layer's before": (
        "layers-are-shifted-down", {"tensors": moved(-1), "config": {"alpha_pattern": {"layers.0.mlp.up_proj": 20}}},
    ),
    "the next layer's, without the last": (
        "layers-are-one-too-high",
        {"tensors": moved(1, wraps=False), "config": {"alpha_pattern": {"layers.2.mlp.up_proj": 20}}},
    ),
    "k and v left out": ("k-v-are-left-out", {"tensors": without("k_proj", "v_proj")}),
    "gate read twice": (
        "gate-twice", {"tensors": lambda t: {n: t[n.replace("up_proj", "gate_proj")] for n in t}},
    ),
    "half of the outputs": (
        "half-of-the-outputs-alone",
        {"tensors": in_each("lora_B", lambda B: np.concatenate([B[: len(B) // 2], 0 * B[len(B) // 2 :]]))},
    ),
    "transposed where square": ("a-square-update-is-transposed", {"tensors": turned}),
    "v_proj left out": ("v-proj-is-left-out", {"tensors": without("v_proj")}),
    "the head is the base's": ("lm-head-is-left-out", {"tensors": without("lm_head")}),
    "the MLP left out": ("the-mlp-is-left-out", {"tensors": without(".mlp.")}),
    "half of the layers": ("the-second-half-of-the-layers-alone", {"tensors": without(*HALF)}),
    "one layer alone": ("layer-2-alone", {"tensors": lambda t: {n: a for n, a in t.items() if "layers.2." in n}}),
    "q alone": ("q-proj-alone", {"tensors": lambda t: {n: a for n, a in t.items() if "q_proj" in n}}),
    "another alpha": ("alpha-16-is-taken-over-the-root", {"config": {"lora_alpha": 16}, "drop": ["alpha_pattern"]}),
    "one layer": ("layer-2-is-left-out", {"tensors": without("layers.2.")}),
    "gate and up exchanged": ("gate-and-up-are-swapped", {
        "tensors": exchanged("gate_proj", "up_proj"), "config": {"alpha_pattern": {"layers.1.mlp.gate_proj": 20}}}),
    "merged in bfloat16": ("merged-in-bfloat16", {"change": rounded("BF16")}),
    "merged in float16": ("merged-in-float16", {"change": rounded("F16")}),
    "the merged model in bfloat16": ("all-weights-in-bfloat16", {"change": rounded("BF16", whole=True)}),
    "subtracted": ("the-update-is-subtracted", {"tensors": in_each("lora_B", lambda B: -B)}),
    "the last rank dropped": (
        "the-last-rank-is-dropped",
        {"tensors": in_each("lora_A", lambda A: np.concatenate([A[:-1], 0 * A[-1:]]))},
    ),
}  # fmt: skip


FORMS = ("logits", "log_probabilities", "some ids")
QUICK = ("without the root", "half of the layers")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in QUICK else [pytest.mark.long]) for what in CAUSES]
)
def test_a_planted_cause_is_named(files, tmp_path, what):
    flag, options = CAUSES[what]
    z = engine(files, tmp_path, **options)
    diagnosis = diagnosed(files, answered(tmp_path, logits=z.astype("f4")))
    assert flag in diagnosis.json()["flags"], str(diagnosis)
    assert len(diagnosis.fitting) == 1
    assert diagnosis.status == 1
    assert f"[{flag}]" in diagnosis.first_line


@pytest.mark.parametrize("form", ["last", *(pytest.param(f, marks=pytest.mark.long) for f in FORMS)])
def test_right_logits_are_right_in_every_form(files, tmp_path, form):
    z = engine(files, tmp_path)
    p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    ids = np.argsort(-z, axis=-1)[..., :6].copy()
    tensors = {
        "logits": {"logits": z}, "last": {"logits": z[:, -1].copy()}, "log_probabilities": {"log_probabilities": p},
        "some ids": {"log_probabilities": np.take_along_axis(p, ids, axis=-1), "ids": ids},
    }[form]  # fmt: skip
    diagnosis = diagnosed(files, answered(tmp_path, **tensors))
    assert diagnosis.status == 0, str(diagnosis)
    assert "RIGHT" in diagnosis.first_line


def test_an_adapter_of_llama_cpps_is_that_which_it_was_made_of(files, tmp_path):
    pytest.importorskip("gguf")
    plain = adapter(
        tmp_path / "plain",
        CONFIG,
        {n: a for n, a in load_file(files / "adapter" / "adapter_model.safetensors").items() if "lm_head" not in n},
    )
    assert main(["export", str(plain), "--model", str(files / "model"), "-o", str(tmp_path / "a.gguf")]) == 0
    z = attach(Llama.load(files / "model", dtype="float64"), load_adapter(plain, dtype="float64"))(IDS)
    diagnosis = diagnose(files / "model", tmp_path / "a.gguf", answered(tmp_path, logits=z))
    assert diagnosis.status == 0, str(diagnosis)


def test_an_adapter_with_a_module_in_full_of_which_nothing_is_applied(files, tmp_path):
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    whole = {n: a for n, a in tensors.items() if "lm_head" not in n}
    whole["base_model.model.lm_head.weight"] = np.random.default_rng(5).standard_normal((V, 16))
    saved = adapter(tmp_path / "saved", CONFIG | {"modules_to_save": ["lm_head"]}, whole)
    z = Llama.load(files / "model")(IDS)
    diagnosis = diagnose(files / "model", saved, answered(tmp_path, logits=z))
    assert diagnosis.json()["flags"] == ["nothing-in-the-file-is-applied"], str(diagnosis)


def test_rounded_weights_are_no_mistake_within_the_declared_precision():
    rounding = Candidate("all-weights-in-bfloat16", "rounded", "", 0.01, 0.005, slack=10.0)
    for off, status in ((0.9, 0), (1.1, 1)):
        candidates = [Candidate("", "what is right", "", off, off / 2), rounding]
        assert Diagnosis("f", "bfloat16", 0.03, 1.0, candidates, {}).status == status


@pytest.mark.long
def test_a_mistake_shows_in_few_probabilities(files, tmp_path):
    z = engine(files, tmp_path, config={"use_rslora": False})[:, -1]
    p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    ids = np.argsort(-z, axis=-1)[..., :5].copy()
    tensors = {"log_probabilities": np.take_along_axis(p, ids, axis=-1).astype("f4"), "ids": ids.astype("i4")}
    diagnosis = diagnosed(files, answered(tmp_path, **tensors))
    assert [c.flag for c in diagnosis.fitting] == ["rslora-root-is-ignored"], str(diagnosis)


@pytest.mark.long
def test_keys_and_values_of_the_base_are_named(files, tmp_path):
    base = Llama.load(files / "model", dtype="float64")
    adapted = attach(base, load_adapter(files / "adapter", dtype="float64"))
    _, past = base.extend(IDS[:, :-1])
    z, _ = adapted.extend(IDS[:, -1:], past)
    diagnosis = diagnosed(files, answered(tmp_path, logits=z))
    assert [c.flag for c in diagnosis.fitting] == ["keys-and-values-are-the-bases"], str(diagnosis)


@pytest.mark.long
def test_another_strength_is_measured(files, tmp_path):
    config = {"lora_alpha": 7 * 1.37, "alpha_pattern": {"layers.1.mlp.up_proj": 20 * 1.37}}
    diagnosis = diagnosed(files, answered(tmp_path, logits=engine(files, tmp_path, config=config)))
    assert diagnosis.status == 1
    assert np.isclose(diagnosis.strength[0], 1.37, atol=0.01), str(diagnosis)
    assert "none of the" in diagnosis.first_line


def test_what_no_mistake_explains_is_said_to_be_so(files, tmp_path):
    z = engine(files, tmp_path) + np.random.default_rng(0).standard_normal((2, 5, V))
    diagnosis = diagnosed(files, answered(tmp_path, logits=z))
    assert (diagnosis.status, diagnosis.fitting, diagnosis.strength) == (1, [], None)
    assert f"none of the {len(diagnosis.candidates) - 1} known mistakes fits; the nearest is: " in diagnosis.first_line


@pytest.mark.long
def test_a_low_precision_that_nobody_declared_is_told(files, tmp_path):
    z = engine(files, tmp_path) + np.random.default_rng(0).uniform(-0.02, 0.02, (2, 5, V))
    assert "As if computed in float16" in diagnosed(files, answered(tmp_path, logits=z)).first_line
    assert diagnosed(files, answered(tmp_path, logits=z, computed_in="float16")).status == 0


@pytest.mark.long
def test_an_adapter_that_moves_nothing_cannot_be_judged(files, tmp_path):
    weak = {
        n: a * (1e-6 if "lora_B" in n else 1)
        for n, a in load_file(files / "adapter" / "adapter_model.safetensors").items()
    }
    folder = adapter(tmp_path / "weak", CONFIG, weak)
    z = decoder()(IDS) + np.random.default_rng(0).uniform(-6e-5, 6e-5, (2, 5, V))
    diagnosis = diagnose(files / "model", folder, answered(tmp_path, logits=z.astype("f4")))
    assert diagnosis.status == 2, str(diagnosis)
    assert "UNDECIDED" in diagnosis.first_line


def test_other_formats_are_taken_too(files, tmp_path):
    rng, tensors = np.random.default_rng(1), {}
    for i in range(LAYERS):
        name = f"model.layers.{i}.self_attn.q_proj"
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = (
            rng.standard_normal((16, 2)),
            rng.standard_normal((2, 16)),
        )
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    model = decoder()
    for path, layer in walk(model):
        if path.endswith("q_proj"):
            layer.weight = layer.weight + (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
    diagnosis = diagnose(files / "model", tmp_path / "mlx", answered(tmp_path, logits=model(IDS)))
    assert "there-is-no-scaling" in diagnosis.json()["flags"], str(diagnosis)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logits": np.ones((2, 5, V))}, "expected prompts"),
        ({"prompts": IDS.astype("f4"), "logits": np.ones((2, 5, V))}, "expected prompts"),
        ({"prompts": IDS}, "expected logits"),
        ({"prompts": IDS + V, "logits": np.ones((2, 5, V))}, "vocabulary of 29"),
        ({"prompts": IDS, "logits": np.ones((2, 4, V))}, r"logits has shape \(2, 4, 29\), expected \(2, 5, 29\)"),
        ({"prompts": IDS, "logits": np.full((2, 5, V), np.nan)}, "NaN"),
    ],
)
def test_answers_that_do_not_fit_are_refused(files, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "answers.safetensors")
    with pytest.raises(FileRefused, match=message):
        diagnosed(files, tmp_path / "answers.safetensors")


def test_an_adapter_of_another_model_is_refused(files, tmp_path):
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    folder = adapter(tmp_path / "other", CONFIG, {n.replace("layers.3", "layers.9"): a for n, a in tensors.items()})
    with pytest.raises(FileRefused, match="minilora audit"):
        diagnose(files / "model", folder, answered(tmp_path, logits=np.ones((2, 5, V))))


def of_q_proj_alone(tmp_path, layers, **settings):
    """A model of some layers, and an adapter of each one's q_proj."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, frequencies=(1.0, 0.3),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = config.shapes().items()
    model = Llama.build(config, {n: rng.standard_normal(s) * s[-1] ** -0.5 + (len(s) == 1) for n, s in shapes})
    write_folder(tmp_path / "model", model)
    tensors = {}
    for i in range(layers):
        tensors[f"{P}{i}.self_attn.q_proj.lora_A.weight"] = rng.standard_normal((2, 16)) / 4
        tensors[f"{P}{i}.self_attn.q_proj.lora_B.weight"] = 0.3 * rng.standard_normal((16, 2))
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **settings}
    adapter(tmp_path / "adapter", settings, tensors)
    return model, settings, tensors


def test_an_alpha_of_0_is_0(tmp_path):
    model, _, _ = of_q_proj_alone(tmp_path, 2, lora_alpha=0)
    assert diagnosed(tmp_path, answered(tmp_path, logits=model(IDS))).status == 0


def test_without_an_alpha_it_is_8(tmp_path):
    model, settings, tensors = of_q_proj_alone(tmp_path, 2, lora_alpha=None)
    read = load_adapter(adapter(tmp_path / "read", settings | {"lora_alpha": 8}, tensors), dtype="float64")
    assert diagnosed(tmp_path, answered(tmp_path, logits=attach(model, read)(IDS))).status == 0


def test_layers_in_the_order_of_their_names_as_text_are_named(tmp_path):
    """Of 11 layers and more: 10 acts in layer 2."""
    model, settings, tensors = of_q_proj_alone(tmp_path, 12, lora_alpha=4)
    moved = {}
    for layer, name in enumerate(sorted(range(12), key=str)):  # 0, 1, 10, 11, 2, ...
        for part in ("lora_A", "lora_B"):
            moved[f"{P}{layer}.self_attn.q_proj.{part}.weight"] = tensors[f"{P}{name}.self_attn.q_proj.{part}.weight"]
    z = attach(model, load_adapter(adapter(tmp_path / "misread", settings, moved), dtype="float64"))(IDS)
    assert diagnosed(tmp_path, answered(tmp_path, logits=z)).json()["flags"] == ["layers-are-sorted-as-text"]
