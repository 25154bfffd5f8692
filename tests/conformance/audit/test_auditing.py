"""Right adapters, none of which may be called wrong, and broken ones, each of which gets its name."""


import numpy as np
import pytest

from minilora.conformance.audit.auditing import audit

from .adapters import (
    PREFIX,
    D,
    Q,
    V,
    changed,
    config,
    factors,
    gguf,
    kohya,
    mlx,
    model,
    paths,
    peft,
    renamed,
    without,
)  # fmt: skip

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
    "a new head": lambda t: plain(
        t / "a", {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        lambda x: x | {f"{PREFIX}score.weight": np.ones((2, D), "f4")},
    ),
    "bias lora_only": lambda t: plain(
        t / "a", {"bias": "lora_only"},
        lambda x: x | {f"{PREFIX}{p}.base_layer.bias": np.ones(Q, "f4") for p in paths("q_proj")},
    ),
    "lora_bias": lambda t: plain(
        t / "a", {"lora_bias": True}, lambda x: x | {f"{PREFIX}{p}.lora_B.bias": np.ones(Q, "f4") for p in paths("q_proj")},
        kinds=("q_proj",),
    ),
    "half precision": lambda t: plain(t / "a", dtype="f2"),
    "layers_to_transform": lambda t: peft(
        t / "a", factors(paths(*QV, layers=[1])), config(*QV, layers_to_transform=[1], layers_pattern="layers")
    ),
    "excluded modules": lambda t: peft(
        t / "a", factors([p for p in paths(*QV) if "layers.0" not in p]), config(*QV, exclude_modules=r".*layers\.0\..*")
    ),
    "a regular expression": lambda t: plain(t / "a", {"target_modules": r".*\.(q|v)_proj"}),
    "an expression for one layer": lambda t: peft(
        t / "a", factors(paths(*QV, layers=[2])), config() | {"target_modules": r"model\.layers\.2\.self_attn\.[qv]_proj"}
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
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_a_right_adapter_is_sound(what, tmp_path):
    adapter = RIGHT[what](tmp_path)
    for base in (None, model(tmp_path / "m")):
        report = audit(adapter, base)
        assert (report.word, report.status) == ("SOUND", 0), str(report)
    assert report.first_line.startswith(f"{adapter.name}: SOUND: ")
    assert not report.landing.lost


WRONG_B = (f".{n}.lora_B.weight" for n in ("q_proj", "v_proj"))
BROKEN = {
    "B is zero": ("all-zero", lambda t: plain(t / "a", tensors=lambda x: changed(x, "B.weight", np.zeros_like))),
    "B is zero in one module": (
        "some-zero", lambda t: plain(t / "a", tensors=lambda x: changed(x, "1.self_attn.q_proj.lora_B.weight", np.zeros_like)),
    ),
    "A is zero": ("other-zero", lambda t: plain(t / "a", tensors=lambda x: changed(x, "A.weight", np.zeros_like))),
    "NaN": ("not-finite", lambda t: plain(t / "a", tensors=lambda x: changed(x, "2.self_attn.v_proj.lora_B.weight", lambda a: a * np.nan))),
    "infinity": ("not-finite", lambda t: plain(t / "a", tensors=lambda x: changed(x, "0.self_attn.v_proj.lora_A.weight", lambda a: a / 0.0 * np.inf))),
    "half a pair": ("half-a-pair", lambda t: plain(t / "a", tensors=lambda x: without(x, "1.self_attn.q_proj.lora_B.weight"))),
    "another half": ("half-a-pair", lambda t: plain(t / "a", tensors=lambda x: without(x, "1.self_attn.q_proj.lora_A.weight"))),
    "no alpha": ("alpha-missing", lambda t: plain(t / "a", {"lora_alpha": None})),
    "alpha is 0": ("alpha-zero", lambda t: plain(t / "a", {"lora_alpha": 0})),
    "an alpha of a pattern is 0": ("alpha-zero", lambda t: plain(t / "a", {"alpha_pattern": {"q_proj": 0}})),
    "alpha is a text": ("config-type", lambda t: plain(t / "a", {"lora_alpha": "16"})),
    "r is 0": ("config-type", lambda t: plain(t / "a", {"r": 0})),
    "another rank": ("rank-differs", lambda t: plain(t / "a", {"r": 4})),
    "a rank pattern that is not so": ("rank-differs", lambda t: plain(t / "a", {"rank_pattern": {"q_proj": 5}})),
    "ranks that differ": ("ranks-differ", lambda t: plain(t / "a", tensors=lambda x: changed(x, "q_proj.lora_B.weight", lambda a: a[:, :1]))),
    "no configuration": ("config-missing", lambda t: peft(t / "a", factors(paths(*QV)), None)),
    "an empty file": ("empty", lambda t: peft(t / "a", {}, config(*QV))),
    "no prefix": ("prefix-missing", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, ""))),
    "the prefix twice": ("prefix-doubled", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, 2 * PREFIX))),
    "a compiled model's names": ("prefix-orig-mod", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, f"{PREFIX}_orig_mod."))),
    "a distributed model's names": ("prefix-module", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, f"{PREFIX}module."))),
    "model. twice": ("prefix-model-doubled", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, f"{PREFIX}model."))),
    "model. missing": ("prefix-model-missing", lambda t: plain(t / "a", tensors=lambda x: renamed(x, f"{PREFIX}model.", PREFIX))),
    "language_model. before": ("prefix-language-model", lambda t: plain(t / "a", tensors=lambda x: renamed(x, PREFIX, f"{PREFIX}language_model."))),
    "language_model. in the midst": ("prefix-language-model", lambda t: plain(t / "a", tensors=lambda x: renamed(x, "model.layers", "model.language_model.layers"))),
    "the adapter's name in the keys": ("adapter-name-in-keys", lambda t: plain(t / "a", tensors=lambda x: renamed(x, ".weight", ".default.weight"))),
    "factors transposed": ("factors-turned", lambda t: plain(t / "a", tensors=lambda x: {k: v.T for k, v in x.items()})),
    "factors exchanged": ("factors-turned", lambda t: plain(t / "a", tensors=lambda x: {k.replace("lora_A", "*").replace("lora_B", "lora_A").replace("*", "lora_B"): v for k, v in x.items()})),
    "the update turned": ("shape-turned", lambda t: plain(t / "a", tensors=lambda x: {
        k: x[k.replace("lora_A", "*").replace("lora_B", "lora_A").replace("*", "lora_B")].T for k in x})),
    "a deeper model's": ("module-unknown", lambda t: plain(t / "a", tensors=lambda x: renamed(x, "layers.2", "layers.7"))),
    "a part of the rows": ("shape-is-a-part", lambda t: plain(t / "a", tensors=lambda x: changed(x, "q_proj.lora_B.weight", lambda a: a[: Q // 2]))),
    "a wider model's": ("shape-differs", lambda t: plain(t / "a", tensors=lambda x: changed(x, "lora_A.weight", lambda a: np.ones((2, D + 3), "f4") * np.arange(1, D + 4, dtype="f4")))),
    "a resized vocabulary": ("vocabulary-differs", lambda t: peft(t / "a", changed(factors(["lm_head"]), "B.weight", lambda a: np.ones((V + 2, 2), "f4")), config("lm_head"))),
    "a target without tensors": ("target-missing", lambda t: plain(t / "a", {"target_modules": [*QV, "up_proj"]})),
    "a layer without tensors": ("target-missing", lambda t: plain(t / "a", tensors=lambda x: {k: v for k, v in x.items() if "layers.1" not in k})),
    "tensors of no target": ("not-a-target", lambda t: plain(t / "a", {"target_modules": ["q_proj"]})),
    "targets in one text": ("not-a-target", lambda t: plain(t / "a", {"target_modules": "q_proj,v_proj"})),
    "tensors of an excluded module": ("not-a-target", lambda t: plain(t / "a", {"exclude_modules": ["v_proj"]})),
    "tensors of another layer": ("not-a-target", lambda t: plain(t / "a", {"layers_to_transform": [0]})),
    "an expression that is none": ("targets-not-read", lambda t: plain(t / "a", {"target_modules": "*.q_proj"})),
    "DoRA without magnitudes": ("magnitude-missing", lambda t: plain(t / "a", {"use_dora": True})),
    "magnitudes without DoRA": ("magnitude-ignored", lambda t: plain(t / "a", tensors=magnitudes)),
    "magnitudes of the inputs": ("magnitude-axis", lambda t: plain(t / "a", {"use_dora": True}, lambda x: magnitudes(x, lambda out, width: (width,)))),
    "magnitudes as LyCORIS has them": ("magnitude-axis", lambda t: plain(t / "a", {"use_dora": True}, lambda x: magnitudes(x, lambda out, width: (1, width)))),
    "a lost head": ("saved-missing", lambda t: plain(t / "a", {"modules_to_save": ["lm_head"]})),
    "a bias that is passed over": ("trained-bias-ignored", lambda t: plain(t / "a", tensors=lambda x: x | {f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": np.ones(Q, "f4")})),
    "a misspelt key": ("key-misspelt", lambda t: plain(t / "a", {"use_rsLora": True})),
    "a start that changed the base": ("start-changes-base", lambda t: plain(t / "a", {"init_lora_weights": "pissa_niter_16"})),
    "integers": ("type", lambda t: plain(t / "a", tensors=lambda x: {k: v.astype("i1") for k, v in x.items()})),
    "one module's factors twice": ("same-factors", lambda t: plain(t / "a", tensors=lambda x: x | {k.replace("layers.0", "layers.1"): v for k, v in x.items() if "layers.0" in k})),
    "a change far larger": ("change-far-larger", lambda t: plain(t / "a", tensors=lambda x: changed(x, "1.self_attn.q_proj.lora_B.weight", lambda a: 1e6 * a))),
    "MLX's as PEFT lies": ("factors-turned", lambda t: mlx(t / "a", paths(*QV), change=lambda x: {k: np.ascontiguousarray(v.T) for k, v in x.items()})),
    "MLX's without a scale": ("alpha-missing", lambda t: mlx(t / "a", paths(*QV), lora_parameters={"rank": 2})),
    "MLX's scale is 0": ("alpha-zero", lambda t: mlx(t / "a", paths(*QV), lora_parameters={"rank": 2, "scale": 0.0})),
    "MLX's with a key too many": ("target-missing", lambda t: mlx(t / "a", paths(*QV), lora_parameters={"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]})),
    "kohya's without alpha": ("alpha-missing", lambda t: kohya(t / "a.safetensors", paths(*QV), change=lambda x: without(x, ".alpha"))),
    "kohya's alpha is 0": ("alpha-zero", lambda t: kohya(t / "a.safetensors", paths(*QV), change=lambda x: changed(x, ".alpha", np.zeros_like))),
    "kohya's up is missing": ("half-a-pair", lambda t: kohya(t / "a.safetensors", paths(*QV), change=lambda x: without(x, "1_self_attn_q_proj.lora_up.weight"))),
    "a GGUF adapter without alpha": ("alpha-missing", lambda t: gguf(t / "a.gguf", paths(*QV), alpha=None)),
    "a GGUF adapter's pair": ("half-a-pair", lambda t: gguf(t / "a.gguf", paths(*QV), change=lambda x: without(x, "blk.1.attn_q.weight.lora_b"))),
    "a GGUF adapter of a deeper model": ("module-unknown", lambda t: gguf(t / "a.gguf", paths(*QV), change=lambda x: renamed(x, "blk.1.", "blk.9."))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_named(what, tmp_path):
    code, make = BROKEN[what]
    report = audit(make(tmp_path), model(tmp_path / "m"))
    serious = [finding.code for finding in report.findings if finding.level != "note"]
    assert code in serious, str(report)
    assert report.status == 1
    assert report.first_line.split(": ")[1] in ("WRONG", "SUSPICIOUS")
