"""Right adapters, none of which may be called wrong, and broken ones, each of which gets its name."""

import numpy as np
import pytest

from minilora.audit.auditing import audit

from .adapters import PREFIX, D, Q, V, changed, config, factors, gguf, kohya, mlx, model, paths, peft, renamed, without

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain(folder, settings=None, tensors=lambda t: t, kinds=QV, **options):
    """A folder of PEFT's with one change, in its configuration or its tensors."""
    return peft(folder, tensors(factors(paths(*kinds), **options)), config(*kinds) | (settings or {}))


def magnitudes(tensors, shape=lambda out, width: (out,)):
    """The tensors with a magnitude for each module."""
    more = {}
    for name, B in tensors.items():
        if name.endswith("lora_B.weight"):
            width = tensors[name.replace("lora_B", "lora_A")].shape[1]
            more[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(shape(len(B), width), "f4")
    return tensors | more


def other(name):
    """The name of the other factor."""
    return name.replace("lora_A", "*").replace("lora_B", "lora_A").replace("*", "lora_B")


RIGHT = {
    "PEFT's defaults": lambda t: plain(t / "a"),
    "rsLoRA": lambda t: plain(t / "a", {"use_rslora": True}),
    "DoRA": lambda t: plain(t / "a", {"use_dora": True}, magnitudes),
    "all kinds": lambda t: plain(t / "a", kinds=ALL),
    "all-linear": lambda t: plain(t / "a", {"target_modules": "all-linear"}, kinds=ALL),
    "rank patterns": lambda t: plain(
        t / "a", {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}, ranks={"model.layers.1.self_attn.q_proj": 3}
    ),
    "alpha patterns": lambda t: plain(t / "a", {"alpha_pattern": {".*v_proj": 9, "never": 1}}),
    "modules_to_save": lambda t: plain(
        t / "a", {"modules_to_save": ["lm_head"]}, lambda x: x | {f"{PREFIX}lm_head.weight": np.ones((V, D), "f4")}
    ),
    "modules_to_save that names ends": lambda t: plain(
        t / "a",
        {"modules_to_save": ["layernorm"]},
        lambda x: x | {f"{PREFIX}model.layers.0.input_layernorm.weight": np.ones(D, "f4")},
    ),
    "layers that stand several times": lambda t: peft(
        t / "a", factors(paths(*QV, layers=range(4))), config(*QV, layer_replication=[[0, 2], [1, 3]])
    ),
    "a new head": lambda t: plain(
        t / "a",
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        lambda x: x | {f"{PREFIX}score.weight": np.ones((2, D), "f4")},
    ),
    "bias lora_only": lambda t: plain(
        t / "a",
        {"bias": "lora_only"},
        lambda x: x | {f"{PREFIX}{p}.base_layer.bias": np.ones(Q, "f4") for p in paths("q_proj")},
    ),
    "lora_bias": lambda t: plain(
        t / "a",
        {"lora_bias": True},
        lambda x: x | {f"{PREFIX}{p}.lora_B.bias": np.ones(Q, "f4") for p in paths("q_proj")},
        kinds=("q_proj",),
    ),
    "half precision": lambda t: plain(t / "a", dtype="f2"),
    "layers_to_transform": lambda t: peft(
        t / "a", factors(paths(*QV, layers=[1])), config(*QV, layers_to_transform=[1], layers_pattern="layers")
    ),
    "excluded modules": lambda t: peft(
        t / "a",
        factors([p for p in paths(*QV) if "layers.0" not in p]),
        config(*QV, exclude_modules=r".*layers\.0\..*"),
    ),
    "a regular expression": lambda t: plain(t / "a", {"target_modules": r".*\.(q|v)_proj"}),
    "an expression for one layer": lambda t: peft(
        t / "a",
        factors(paths(*QV, layers=[2])),
        config() | {"target_modules": r"model\.layers\.2\.self_attn\.[qv]_proj"},
    ),
    "whole paths": lambda t: plain(t / "a", {"target_modules": paths(*QV)}),
    "an embedding, and the base's own": lambda t: peft(
        t / "a",
        factors(["model.embed_tokens", *paths("q_proj")])
        | {f"{PREFIX}model.embed_tokens.base_layer.weight": np.ones((V, D), "f4")},
        config("embed_tokens", "q_proj"),
    ),
    "a head": lambda t: peft(t / "a", factors(["lm_head", *paths("q_proj")]), config("lm_head", "q_proj")),
    "an unknown future key": lambda t: plain(t / "a", {"quantum_config": {"a": 1}}),
    "targets of other models too": lambda t: plain(t / "a", {"target_modules": [*QV, "c_attn", "query_key_value"]}),
    "eva's start": lambda t: plain(t / "a", {"init_lora_weights": "eva", "eva_config": {"rho": 2}}),
    "an MLX folder": lambda t: mlx(t / "a", paths(*QV)),
    "the last layers in MLX": lambda t: mlx(t / "a", paths(*QV, layers=[1, 2]), num_layers=2),
    "kohya's names": lambda t: kohya(t / "a.safetensors", paths(*QV)),
    "kohya's for a text encoder": lambda t: kohya(t / "a.safetensors", paths("q_proj"), start="lora_te1_"),
    "a GGUF adapter": lambda t: gguf(t / "a.gguf", paths(*QV)),
    "the file of a folder": lambda t: plain(t / "a") / "adapter_model.safetensors",
    "an old version's keys": lambda t: plain(t / "a", {"peft_version": None, "auto_mapping": None, "revision": None}),
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_right_adapter_is_sound(what, tmp_path):
    adapter = RIGHT[what](tmp_path)
    for base in (None, model(tmp_path / "m")):
        report = audit(adapter, base)
        assert (report.word, report.status) == ("SOUND", 0), str(report)
    assert report.first_line.startswith(f"{adapter.name}: SOUND: ")
    assert not report.landing.lost


def of(change):
    """A folder of PEFT's with its tensors changed."""
    return lambda folder: plain(folder / "a", tensors=change)


def said(settings):
    """A folder of PEFT's with its configuration changed."""
    return lambda folder: plain(folder / "a", settings)


def of_kohya(change):
    return lambda folder: kohya(folder / "a.safetensors", paths(*QV), change=change)


def of_gguf(change):
    return lambda folder: gguf(folder / "a.gguf", paths(*QV), change=change)


def of_mlx(parameters):
    return lambda folder: mlx(folder / "a", paths(*QV), lora_parameters=parameters)


def in_one(end, change):
    """The tensors of one name changed."""
    return lambda tensors: changed(tensors, end, change)


BROKEN = {
    "B is zero": ("all-zero", of(in_one("B.weight", np.zeros_like))),
    "B is zero in one module": (
        "some-zero",
        of(lambda x: changed(x, "1.self_attn.q_proj.lora_B.weight", np.zeros_like)),
    ),
    "A is zero": ("other-zero", of(in_one("A.weight", np.zeros_like))),
    "NaN": (
        "not-finite",
        lambda t: plain(
            t / "a", tensors=lambda x: changed(x, "2.self_attn.v_proj.lora_B.weight", lambda a: a * np.nan)
        ),
    ),
    "infinity": (
        "not-finite",
        lambda t: plain(
            t / "a", tensors=lambda x: changed(x, "0.self_attn.v_proj.lora_A.weight", lambda a: a / 0.0 * np.inf)
        ),
    ),
    "half a pair": (
        "half-a-pair",
        of(lambda x: without(x, "1.self_attn.q_proj.lora_B.weight")),
    ),
    "another half": (
        "half-a-pair",
        of(lambda x: without(x, "1.self_attn.q_proj.lora_A.weight")),
    ),
    "no alpha": ("alpha-missing", said({"lora_alpha": None})),
    "alpha is 0": ("alpha-zero", said({"lora_alpha": 0})),
    "an alpha of a pattern is 0": ("alpha-zero", said({"alpha_pattern": {"q_proj": 0}})),
    "alpha is a text": ("config-type", said({"lora_alpha": "16"})),
    "r is 0": ("config-type", said({"r": 0})),
    "another rank": ("rank-differs", said({"r": 4})),
    "a rank pattern that is not so": ("rank-differs", said({"rank_pattern": {"q_proj": 5}})),
    "ranks that differ": (
        "ranks-differ",
        of(lambda x: changed(x, "q_proj.lora_B.weight", lambda a: a[:, :1])),
    ),
    "no configuration": ("config-missing", lambda t: peft(t / "a", factors(paths(*QV)), None)),
    "an empty file": ("empty", lambda t: peft(t / "a", {}, config(*QV))),
    "a model": ("empty", lambda t: model(t / "a")),
    "a model's tensors": ("empty", lambda t: peft(t / "a", {"lm_head.weight": np.ones((V, D), "f4")}, config(*QV))),
    "no prefix": ("prefix-missing", of(lambda x: renamed(x, PREFIX, ""))),
    "the prefix twice": ("prefix-doubled", of(lambda x: renamed(x, PREFIX, 2 * PREFIX))),
    "a compiled model's names": (
        "prefix-orig-mod",
        of(lambda x: renamed(x, PREFIX, f"{PREFIX}_orig_mod.")),
    ),
    "names of FSDP": ("prefix-wrapped", of(lambda x: renamed(x, "self_attn.", "_fsdp_wrapped_module.self_attn."))),
    "a bias that is none": ("config-type", said({"bias": "lora"})),
    "a distributed model's names": (
        "prefix-module",
        of(lambda x: renamed(x, PREFIX, f"{PREFIX}module.")),
    ),
    "model. twice": (
        "prefix-model-doubled",
        of(lambda x: renamed(x, PREFIX, f"{PREFIX}model.")),
    ),
    "model. missing": (
        "prefix-model-missing",
        of(lambda x: renamed(x, f"{PREFIX}model.", PREFIX)),
    ),
    "language_model. before": (
        "prefix-language-model",
        of(lambda x: renamed(x, PREFIX, f"{PREFIX}language_model.")),
    ),
    "language_model. in the midst": (
        "prefix-language-model",
        of(lambda x: renamed(x, "model.layers", "model.language_model.layers")),
    ),
    "the adapter's name in the keys": (
        "adapter-name-in-keys",
        of(lambda x: renamed(x, ".weight", ".default.weight")),
    ),
    "factors transposed": (
        "factors-turned",
        of(lambda x: {k: v.T for k, v in x.items()}),
    ),
    "factors exchanged": (
        "factors-turned",
        of(lambda x: {other(k): v for k, v in x.items()}),
    ),
    "the update turned": ("shape-turned", of(lambda x: {k: x[other(k)].T for k in x})),
    "a deeper model's": (
        "module-unknown",
        of(lambda x: renamed(x, "layers.2", "layers.7")),
    ),
    "a part of the rows": (
        "shape-is-a-part",
        of(lambda x: changed(x, "q_proj.lora_B.weight", lambda a: a[: Q // 2])),
    ),
    "a wider model's": (
        "shape-differs",
        lambda t: plain(
            t / "a",
            tensors=lambda x: changed(
                x, "lora_A.weight", lambda a: np.ones((2, D + 3), "f4") * np.arange(1, D + 4, dtype="f4")
            ),
        ),
    ),
    "a resized vocabulary": (
        "vocabulary-differs",
        lambda t: peft(
            t / "a", changed(factors(["lm_head"]), "B.weight", lambda a: np.ones((V + 2, 2), "f4")), config("lm_head")
        ),
    ),
    "a target without tensors": ("target-missing", said({"target_modules": [*QV, "up_proj"]})),
    "a layer without tensors": (
        "target-missing",
        of(lambda x: {k: v for k, v in x.items() if "layers.1" not in k}),
    ),
    "tensors of no target": ("not-a-target", said({"target_modules": ["q_proj"]})),
    "targets in one text": ("not-a-target", said({"target_modules": "q_proj,v_proj"})),
    "tensors of an excluded module": ("not-a-target", said({"exclude_modules": ["v_proj"]})),
    "tensors of another layer": ("not-a-target", said({"layers_to_transform": [0]})),
    "an expression that is none": ("targets-not-read", said({"target_modules": "*.q_proj"})),
    "DoRA without magnitudes": ("magnitude-missing", said({"use_dora": True})),
    "magnitudes without DoRA": ("magnitude-ignored", lambda t: plain(t / "a", tensors=magnitudes)),
    "magnitudes of the inputs": (
        "magnitude-axis",
        lambda t: plain(t / "a", {"use_dora": True}, lambda x: magnitudes(x, lambda out, width: (width,))),
    ),
    "magnitudes as LyCORIS has them": (
        "magnitude-axis",
        lambda t: plain(t / "a", {"use_dora": True}, lambda x: magnitudes(x, lambda out, width: (1, width))),
    ),
    "a lost head": ("saved-missing", said({"modules_to_save": ["lm_head"]})),
    "a bias that is passed over": (
        "trained-bias-ignored",
        lambda t: plain(
            t / "a",
            tensors=lambda x: x | {f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": np.ones(Q, "f4")},
        ),
    ),
    "magnitudes as a row": (
        "magnitude-shape",
        lambda t: plain(t / "a", {"use_dora": True}, lambda x: magnitudes(x, lambda out, width: (1, out))),
    ),
    "names without an end": ("weight-missing", of(lambda x: renamed(x, ".weight", ""))),
    "a pattern that matches nothing": ("alpha-pattern-idle", said({"alpha_pattern": {"up_proj": 3}})),
    "lost rows of an embedding": ("token-rows-missing", said({"trainable_token_indices": [1, 2]})),
    "a head of another width": (
        "saved-shape",
        lambda t: plain(
            t / "a",
            {"modules_to_save": ["lm_head"]},
            lambda x: x | {f"{PREFIX}lm_head.weight": np.ones((V, D + 1), "f4")},
        ),
    ),
    "a misspelt key": ("key-misspelt", said({"use_rsLora": True})),
    "a start that changed the base": (
        "start-changes-base",
        lambda t: plain(t / "a", {"init_lora_weights": "pissa_niter_16"}),
    ),
    "integers": ("type", of(lambda x: {k: v.astype("i1") for k, v in x.items()})),
    "one module's factors twice": (
        "same-factors",
        lambda t: plain(
            t / "a",
            tensors=lambda x: x | {k.replace("layers.0", "layers.1"): v for k, v in x.items() if "layers.0" in k},
        ),
    ),
    "a change far larger": (
        "change-far-larger",
        of(lambda x: changed(x, "1.self_attn.q_proj.lora_B.weight", lambda a: 1e6 * a)),
    ),
    "MLX's as PEFT lies": (
        "factors-turned",
        lambda t: mlx(t / "a", paths(*QV), change=lambda x: {k: np.ascontiguousarray(v.T) for k, v in x.items()}),
    ),
    "MLX's without a scale": ("alpha-missing", of_mlx({"rank": 2})),
    "MLX's scale is 0": ("alpha-zero", of_mlx({"rank": 2, "scale": 0.0})),
    "MLX's DoRA without magnitudes": (
        "magnitude-missing",
        lambda t: mlx(t / "a", paths(*QV), fine_tune_type="dora"),
    ),
    "MLX's in more layers than are named": ("layers-ignored", lambda t: mlx(t / "a", paths(*QV), num_layers=1)),
    "MLX's with a key too many": (
        "target-missing",
        lambda t: mlx(
            t / "a", paths(*QV), lora_parameters={"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
        ),
    ),
    "kohya's without alpha": (
        "alpha-missing",
        of_kohya(lambda x: without(x, ".alpha")),
    ),
    "kohya's alpha is 0": (
        "alpha-zero",
        of_kohya(lambda x: changed(x, ".alpha", np.zeros_like)),
    ),
    "kohya's up is missing": (
        "half-a-pair",
        lambda t: kohya(
            t / "a.safetensors", paths(*QV), change=lambda x: without(x, "1_self_attn_q_proj.lora_up.weight")
        ),
    ),
    "a GGUF adapter of another kind": (
        "architecture-differs",
        lambda t: gguf(t / "a.gguf", paths(*QV), architecture="qwen2"),
    ),
    "numbers of another type": ("change-absurd", of(lambda x: {k: 1e9 * v for k, v in x.items()})),
    "numbers that vanish": ("change-absurd", of(lambda x: {k: 1e-12 * v for k, v in x.items()})),
    "an unknown packing": ("packing-undecided", said({"lora_B_layout": "expert_major"})),
    "a GGUF adapter without alpha": ("alpha-missing", lambda t: gguf(t / "a.gguf", paths(*QV), alpha=None)),
    "a GGUF adapter's pair": (
        "half-a-pair",
        of_gguf(lambda x: without(x, "blk.1.attn_q.weight.lora_b")),
    ),
    "a GGUF adapter of a deeper model": (
        "module-unknown",
        of_gguf(lambda x: renamed(x, "blk.1.", "blk.9.")),
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_named(what, tmp_path):
    code, make = BROKEN[what]
    report = audit(make(tmp_path), model(tmp_path / "m"))
    serious = [finding.code for finding in report.findings if finding.level != "note"]
    assert code in serious, str(report)
    assert report.status == 1
    assert report.first_line.split(": ")[1] in ("WRONG", "SUSPICIOUS")


@pytest.mark.parametrize("layers", [1, 2])
def test_the_verb_goes_with_the_number_of_modules(layers, tmp_path):
    few = [path for path in paths("q_proj") if int(path.split(".")[2]) < layers]

    def with_magnitudes(tensors):
        every = magnitudes(tensors)
        return {name: a for name, a in every.items() if name in tensors or any(path in name for path in few)}

    report = audit(plain(tmp_path / "a", tensors=with_magnitudes), model(tmp_path / "model"))
    (text,) = [finding.text for finding in report.findings if finding.code == "magnitude-ignored"]
    verb = "has" if layers == 1 else "have"
    assert f"layers.{layers - 1}.self_attn.q_proj' {verb} a lora_magnitude_vector" in text


def test_every_type_that_is_no_float_is_named(tmp_path):
    def of_two_types(tensors):
        return {name: a.astype("i1" if "layers.0" in name else "i8") for name, a in tensors.items()}

    report = audit(plain(tmp_path / "a", tensors=of_two_types), model(tmp_path / "model"))
    (text,) = [finding.text for finding in report.findings if finding.code == "type"]
    assert "have the type I64, I8, expected" in text
