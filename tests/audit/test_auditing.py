"""Right adapters, none of which may be called wrong, and broken ones, each of which gets its name, and no other.

What is said of each stands in `auditing.json`. ``python -m pytest tests/audit/test_auditing.py --approve`` writes it
anew: look at the difference then.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import LoRA, save_adapter
from minilora.audit.auditing import audit
from minilora.audit.contents import are_targets
from minilora.files.patterns import within_time

from .adapters import (
    EXPERTS,
    LAYERS,
    PREFIX,
    D,
    Q,
    V,
    change,
    changed,
    config,
    expert_factors,
    factors,
    gguf,
    gguf_model,
    kohya,
    mlx,
    model,
    ones,
    pairs,
    paths,
    peft,
    renamed,
    without,
    written,
)  # fmt: skip

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERT_0 = "model.layers.0.mlp.experts.0"
HEAD, EMBEDDING = f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"


def plain(settings=None, tensors=lambda t: t, kinds=QV, modules=None, more=None, **options):
    """A folder of PEFT's with a change in its configuration or its tensors."""

    def make(t):
        arrays = tensors(factors(modules or paths(*kinds), **options)) | (more or {})
        return peft(t / "a", arrays, config(*kinds) | (settings or {}))

    return make


def of(change, **settings):
    """A folder of PEFT's with its tensors changed."""
    return plain(settings, change)


def at(end, change):
    """The tensors whose name ends so changed."""
    return lambda tensors: changed(tensors, end, change)


def name(old, new):
    """The tensors under other names."""
    return lambda tensors: renamed(tensors, old, new)


def of_each(end, shape):
    """A tensor of ones for each q_proj."""
    return ones({f"{PREFIX}{path}.{end}": shape for path in paths("q_proj")})


def magnitudes(tensors, shape=lambda out, width: (out,), of=""):
    """The tensors with a magnitude for each module."""
    more = {}
    for key, B in tensors.items():
        if key.endswith("lora_B.weight") and of in key:
            width = tensors[key.replace("lora_B", "lora_A")].shape[1]
            more[key.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(shape(len(B), width), "f4")
    return tensors | more


def turned_magnitudes(shape):
    """DoRA's folder whose magnitudes have this shape."""
    return of(lambda x: magnitudes(x, shape), use_dora=True)


def in_first(key):
    """The name of the same tensor in the first layer."""
    return re.sub(r"layers\.\d", "layers.0", key)


def other(key):
    """The name of the other factor."""
    return key.replace("lora_A", "*").replace("lora_B", "lora_A").replace("*", "lora_B")


def far_larger(times):
    """The tensors with a change of one module that is so many times as large as the others'."""
    return lambda x: {k: a / 30 * (times if "1.self_attn.q_proj.lora_B" in k else 1) for k, a in x.items()}


def experts(settings=None, base=None, tensors=lambda t: t, **options):
    """An adapter of a mixture's two arrays, and the mixture."""

    def make(t):
        said = {"target_modules": [], "target_parameters": EXPERTS} | (settings or {})
        adapter = peft(t / "a", tensors(expert_factors(**options)), config(**said))
        return adapter, model(t / "b", experts=4, **(base or {}))

    return make


def beside(make, **base):
    """An adapter beside a base of its own."""
    return lambda t: (make(t), model(t / "b", **base))


def beside_more(make, *names):
    """An adapter beside a decoder with more modules."""

    def both(t):
        arrays = load_file(model(t / "m") / "model.safetensors")
        return make(t), written(t / "b", arrays | ones({f"{name}.weight": (Q, D) for name in names}))

    return both


def mixtrals_files(t):
    """An adapter of a mixture's arrays beside one whose experts have a Mixtral's names."""
    base = load_file(model(t / "m", experts=4, apart=True) / "model.safetensors")
    for old, new in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        base = {name.replace(old, new) if "expert" in name else name: array for name, array in base.items()}
    (t / "x").mkdir()
    return experts()(t / "x")[0], written(t / "b", base, {"model_type": "mixtral"})


def biased(t, bias="none", more=None):
    """An adapter beside a model whose q_proj has a bias."""
    arrays = ones({f"{p}.{end}": shape for p in paths("q_proj") for end, shape in (("weight", (Q, D)), ("bias", Q))})
    return plain({"bias": bias}, kinds=("q_proj",), more=more)(t), written(t / "b", arrays)


def gpt2(flag, head=False, square=False, change=lambda x: x):
    """An adapter of weights that are stored (in, out), which their bias shows, perhaps with a straight head."""
    widths = {"c_attn": 3 * D} | ({"c_proj": D} if square else {})
    shapes = {f"h.{i}.attn.{last}": (out, D) for i in range(2) for last, out in widths.items()}

    def make(t):
        arrays = {f"{path}.weight": shape[::-1] for path, shape in shapes.items()}
        arrays |= {f"{path}.bias": out for path, (out, _) in shapes.items()}
        arrays |= {"lm_head.weight": (V, D)} if head else {}
        tensors = pairs({f"transformer.{path}": shape for path, shape in shapes.items()}, dtype="f8")
        tensors |= factors(["lm_head"]) if head else {}
        said = config(*widths, *["lm_head"] * head, fan_in_fan_out=flag)
        return peft(t / "a", change(tensors), said), written(t / "b", ones(arrays))

    return make


def convolution(*shape, **magnitude):
    """An adapter of 7 x 3 x 5 x 5, maybe with a magnitude, beside a convolution of this shape."""

    def make(t):
        rng, key = np.random.default_rng(0), f"{PREFIX}enc.conv"
        A, B = rng.standard_normal((2, 3, 5, 5)), rng.standard_normal((7, 2, 1, 1))
        base = written(t / "b", {"enc.conv.weight": np.ones(shape, "f4")})
        tensors = {"lora_A.weight": A, "lora_B.weight": B} | magnitude
        settings = config("conv", use_dora=bool(magnitude))
        return peft(t / "a", {f"{key}.{part}": array for part, array in tensors.items()}, settings), base

    return make


def tied_gpt2(targets, tensors):
    """An adapter beside a GPT-2 whose weights are square, and whose head is its table."""
    base = ones({"h.0.c_proj.weight": (D, D), "wte.weight": (V, D)})
    said = config(*targets, fan_in_fan_out="wte" in targets)
    return lambda t: (peft(t / "a", tensors, said), written(t / "b", base, {"tie_word_embeddings": True}))


def seeing(first, kind, adapter, **more):
    """An adapter beside a model that sees: a decoder under another beginning, and a part that sees."""

    def make(t):
        base = load_file(model(t / "text") / "model.safetensors")
        arrays = {key.replace("model.", first): a for key, a in base.items()}
        arrays |= {f"vision_tower.layers.{i}.self_attn.q_proj.weight": np.ones((6, 6), "f4") for i in range(2)}
        return adapter(t), written(t / "b", arrays, {"architectures": [kind]} | more)

    return make


LANGUAGE = plain(
    {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    name(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
)
LLAVA = "LlavaForConditionalGeneration"


def onefile(t, tensors):
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, t / "a.safetensors")
    return t / "a.safetensors"


def image(*parts):
    """A file with kohya's names for parts of an image model, beside its U-Net."""

    def make(t):
        rng, tensors = np.random.default_rng(0), {}
        unet = [f"down_blocks.{i}.attn.to_{x}" for i in range(2) for x in "qv"]
        for start in parts:
            for path in unet if start == "lora_unet_" else ["text_model.q_proj"]:
                key = start + path.replace(".", "_")
                tensors |= {f"{key}.lora_down.weight": rng.standard_normal((2, 6)), f"{key}.alpha": np.array(1.0),
                            f"{key}.lora_up.weight": rng.standard_normal((6, 2))}  # fmt: skip
        return onefile(t, tensors), written(t / "b", {f"{path}.weight": np.ones((6, 6), "f4") for path in unet})

    return make


def beside_experts(shapes, target, **base):
    """An adapter of modules of these shapes, by their ends in each layer, beside a mixture."""
    shapes = {f"model.layers.{i}.mlp.{end}": shape for i in range(LAYERS) for end, shape in shapes.items()}
    return lambda t: (peft(t / "a", pairs(shapes, dtype="f8"), config(target)), model(t / "b", experts=4, **base))


def of_one_expert(kind, number=3, width=6):
    """Adapters of experts one by one, in the names of transformers 4, beside a mixture whose experts are one array."""
    old, names = ("block_sparse_moe", ("w1", "w3", "w2")) if kind == "mixtral" else ("mlp", ALL[4:])
    shapes = {
        f"model.layers.{i}.{old}.experts.{e}.{last}": shape
        for i in range(LAYERS)
        for e in (0, 1, 2, number)
        for last, shape in zip(names, ((width, D), (width, D), (D, width)), strict=True)
    }
    return lambda t: (
        peft(t / "a", pairs(shapes, dtype="f8"), config(*names)),
        model(t / "b", experts=4, model_type=kind),
    )


def dense(kind, targets=ALL, by_weight=False):
    """An adapter of MLPs that are no mixtures, beside a model of a kind that has mixtures too."""
    names = [f"{path}.weight" for path in paths(*ALL[4:])] if by_weight else None
    said = {"target_modules": ALL[:4] if by_weight else targets, "target_parameters": names}
    return beside(plain(said, kinds=ALL), model_type=kind)


def one_array(t):
    shapes = {f"model.layers.{i}.mlp.gate_up_proj": (20, D) for i in range(LAYERS)}
    settings = config(target_modules=[], target_parameters=["gate_up_proj.weight"])
    base = written(t / "b", ones({f"{path}.weight": shape for path, shape in shapes.items()}))
    return peft(t / "a", pairs(shapes, dtype="f8"), settings), base


def renamed_weights(t):
    base = model(t / "b")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    return plain()(t), base


def mlx_experts(t, array="up_proj", out=6, **base):
    def change(_):
        rng, tensors = np.random.default_rng(0), {}
        for i in range(LAYERS):
            key = f"model.layers.{i}.mlp.switch_mlp.{array}"
            tensors[f"{key}.lora_a"] = rng.standard_normal((4, 2, D))
            tensors[f"{key}.lora_b"] = rng.standard_normal((4, out, 2))
        return tensors

    adapter = mlx(t / "a", paths("q_proj"), change=change, lora_parameters={"rank": 2, "scale": 20.0})
    return adapter, model(t / "b", experts=4, **(base or {"apart": True}))


def mlx_layers(*layers, of=4):
    """An MLX folder of some layers of a model's."""

    def make(t):
        base = written(t / "b", ones({f"{path}.weight": (Q, D) for path in paths("q_proj", layers=range(of))}))
        return mlx(t / "a", paths("q_proj", layers=layers), num_layers=len(layers)), base

    return make


def few_bits(t):
    arrays = {f"{path}.{end}": np.ones((3, 4), "u1") for path in paths(*QV) for end in ("qweight", "qzeros")}
    return plain()(t), written(t / "b", arrays)


def llama_cpps_names(t):
    base = gguf_model(t / "m.gguf", {"attn_qkv": (20, D), "attn_q": (Q, D)}, "phi3")
    return plain(tensors=name("q_proj", "qkv_proj"), kinds=("qkv_proj",), modules=paths("q_proj"))(t), base


def on_gguf(make, *more):
    sizes = {"attn_q": (Q, D), "attn_v": (4, D), "ffn_up": (10, D), "ffn_down": (D, 10)}
    return lambda t: (make(t), gguf_model(t / "m.gguf", sizes, more=more))


def image_parts(*starts, down="lora_A", up="lora_B", write=onefile):
    """An adapter of one layer for each part of an image model, in diffusers' names, and all parts in one model.

    Its scaling is 1, and nothing says it.
    """
    shapes = {
        f"{start}to_q.{part}.weight": (2, 6) if part == down else (6, 2) for start in starts for part in (down, up)
    }
    rng = np.random.default_rng(0)

    def make(t):
        base = written(t / "b", ones({f"{start}to_q.weight": (6, 6) for start in starts}))
        return write(t, {name: rng.standard_normal(shape) for name, shape in shapes.items()}), base

    return make


def mlx_alone(t):
    """MLX's tensors without their configuration."""
    return (mlx(t / "a", paths(*QV)) / "adapters.safetensors").rename(t / "a.safetensors")


def mlx_magnitudes(tensors):
    return tensors | {k.replace("lora_b", "m"): a[0] for k, a in tensors.items() if "lora_b" in k}


def gguf_more(shapes):
    """A GGUF adapter of q_proj and of these, and a GGUF model that has them all."""
    arrays = {f"{name}.weight.lora_{part}": np.random.default_rng(0).standard_normal(shape).astype("f4")
              for name, pair in shapes.items() for part, shape in zip("ab", pair, strict=True)}  # fmt: skip
    return lambda t: gguf(t / "a.gguf", paths("q_proj"), change=lambda x: x | arrays)


def kohya_convolution(t):
    shapes = {"lora_down.weight": (2, 3, 5, 5), "lora_up.weight": (7, 2, 1, 1)}
    tensors = {f"lora_unet_enc_conv.{part}": np.random.default_rng(0).standard_normal(s) for part, s in shapes.items()}
    base = written(t / "b", {"enc.conv.weight": np.ones((7, 3, 5, 5), "f4")})
    return onefile(t, tensors | {"lora_unet_enc_conv.alpha": np.array([4.0])}), base


def of_kohya(change):
    return lambda t: kohya(t / "a.safetensors", paths(*QV), change=change)


def lycoris(tensors, axis):
    """The tensors with a magnitude for each output (out, 1), or as LyCORIS may have it for each input (1, in)."""
    shapes = {key.partition(".")[0]: (len(a), tensors[key.replace("up", "down")].shape[1]) for key, a in tensors.items()
              if "lora_up" in key}  # fmt: skip
    sizes = {key: (out, 1) if axis == 0 else (1, width) for key, (out, width) in shapes.items()}
    return tensors | {f"{key}.dora_scale": np.ones(size, "f2") for key, size in sizes.items()}


def q1(part, change):
    """One factor of one module changed."""
    return of(at(f"1.self_attn.q_proj.lora_{part}.weight", change))


STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "")
CONVERTED = ("mixtral", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "olmoe")
UNUSUAL = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
           "ensure_weight_tying")  # fmt: skip
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
EMBEDDED = plain(kinds=("embed_tokens", "q_proj"), modules=["model.embed_tokens", *paths("q_proj")])
RIGHT = {
    # of PEFT
    "PEFT's defaults": (plain(), ""),
    "the file of a folder": (lambda t: plain()(t) / "adapter_model.safetensors", ""),
    "numbers of a test": (of(lambda x: {k: np.ones_like(a) for k, a in x.items()}), "same-factors rank-unused"),
    "half precision": (plain(dtype="f2"), ""),
    "half precision in one factor": (of(at("q_proj.lora_B.weight", lambda b: b.astype("f2"))), "mixed-types"),
    "a rank as large as the smaller width": (plain({"r": 4}, kinds=("v_proj",), r=4), ""),
    "a rank above the smaller width": (plain({"r": 16}, kinds=("v_proj",), r=16), "rank-above-width"),
    "small numbers": (of(lambda x: {k: 2e-6 * a for k, a in x.items()}), ""),
    "large numbers": (of(lambda x: {k: 15 * a for k, a in x.items()}), ""),
    "a change 500 times as large as the others": (of(far_larger(500)), ""),
    "all kinds": (plain(kinds=ALL), ""),
    "a column of B that is a multiple": (q1("B", lambda a: a[:, :1] * np.array([1, -3], "f4")), "rank-unused"),
    "a row of A that is nearly a multiple": (q1("A", lambda a: np.stack([a[0], a[0] + 1e-7 * a[1]])), "rank-unused"),
    "ranks that are not used": (
        plain({"r": 4}, lambda x: {k: a * (np.arange(4) < (1 if "layers.0" in k else 3))[:, None] if "A" in k else a
                                   for k, a in x.items()}, kinds=("q_proj",), r=4), "rank-unused"),
    "a row far smaller than another": (of(at("A.weight", lambda a: a * np.array([[1], [1e-4]], "f4"))), ""),
    "rsLoRA": (plain({"use_rslora": True}), "use-rslora"),
    "rsLoRA of three ranks": (
        plain({"use_rslora": True, "rank_pattern": {"v_proj": 8, "k_proj": 4}}, kinds=("q_proj", "k_proj", "v_proj"),
              ranks=dict.fromkeys(paths("v_proj"), 8) | dict.fromkeys(paths("k_proj"), 4)),
        "use-rslora rank-pattern rank-above-width"),
    "rsLoRA of a rank of 4 and one of 128": (
        plain({"use_rslora": True, "r": 4, "rank_pattern": {"v_proj": 128}}, r=4,
              ranks=dict.fromkeys(paths("v_proj"), 128)), "use-rslora rank-pattern rank-above-width"),
    "DoRA": (of(magnitudes, use_dora=True), "use-dora"),
    "rank patterns": (plain({"rank_pattern": {"layers.1.self_attn.q_proj": 3}},
                            ranks={"model.layers.1.self_attn.q_proj": 3}), "rank-pattern"),
    "alpha patterns": (plain({"alpha_pattern": {".*v_proj": 9, "never": 1}}), "alpha-pattern-idle alpha-pattern"),
    "lora_bias beside an embedding, which has none": (
        plain({"lora_bias": True}, kinds=("embed_tokens", "q_proj"), modules=["model.embed_tokens", *paths("q_proj")],
              more=of_each("lora_B.bias", Q)), "lora-bias"),
    "a rank pattern with a key too many": (
        plain({"rank_pattern": {"q_proj": 2, "never": 3}}), "rank-pattern-idle rank-pattern"),
    "eva's start": (plain({"init_lora_weights": "eva", "eva_config": {"rho": 2}}), ""),
    "an unknown future key": (plain({"quantum_config": {"a": 1}}), "key-unknown"),
    "a variant that few programs read": (plain({"use_qalora": True}), "use-qalora"),
    "variants that are off": (plain({"use_qalora": False, "arrow_config": None, "use_bdlora": []}), ""),
    "unknown keys that are not set": (plain({"quantum": None, "spin": [], "charm": {}, "top": False}), ""),
    "an old version's keys": (plain({"peft_version": None, "auto_mapping": None, "revision": None}), ""),
    # what was trained in full
    "modules_to_save": (plain({"modules_to_save": ["lm_head"]}, more={HEAD: np.ones((V, D), "f4")}), "modules-to-save"),
    "modules_to_save as in a model's state": (
        plain({"modules_to_save": ["lm_head", "embed_tokens"]}, more=ones({
            f"{PREFIX}lm_head.modules_to_save.default.weight": (V, D), f"{PREFIX}lm_head.modules_to_save.bias": V,
            f"{PREFIX}model.embed_tokens.modules_to_save.weight": (V, D)})), "modules-to-save"),
    "modules_to_save that names ends": (
        plain({"modules_to_save": ["layernorm"]},
              more={f"{PREFIX}model.layers.0.input_layernorm.weight": np.ones(D, "f4")}), "modules-to-save"),
    "modules_to_save alone": (
        lambda t: peft(t / "a", {HEAD: np.ones((V, D), "f4")}, config(modules_to_save=["lm_head"])), "modules-to-save"),
    "a target that modules_to_save names": (
        plain({"target_modules": [*QV, "lm_head"], "modules_to_save": ["lm_head"]},
              more={HEAD: np.ones((V, D), "f4")}), "modules-to-save"),
    "modules_to_save with a bias": (
        plain({"modules_to_save": ["lm_head"]}, more=ones({HEAD: (V, D), f"{PREFIX}lm_head.bias": V})),
        "modules-to-save"),
    "a new head": (plain({"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
                         more={f"{PREFIX}score.weight": np.ones((2, D), "f4")}), "modules-to-save"),
    "tables of any name": (
        plain(more=ones({f"{PREFIX}transformer.wte.weight": (V, D), f"{PREFIX}score.weight": (2, D), HEAD: (V, D),
                         EMBEDDING: (V, D)})), "embeddings-beside"),
    "rows of an embedding": (
        plain({"trainable_token_indices": [1, 2]},
              more=ones({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, D),
                         f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": (V, D)})),
        "token-rows trainable-token-indices"),
    "a vocabulary that has grown": (plain(more={HEAD: np.ones((V + 2, D), "f4")}),
        "vocabulary-grown embeddings-beside"),
    "bias lora_only": (
        lambda t: biased(t, "lora_only", of_each("base_layer.bias", Q)),
        "bias"),
    "biases that the model has and none were trained": (biased, ""),
    # targets
    "all-linear": (plain({"target_modules": "all-linear"}, kinds=ALL), ""),
    "a regular expression": (plain({"target_modules": r".*\.(q|v)_proj"}), ""),
    "all-linear where another layer may be one": (
        beside_more(plain({"target_modules": "all-linear"}, kinds=ALL), "model.layers.0.short_conv"), ""),
    "an expression for one layer": (
        plain({"target_modules": r"model\.layers\.2\.self_attn\.[qv]_proj"}, modules=paths(*QV, layers=[2])), ""),
    "whole paths": (plain({"target_modules": paths(*QV)}), ""),
    "targets of other models too": (plain({"target_modules": [*QV, "c_attn", "query_key_value"]}), ""),
    "excluded modules": (plain({"exclude_modules": r".*layers\.0\..*"}, modules=paths(*QV, layers=[1, 2])), ""),
    "layer 0 alone": (plain({"layers_to_transform": 0}, modules=paths(*QV, layers=[0])), ""),
    "some layers": (plain({"layers_to_transform": [0, 2], "layers_pattern": "layers"},
                          modules=paths(*QV, layers=[0, 2])), ""),
    "no layers, which are all": (plain({"layers_to_transform": [], "layers_pattern": []}), ""),
    "layers that stand several times": (
        plain({"layer_replication": [[1, 3], [0, 3]]}, modules=paths(*QV, layers=range(5))), "layer-replication"),
    # embeddings and heads
    "an embedding, and the base's own": (
        plain(kinds=("embed_tokens", "q_proj"), modules=["model.embed_tokens", *paths("q_proj")],
              more={f"{PREFIX}model.embed_tokens.base_layer.weight": np.ones((V, D), "f4")}), ""),
    "a head": (plain(kinds=("lm_head", "q_proj"), modules=["lm_head", *paths("q_proj")]), ""),
    "a tied head": (beside(plain(kinds=("lm_head", "q_proj"), modules=["lm_head", *paths("q_proj")]), tied=True),
                    "tied-head"),
    "a head that is GPT-2's table": (tied_gpt2(["lm_head"], factors(["lm_head"])), "tied-head"),
    "a tied embedding": (beside(EMBEDDED, tied=True), "tied-head"),
    # models of other kinds
    "shards": (beside(plain(), shards=5), ""),
    "a folder with one file of another name": (renamed_weights, ""),
    "an adapter of the model without its head": (
        plain({"task_type": None, "auto_mapping": {"base_model_class": "LlamaModel"}},
              name(f"{PREFIX}model.", PREFIX)), "prefix-model-missing"),
    "names of a model without its head, of which its task says so": (
        plain({"task_type": "FEATURE_EXTRACTION"}, name(f"{PREFIX}model.", PREFIX)), "prefix-model-missing"),
    "a model without its head": (beside(plain(), first="", tied=True), ""),
    "routers and what predicts more tokens, which have no adapter": (
        beside_more(plain({"target_modules": [*QV, "router", "gate"]}), "mtp.layers.0.q_proj",
                    "model.layers.0.mlp.router", "model.layers.0.mlp.gate"), ""),
    "a layer too many for the configuration": (
        beside(plain(modules=paths(*QV, layers=[0, 1])), num_hidden_layers=2), ""),
    "a layer that is not built": (
        lambda t: (plain(modules=paths(*QV, layers=[0, 1]))(t),
                   written(t / "b", load_file(model(t / "m") / "model.safetensors"),
                           {"text_config": {"num_hidden_layers": 2}})), ""),
    "weights (in, out)": (gpt2(True), ""),
    "weights (in, out) that a bias shows": (gpt2(False), ""),
    "square weights (in, out) beside a table": (
        tied_gpt2(["c_proj", "wte"], pairs({"transformer.h.0.c_proj": (D, D)}) | renamed(
            factors(["model.embed_tokens"]), "model.embed_tokens", "transformer.wte")), "tied-head"),
    "weights both ways": (gpt2(True, head=True, square=True), ""),
    "a convolution's DoRA": (
        convolution(7, 3, 5, 5, lora_magnitude_vector=np.ones((1, 7, 1, 1))), "use-dora"),
    "a convolution": (convolution(7, 3, 5, 5), ""),
    "a convolution in groups": (convolution(7, 1, 5, 5), ""),
    "a copy of a table that has grown": (
        plain(kinds=("embed_tokens",), modules=["model.embed_tokens"],
              more={f"{PREFIX}model.embed_tokens.base_layer.weight": np.ones((V + 2, D), "f4")}), "vocabulary-grown"),
    "weights in few bits": (few_bits, ""),
    "weights in 8-bit floats": (beside(plain(), dtype=ml_dtypes.float8_e4m3fn), ""),
    "a model that sees": (seeing("language_model.model.", LLAVA, LANGUAGE), ""),
    "one with new names": (seeing("model.language_model.", LLAVA, LANGUAGE), ""),
    "one with the names of a decoder": (seeing("model.", LLAVA, LANGUAGE), ""),
    "the language part of one that sees": (
        seeing("language_model.model.", "GemmaForCausalLM", plain()),
        "prefix-language-model-missing target-missing-in-vision"),
    # mixtures
    "experts": (experts(), "target-parameters"),
    "experts of DoRA": (experts({"use_dora": True}), "use-dora target-parameters"),
    "experts by whole paths": (
        experts({"target_parameters": [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in EXPERTS]}),
        "target-parameters"),
    "a mixture in a Mixtral's files": (mixtrals_files, "target-parameters"),
    "targets that experts apart have too": (
        beside(plain({"target_modules": [*QV, "down_proj"]}), experts=4, apart=True), "experts-untouched"),
    "experts apart": (experts(base={"apart": True}), "target-parameters"),
    "experts of which the first alone leaves a rank out": (  # B has a column for rank 0 of each expert, then for rank 1
        experts(tensors=at("B.weight", lambda a: a * (np.arange(a.shape[1]) != 4))), "rank-unused target-parameters"),
    "experts of large numbers": (experts(tensors=at("B.weight", lambda a: 250 * a)), "target-parameters"),
    "experts of an old version": (experts({"peft_version": "0.18.1"}, exchanged=True),
                                  "packing-of-old-peft target-parameters"),
    "experts of an old version, apart": (
        experts({"peft_version": "0.19.0"}, {"apart": True}, exchanged=True), "packing-of-old-peft target-parameters"),
    "an array that is a module's weight": (one_array, "target-parameters"),
    "experts (in, out)": (experts(base={"in_out": True}), "target-parameters"),
    "experts (in, out) of old versions": (experts({"peft_version": "0.18.1"}, {"in_out": True}), "target-parameters"),
    "experts (in, out), exchanged": (experts({"peft_version": "0.19.0"}, {"in_out": True}, exchanged=True),
                                     "target-parameters"),
    "square experts": (experts({}, {"square": True}, m=4), "target-parameters"),
    "experts without a version that shapes decide": (experts({"peft_version": None}), "target-parameters"),
    "experts with no list of targets": (experts({"target_modules": None}), "target-parameters"),
    "arrays without their module": (
        experts({"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
                tensors=lambda x: x | factors(paths("q_proj"))), "target-parameters"),
    "an expert that no token reached": (
        experts(tensors=at("B.weight", lambda a: a * (np.arange(8) % 4 != 1))), "idle-experts target-parameters"),
    "attention beside experts": (beside(plain(), experts=4), "experts-untouched"),
    "a shared expert": (
        beside_experts({"shared_expert.up_proj": (7, D)}, "up_proj", shared=True), "experts-untouched"),
    "experts under old names": (
        beside_experts({f"experts.{e}.down_proj": (D, 6) for e in range(4)}, "down_proj", apart=True),
        "old-expert-names"),
    **{f"{kind}'s old names for one array": (of_one_expert(kind), "old-expert-names") for kind in CONVERTED},
    "a Mixtral's old names for tensors apart": (
        lambda t: (of_one_expert("mixtral")(t)[0], model(t / "apart", experts=4, apart=True)), "old-expert-names"),
    "an action from some tokens on": (plain({"alora_invocation_tokens": [1]}), "alora-invocation-tokens"),
    "variants that no other program reads": (
        plain(dict.fromkeys(UNUSUAL, True)), " ".join(name.replace("_", "-") for name in UNUSUAL)),
    "dense blocks of a Qwen3-MoE by weight": (dense("qwen3_moe", by_weight=True), "target-parameters"),
    "dense blocks of a Qwen2-MoE": (dense("qwen2_moe"), ""),
    "attention of a Qwen3-MoE": (beside(plain(), model_type="qwen3_moe"), ""),
    # of other programs
    "an MLX folder": (lambda t: mlx(t / "a", paths(*QV)), ""),
    "MLX's last layers": (lambda t: mlx(t / "a", paths(*QV, layers=[1, 2]), num_layers=2), ""),
    "MLX's two layers of four": (mlx_layers(0, 2), ""),
    "MLX's first eleven layers of twelve": (mlx_layers(*range(11), of=12), ""),
    "MLX's 16 layers of 3": (lambda t: mlx(t / "a", paths(*QV), num_layers=16), ""),
    "MLX's -1 for all of its layers": (lambda t: mlx(t / "a", paths(*QV), num_layers=-1), ""),
    "MLX's 0 for all of its layers": (lambda t: mlx(t / "a", paths(*QV), num_layers=0), ""),
    "MLX's alpha": (lambda t: mlx(t / "a", paths(*QV), lora_parameters={"rank": 2, "alpha": 40}), ""),
    "MLX's experts": (mlx_experts, ""),
    "MLX's square experts": (lambda t: mlx_experts(t, "gate_up_proj", D, square=True), ""),
    **{f"kohya's names that begin with {start!r}": (
        lambda t, start=start: kohya(t / "a.safetensors", paths("q_proj"), start=start), "") for start in STARTS},
    "kohya's for two parts": (image("lora_unet_", "lora_te_"), "another-part"),
    "kohya's magnitudes": (of_kohya(lambda x: lycoris(x, 0)), ""),
    "kohya's magnitudes of each input": (of_kohya(lambda x: lycoris(x, 1)), "magnitude-of-inputs"),
    "diffusers' names of five parts": (
        image_parts("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3."), ""),
    "diffusers' first names": (image_parts("unet.", down="lora.down", up="lora.up"), "alpha-missing"),
    "kohya's convolution": (kohya_convolution, ""),
    "kohya's magnitudes of one number": (
        of_kohya(lambda x: changed(lycoris(x, 0), "dora_scale", lambda a: a[:1])), ""),
    "MLX's DoRA": (lambda t: mlx(t / "a", paths("q_proj"), change=mlx_magnitudes, fine_tune_type="dora"), ""),
    "MLX's embedding": (
        lambda t: mlx(t / "a", ["model.embed_tokens", *paths("q_proj")], lora_parameters={"rank": 2, "scale": 2}), ""),
    "a GGUF adapter's embedding": (on_gguf(gguf_more({"token_embd": ((V, 2), (D, 2))}), "token_embd", "output"), ""),
    "a GGUF adapter's experts": (
        lambda t: (gguf_more({"blk.0.ffn_up_exps": ((4, 2, D), (4, 6, 2))})(t),
                   gguf_model(t / "m.gguf", {"attn_q": (Q, D), "ffn_up_exps": (4, 6, D)})), ""),
    "a GGUF adapter": (lambda t: gguf(t / "a.gguf", paths(*QV)), ""),
    "a GGUF adapter beside a Mistral, a llama to llama.cpp": (
        beside(lambda t: gguf(t / "a.gguf", paths(*QV)), model_type="mistral"), ""),
    "a GGUF adapter beside a kind that is not known": (
        beside(lambda t: gguf(t / "a.gguf", paths(*QV)), model_type="future"), ""),
    "a GGUF adapter of a GGUF model": (on_gguf(lambda t: gguf(t / "a.gguf", paths("q_proj", "up_proj"))), ""),
    "an adapter of a GGUF model": (on_gguf(plain()), ""),
    "an embedding of a tied GGUF model": (on_gguf(EMBEDDED, "token_embd"), "tied-head"),
    "an embedding of a GGUF model with a head": (on_gguf(EMBEDDED, "token_embd", "output"), ""),
    "a GGUF adapter's names that are not known": (
        lambda t: gguf(t / "a.gguf", paths(*QV), change=name("attn_q", "attn_new")), "module-unknown"),
    "llama.cpp's names that are not known": (llama_cpps_names, "module-unknown"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model of all adapters that have none of their own."""
    return model(tmp_path_factory.mktemp("base") / "m")


def said_of(report):
    """What the file is, all findings, which modules there are, how many of each kind, and how many fit."""
    said = [report.text or report.lines[0], *(f"{f.level}: {f.text} [{f.code}]" for f in report.findings)]
    known = [
        " ".join(str(m[key]) for key in ("kind", "shape", "rank", "alpha", "scaling"))
        for m in report.details["modules"]
    ]
    counts = (line for line in report.lines if line.startswith(("modules: ", "shapes: ")))
    said += [", ".join(dict.fromkeys(known)), *counts]
    return [text.replace(str(report.adapter.path.parent), "~") for text in said]


@pytest.fixture
def look(tmp_path, base):
    """Return the report of an adapter beside its base."""

    def look(make):
        made = make(tmp_path)
        return audit(*made) if isinstance(made, tuple) else audit(made, base)

    return look


def codes(report, *levels):
    return " ".join(finding.code for finding in report.findings if finding.level in levels)


@pytest.mark.parametrize("what", RIGHT)
def test_a_right_adapter_is_sound(what, look, approved):
    make, notes = RIGHT[what]
    report = look(make)
    assert (report.word, report.status, codes(report, "note")) == ("SOUND", 0, notes), str(report)
    assert report.first_line.startswith(f"{report.adapter.path.name}: SOUND: ")
    assert set(report.landing.places) | set(report.landing.elsewhere) | set(report.landing.lost) == set(report.numbers)
    alone = audit(report.adapter.path)
    assert alone.status == 0, str(alone)
    assert {kind["total"] for kind in alone.details["kinds"]} <= {None}
    known, own = ({kind.name: kind.adapted for kind in of.kinds if kind.adapted} for of in (report, alone))
    if report.landing.places == {path: path for path in alone.numbers} and known.keys() == own.keys():
        assert own == known
    assert approved(what, said_of(report)) == said_of(report)


def of_gguf(change=lambda x: x, **options):
    return lambda t: gguf(t / "a.gguf", paths(*QV), change=change, **options)


def of_mlx(change=lambda x: x, **settings):
    return lambda t: mlx(t / "a", paths(*QV), change=change, **settings)


def embedding(zero):
    """An adapter of an embedding and of q_proj, the factors whose names end so zero."""
    modules = ["model.embed_tokens", *paths("q_proj")]
    return plain(
        {}, lambda x: {k: 0 * a if k.endswith(zero) else a for k, a in x.items()}, ("embed_tokens", "q_proj"), modules
    )


def one_matrix(whole, *kinds):
    """An adapter of several matrices that the model has in one."""
    shapes = {f"model.layers.{i}.{whole}.weight": (20, D) for i in range(LAYERS)}
    return lambda t: (plain(kinds=kinds)(t), written(t / "b", ones(shapes)))


BROKEN = {
    # numbers
    "B is zero": (of(at("B.weight", np.zeros_like)), "all-zero"),
    "B is zero in one module": (of(at("1.self_attn.q_proj.lora_B.weight", np.zeros_like)), "some-zero"),
    "B is zero in most modules": (
        of(lambda x: {k: 0 * a if "layers.2" not in k and "lora_B" in k else a for k, a in x.items()}), "some-zero"),
    "A is zero": (of(at("A.weight", np.zeros_like)), "other-zero"),
    "an embedding that was never trained": (embedding(("embedding_A", "B.weight")), "all-zero"),
    "an embedding's other factor": (embedding("embedding_B"), "other-zero"),
    "NaN": (of(lambda x: {k: a * np.nan if "v_proj" in k else a for k, a in x.items()}), "not-finite"),
    "infinity": (of(at("0.self_attn.v_proj.lora_A.weight", lambda a: a * np.inf)), "not-finite"),
    "a magnitude of NaN": (
        of(lambda x: {k: a * np.nan if "magnitude" in k else a for k, a in magnitudes(x).items()}, use_dora=True),
        "not-finite"),
    "a change far larger": (of(far_larger(2000)), "change-far-larger"),
    "numbers of another type": (of(lambda x: {k: 50 * a for k, a in x.items()}), "change-absurd"),
    "numbers that vanish": (of(lambda x: {k: 2e-7 * a for k, a in x.items()}), "change-absurd"),
    "integers": (of(lambda x: {k: a.astype("i1" if "layers.0" in k else "i8") for k, a in x.items()}), "type not-read"),
    "integers in one factor": (of(at("0.self_attn.q_proj.lora_B.weight", lambda a: a.astype("i1"))), "type not-read"),
    "B is zero wherever it can be read": (
        of(lambda x: {k: a.astype("i1") if "0.self_attn.q" in k else a * ("A" in k) for k, a in x.items()}),
        "type not-read all-zero"),
    "one module's factors twice": (
        of(lambda x: x | {k.replace("layers.0", "layers.1"): a for k, a in x.items() if "layers.0" in k}),
        "same-factors"),
    "the first layer's factors in all": (of(lambda x: {k: x[in_first(k)] for k in x}), "same-factors"),
    "the same factors beside constant ones": (
        of(lambda x: {k: np.ones_like(a) if "2.self_attn.v" in k else x[in_first(k)] for k, a in x.items()}),
        "same-factors"),
    # shapes of factors
    "half a pair": (of(lambda x: without(x, "1.self_attn.q_proj.lora_B.weight")), "half-a-pair"),
    "another half": (of(lambda x: without(x, "1.self_attn.q_proj.lora_A.weight")), "half-a-pair"),
    "a half of each": (
        of(lambda x: without(x, "0.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight")),
        "half-a-pair"),
    "half a pair of NaN": (
        of(lambda x: {k: a * np.nan for k, a in x.items() if "lora_A" in k}), "half-a-pair not-finite"),
    "a magnitude alone": (
        of(lambda x: without(magnitudes(x), "1.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight"),
           use_dora=True),
        "half-a-pair"),
    "ranks that differ": (of(at("q_proj.lora_B.weight", lambda a: a[:, :1])), "ranks-differ"),
    "another rank": (plain({"r": 4}), "rank-differs"),
    "another rank, of DoRA": (of(magnitudes, r=4, use_dora=True), "rank-differs"),
    "a rank pattern that is not so": (plain({"rank_pattern": {"q_proj": 5}}), "rank-differs"),
    "factors transposed": (of(lambda x: {k: a.T for k, a in x.items()}), "factors-turned"),
    "factors transposed, of a square weight": (
        lambda t: (peft(t / "a", {k: a.T for k, a in pairs({"fc": (D, D)}).items()}, config("fc")),
                   written(t / "b", ones({"fc.weight": (D, D)}))), "factors-turned shape-differs"),
    "factors exchanged": (of(lambda x: {other(k): a for k, a in x.items()}), "factors-turned"),
    "vectors": (of(lambda x: {k: a.ravel() for k, a in x.items()}), "shape-of-factors"),
    "factors without numbers": (of(lambda x: {k: a[:0] for k, a in x.items()}), "shape-of-factors"),
    # names
    "no prefix": (of(name(PREFIX, "")), "prefix-missing"),
    "the prefix twice": (of(name(PREFIX, 2 * PREFIX)), "prefix-doubled"),
    "a compiled model's names": (of(name(PREFIX, f"{PREFIX}_orig_mod.")), "prefix-orig-mod"),
    **{f"names with {part}": (of(name("self_attn.", f"{part}.self_attn.")), "prefix-wrapped") for part in WRAPPERS},
    "a distributed model's names": (of(name(PREFIX, f"{PREFIX}module.")), "prefix-module"),
    "one of the two, compiled": (of(name(PREFIX, f"{PREFIX}module._orig_mod.")), "prefix-module"),
    "model. twice": (of(name(PREFIX, f"{PREFIX}model.")), "prefix-model-doubled"),
    "a wrapped model's names": (
        plain({}, name(PREFIX, f"_orig_mod.{PREFIX}"), ("q_proj",), paths("q_proj", layers=[0])),
        "prefix-missing prefix-doubled target-missing"),
    "a distributed model's names before": (
        plain({}, name(PREFIX, f"module.{PREFIX}")), "prefix-missing prefix-doubled"),
    "model. missing": (of(name(f"{PREFIX}model.", PREFIX)), "prefix-model-missing"),
    "model. missing beside the name of a class with a head": (
        plain({"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
              name(f"{PREFIX}model.", PREFIX)), "prefix-model-missing"),
    "a part too many": (of(name(PREFIX, f"{PREFIX}net.")), "prefix-unknown"),
    "language_model. before": (of(name(PREFIX, f"{PREFIX}language_model.")), "prefix-language-model"),
    "language_model. in the midst": (of(name("model.layers", "model.language_model.layers")), "prefix-language-model"),
    "language_model. missing": (seeing("language_model.model.", LLAVA, plain()), "prefix-language-model-missing"),
    "the adapter's name in the keys": (of(name(".weight", ".default.weight")), "adapter-name-in-keys"),
    "names without an end": (of(name(".weight", "")), "weight-missing"),
    "names of nothing": (plain(more={f"{PREFIX}a.b": np.ones(3, "f4")}), "unknown-tensors"),
    "a part that stands twice": (
        plain(more=of_each("lora_A.a.weight", (2, D)) | of_each("lora_B.a.weight", (Q, 2))),
        "adapter-name-in-keys part-twice"),
    # the model
    "a deeper model's": (of(name("layers.2", "layers.7")), "module-unknown target-missing"),
    "another model's": (of(name("self_attn", "attention")), "module-unknown"),
    "a deeper one's, in llama.cpp's format both": (
        on_gguf(lambda t: gguf(t / "a.gguf", paths("q_proj"), change=name("blk.1.", "blk.9."))),
        "module-unknown target-missing"),
    "a layer is missing of a model that sees": (
        seeing("language_model.model.", LLAVA, plain(
            {"target_modules": r"model\.language_model\..*\.(q_proj|v_proj)"},
            name(f"{PREFIX}model.", f"{PREFIX}model.language_model."), modules=paths(*QV, layers=[0, 2]))),
        "target-missing"),
    "a layer is missing of the part that sees, which is deeper": (
        seeing("language_model.model.", LLAVA, lambda t: peft(
            t / "a", pairs({"vision_tower.layers.0.self_attn.q_proj": (6, 6)}),
            config() | {"target_modules": ".*vision.*q_proj"}), num_hidden_layers=1), "target-missing"),
    "another model's, beside a mixture": (
        beside(of(name("self_attn", "attention")), model_type="qwen3_moe"), "module-unknown"),
    "matrices that the model has in one": (one_matrix("self_attn.qkv_proj", *QV), "module-unknown"),
    "an MLP's that it has in one": (one_matrix("mlp.gate_up_proj", "gate_proj", "up_proj"), "module-unknown"),
    "an MLP's that it has apart": (
        plain({}, name("up_proj", "gate_up_proj"), ("gate_up_proj",), paths("up_proj")), "module-unknown"),
    "a matrix that the model has apart": (
        plain({}, name("q_proj", "qkv_proj"), ("qkv_proj",), paths("q_proj")), "module-unknown"),
    "the update turned": (of(lambda x: {k: x[other(k)].T for k in x}), "shape-turned"),
    "a part of the rows": (of(at("q_proj.lora_B.weight", lambda a: a[: Q // 3])), "shape-is-a-part"),
    "a part of the columns": (of(at("q_proj.lora_A.weight", lambda a: a[:, : D // 4])), "shape-is-a-part"),
    "rows that are no whole part": (of(at("q_proj.lora_B.weight", lambda a: a[: Q // 3 + 1])), "shape-differs"),
    "columns that are no whole part": (of(at("q_proj.lora_A.weight", lambda a: a[:, : D - 1])), "shape-differs"),
    "a convolution of more channels": (convolution(7, 4, 5, 5), "shape-differs"),
    "a convolution of fewer outputs": (convolution(6, 3, 5, 5), "shape-differs"),
    "a wider model's": (of(at("lora_A.weight", lambda a: np.outer([1, 2], np.arange(1, D + 4)).astype("f4"))),
    "shape-differs"),
    "a wider model's, under fan_in_fan_out": (
        gpt2(True, change=at("A.weight", lambda a: np.pad(a, ((0, 0), (0, 3))))), "shape-differs"),
    "a resized vocabulary": (
        plain({}, at("B.weight", lambda a: np.ones((V + 2, 2), "f4")), ("lm_head",), ["lm_head"]),
        "vocabulary-differs"),
    "another embedding": (
        plain({}, at("embedding_A", lambda a: a[:, :10]), ("embed_tokens",), ["model.embed_tokens"]),
        "vocabulary-differs"),
    "a head of another width": (
        plain({"modules_to_save": ["lm_head"]}, more={HEAD: np.ones((V, D + 1), "f4")}), "saved-shape"),
    "a head of another width and more words": (
        plain({"modules_to_save": ["lm_head"]}, more={HEAD: np.ones((V + 2, D + 1), "f4")}), "saved-shape"),
    "a head's factors of another width": (
        plain({}, at("A.weight", lambda a: a[:, :3]), ("lm_head",), ["lm_head"]), "shape-differs"),
    "an embedding of another width": (
        plain({}, at("embedding_B", lambda b: b[:3]), ("embed_tokens",), ["model.embed_tokens"]), "shape-differs"),
    "a head of a smaller vocabulary": (
        plain({"modules_to_save": ["lm_head"]}, more={HEAD: np.ones((V - 2, D), "f4")}), "saved-shape"),
    "a flag that no weight bears out": (plain({"fan_in_fan_out": True}), "fan-in-fan-out"),
    # the configuration
    "no configuration": (lambda t: peft(t / "a", factors(paths(*QV)), None), "config-missing"),
    "no configuration, in one file": (
        lambda t: onefile(t, factors(paths(*QV))), "config-missing"),
    "no configuration of a decoder": (image_parts("transformer.h.0."), "config-missing"),
    "no configuration of a part in a folder": (
        image_parts("unet.", write=lambda t, tensors: peft(t / "a", tensors, None)), "config-missing"),
    "no configuration, under PEFT's prefix": (
        lambda t: (onefile(t, pairs({"unet.to_q": (6, 6)})), written(t / "b", ones({"unet.to_q.weight": (6, 6)}))),
        "config-missing"),
    "an empty file": (lambda t: peft(t / "a", {}, config(*QV)), "empty"),
    "a model": (lambda t: model(t / "a"), "empty"),
    "a model's tensors": (lambda t: peft(t / "a", {"lm_head.weight": np.ones((V, D), "f4")}, config(*QV)),
    "empty prefix-missing"),
    "no alpha": (plain({"lora_alpha": None}), "alpha-missing"),
    "no rank": (plain({"r": None}), "rank-missing rank-differs"),
    "alpha is 0": (plain({"lora_alpha": 0}), "alpha-zero"),
    "alpha is negative": (plain({"lora_alpha": -4}), "alpha-negative"),
    "an alpha of a pattern is 0": (plain({"alpha_pattern": {"q_proj": 0}}), "alpha-zero config-type"),
    "alpha is a text": (plain({"lora_alpha": "16"}), "config-type"),
    "r is 0": (plain({"r": 0}), "config-type"),
    "a flag that is a number": (plain({"use_rslora": 1}), "config-type"),
    "flags that are numbers": (plain({"use_dora": 1, "fan_in_fan_out": 1}), "config-type"),
    "a bias that is none": (plain({"bias": "lora"}), "config-type"),
    "a table that is a list": (plain({"rank_pattern": [1]}), "config-type"),
    "values of other types": (
        plain({"r": True, "lora_alpha": True, "lora_bias": 0, "rank_pattern": {"q_proj": 2.0, "v_proj": 0},
               "alpha_pattern": {"q_proj": True, "v_proj": -1}}), "config-type"),
    "no type": (plain({"peft_type": None}), "config-type"),
    "a misspelt key": (plain({"use_rsLora": True}), "key-misspelt"),
    "two letters exchanged in a key": (plain({"lora_dorpout": 0.1}), "key-misspelt"),
    "a start that changed the base": (plain({"init_lora_weights": "pissa_niter_16"}), "start-changes-base"),
    "a start that nobody knows": (plain({"init_lora_weights": "zero"}), "start-unknown"),
    "a start that is a number": (plain({"init_lora_weights": 1}), "start-unknown"),
    "a packing that is a list": (plain({"lora_B_layout": ["rank_major"]}), "packing-undecided"),
    "an unknown packing": (plain({"lora_B_layout": "expert_major"}), "packing-undecided"),
    "a pattern that matches nothing": (plain({"alpha_pattern": {"up_proj": 3}}), "alpha-pattern-idle"),
    "a rank pattern that matches nothing": (plain({"rank_pattern": {"up_proj": 3}}), "rank-pattern-idle"),
    "a pattern that is none": (plain({"alpha_pattern": {"(": 3}}), "pattern-not-read targets-not-read"),
    # what it names
    "no targets": (plain({"target_modules": None}), "targets-missing"),
    "a target without tensors": (plain({"target_modules": [*QV, "up_proj"]}), "target-missing"),
    "a layer without tensors": (of(lambda x: {k: a for k, a in x.items() if "layers.1" not in k}), "target-missing"),
    "tensors of no target": (plain({"target_modules": ["q_proj"]}), "not-a-target"),
    "targets in one text": (plain({"target_modules": "q_proj,v_proj"}), "not-a-target"),
    "tensors of no target of many": (plain({"target_modules": [f"never_{i}" for i in range(30)]}), "not-a-target"),
    "a router of one layer": (
        beside_more(plain({"target_modules": [*QV, "router"]}, more=pairs({"model.layers.0.router": (Q, D)}, seed=1)),
                    *(f"model.layers.{i}.router" for i in range(3))), "target-missing"),
    "tensors of an excluded module": (plain({"exclude_modules": ["v_proj"]}), "not-a-target"),
    "tensors of another layer": (plain({"layers_to_transform": [0]}), "not-a-target"),
    "tensors of what is trained in full": (
        plain({"modules_to_save": ["q_proj"]}, more=of_each("weight", (Q, D))), "not-a-target"),
    "an expression that is none": (plain({"target_modules": "*.q_proj"}), "targets-not-read"),
    "DoRA without magnitudes": (plain({"use_dora": True}), "magnitude-missing"),
    "magnitudes without DoRA": (of(magnitudes), "magnitude-ignored"),
    "a magnitude without DoRA": (of(lambda x: magnitudes(x, of="layers.0.self_attn.q")), "magnitude-ignored"),
    "magnitudes of the inputs": (turned_magnitudes(lambda out, width: (width,)), "magnitude-axis"),
    "magnitudes as LyCORIS has them": (turned_magnitudes(lambda out, width: (1, width)), "magnitude-axis"),
    "magnitudes of one number": (turned_magnitudes(lambda out, width: (1,)), "magnitude-shape"),
    "magnitudes as a row": (turned_magnitudes(lambda out, width: (1, out)), "magnitude-shape"),
    "lora_bias without biases": (plain({"lora_bias": True}), "bias-missing"),
    "biases without lora_bias": (
        plain(more=of_each("lora_B.bias", Q)), "bias-ignored"),
    "a bias of another length": (
        plain({"lora_bias": True}, kinds=("q_proj",), more=of_each("lora_B.bias", 3)),
        "bias-shape"),
    "a lost head": (plain({"modules_to_save": ["lm_head"]}), "saved-missing"),
    "a lost head that the base has not": (plain({"modules_to_save": ["score"]}), "saved-missing"),
    "one of two that is lost": (
        plain({"modules_to_save": ["embed_tokens", "lm_head"]}, more={EMBEDDING: np.ones((V, D), "f4")}),
        "saved-missing"),
    "a whole weight that is passed over": (
        plain(more={f"{PREFIX}model.norm.weight": np.ones(D, "f4")}), "saved-ignored"),
    "biases that are passed over": (
        plain(more=ones({f"{PREFIX}{p}.base_layer.bias": Q if "q_proj" in p else 4 for p in paths(*QV)})),
        "trained-bias-ignored"),
    "biases that are passed over where nothing is said": (
        plain({"bias": None}, more=of_each("base_layer.bias", Q)), "trained-bias-ignored"),
    "a lost bias": (lambda t: biased(t, "lora_only"), "trained-bias-missing"),
    "a lost bias of all": (lambda t: biased(t, "all"), "trained-bias-missing"),
    "lost rows of an embedding": (plain({"trainable_token_indices": [1, 2]}), "token-rows-missing"),
    # mixtures
    "a part of a mixture and of its attention": (
        experts({"target_modules": ["q_proj"]}, {"shared": True}, lambda x: x | factors(paths("q_proj", layers=[0]))),
        "target-missing"),
    "exchanged, by today's version": (experts(exchanged=True), "packing-exchanged"),
    "exchanged, without a version": (experts({"peft_version": None}, exchanged=True), "packing-undecided"),
    "square, without a version": (experts({"peft_version": None}, {"square": True}, m=4), "packing-undecided"),
    "packed as today, by an old version": (experts({"peft_version": "0.18.0"}), "packing-contradicted"),
    "another number of experts": (experts(E=3), "experts-differ"),
    "experts of another width": (experts(m=5), "shape-differs"),
    "experts of another rank": (experts({"r": 3}), "rank-differs experts-differ"),
    "one array named alone": (experts({"target_parameters": EXPERTS[:1]}),
                              "target-parameters rank-differs module-unknown not-a-target target-parameters-missing"),
    "dense blocks of a Qwen3-MoE by name": (dense("qwen3_moe"), "dense-taken-for-experts"),
    "dense blocks without up_proj": (
        beside(plain(kinds=("down_proj",)), model_type="qwen3_moe"), "dense-taken-for-experts"),
    "dense blocks by an expression": (dense("qwen3_moe", r".*_proj"), "dense-taken-for-experts"),
    "dense blocks of a DeepSeek": (dense("deepseek_v3", "all-linear"), "dense-taken-for-experts"),
    "dense blocks that are no targets": (dense("qwen3_moe", ALL[:4]), "not-a-target"),
    "a Qwen2-MoE's old names for one array": (of_one_expert("qwen2_moe"), "module-unknown"),
    "old names of an expert too many": (of_one_expert("mixtral", 4), "module-unknown"),
    "old names of another width": (of_one_expert("mixtral", width=12), "shape-differs"),
    "one expert apart": (
        beside(lambda t: peft(t / "a", pairs({f"{EXPERT_0}.down_proj": (D, 6)}), config("down_proj")),
               experts=4, apart=True), "target-missing"),
    "arrays that are missing": (
        beside(plain({"target_parameters": [*EXPERTS, "mlp.a", "mlp.b"]}), experts=4), "target-parameters-missing"),
    # of other programs
    "MLX's as PEFT lies": (of_mlx(lambda x: {k: np.ascontiguousarray(a.T) for k, a in x.items()}), "factors-turned"),
    "MLX's without a scale": (of_mlx(lora_parameters={"rank": 2}), "alpha-missing"),
    "MLX's scale is 0": (of_mlx(lora_parameters={"rank": 2, "scale": 0.0}), "alpha-zero"),
    "an old MLX's alpha is 0": (of_mlx(lora_parameters={"rank": 2, "alpha": 0}), "alpha-zero"),
    "MLX's DoRA without magnitudes": (of_mlx(fine_tune_type="dora"), "magnitude-missing"),
    "MLX's magnitudes without DoRA": (of_mlx(mlx_magnitudes), "magnitude-ignored"),
    "MLX's without a configuration": (mlx_alone, "alpha-missing"),
    "MLX's scale is a flag": (of_mlx(lora_parameters={"rank": 2, "scale": True}), "alpha-zero"),
    "MLX's scale is a text": (of_mlx(lora_parameters={"rank": 2, "scale": "20"}), "alpha-zero"),
    "MLX's alpha without a rank": (of_mlx(lora_parameters={"alpha": 40}), "alpha-missing"),
    "MLX's alpha is a text": (of_mlx(lora_parameters={"rank": 2, "alpha": "40"}), "alpha-missing"),
    "MLX's alpha of a rank of 0": (of_mlx(lora_parameters={"rank": 0, "alpha": 40}), "alpha-missing"),
    "MLX's in more layers than are named": (of_mlx(num_layers=1), "layers-ignored"),
    "MLX's in fewer layers than are named": (
        lambda t: mlx(t / "a", paths(*QV, layers=[2]), num_layers=2), "layers-missing"),
    "MLX's with a key too many": (
        of_mlx(lora_parameters={"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}),
        "target-missing"),
    "MLX's three layers of four": (mlx_layers(0, 2, 3), "target-missing"),
    "MLX's with a layer too few": (
        lambda t: mlx(t / "a", paths("q_proj", layers=[0, 2])), "layers-missing target-missing"),
    "MLX's with a stranger": (of_mlx(lambda x: x | {"lora_a": np.ones(2, "f4")}), "unknown-tensors"),
    "kohya's without alpha": (of_kohya(lambda x: without(x, ".alpha")), "alpha-missing"),
    "kohya's alpha is 0": (of_kohya(lambda x: changed(x, ".alpha", np.zeros_like)), "alpha-zero"),
    "kohya's alpha is two numbers": (of_kohya(lambda x: changed(x, ".alpha", lambda a: np.ones(2))), "alpha-missing"),
    "kohya's alpha alone": (
        of_kohya(lambda x: {k: a for k, a in x.items() if "1_self_attn_q_proj.lora" not in k}), "half-a-pair"),
    "kohya's every down is missing": (of_kohya(lambda x: without(x, "lora_down.weight")), "half-a-pair"),
    "kohya's up is missing": (of_kohya(lambda x: without(x, "1_self_attn_q_proj.lora_up.weight")), "half-a-pair"),
    "kohya's for another part": (lambda t: (image("lora_unet_", "lora_te_")(t)[0], model(t / "m")), "module-unknown"),
    "kohya's magnitudes of another length": (
        of_kohya(lambda x: changed(lycoris(x, 0), "dora_scale", lambda a: a[1:])), "magnitude-shape"),
    "kohya's with a third factor": (of_kohya(lambda x: x | {"a_lora_mid": np.ones(2, "f4")}), "unknown-tensors"),
    "a GGUF adapter of another kind": (of_gguf(architecture="qwen2"), "architecture-differs"),
    "a GGUF adapter of another kind of GGUF model": (on_gguf(of_gguf(architecture="qwen2")), "architecture-differs"),
    "a GGUF adapter without alpha": (of_gguf(alpha=None), "alpha-missing"),
    "a GGUF adapter whose alpha is 0": (of_gguf(alpha=0.0), "alpha-zero"),
    "a GGUF adapter's pair": (of_gguf(lambda x: without(x, "blk.1.attn_q.weight.lora_b")), "half-a-pair"),
    "a GGUF adapter of a deeper model": (of_gguf(name("blk.1.", "blk.9.")), "module-unknown target-missing"),
    "a GGUF adapter's stranger": (of_gguf(lambda x: x | {"blk.0.attn_q.bias": np.ones(2, "f4")}), "unknown-tensors"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_named(what, look, approved):
    make, serious = BROKEN[what]
    report = look(make)
    assert codes(report, "wrong", "suspicious") == serious, str(report)
    assert "mixed-types" not in codes(report, "note")  # of a type that is none nothing more is said
    first = next(f for level in ("wrong", "suspicious") for f in report.of(level))
    assert (report.word, report.status) == (first.level.upper(), 1)
    assert report.first_line.endswith(f" [{first.code}]")
    assert len(report.first_line) <= 160
    assert approved(what, said_of(report)) == said_of(report)


def few_digits(value):
    """A report's numbers with four digits."""
    if isinstance(value, dict):
        return {key: few_digits(inner) for key, inner in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def wide_and_few_bits(t):
    """A change of a weight whose rows fill blocks of Q8_0, and one of a weight in few bits."""
    shapes = {"q_proj": (4, 64), "k_proj": (4, 64)}
    base = written(t / "b", {"q_proj.weight": np.ones((4, 64), "f4"), "k_proj.qweight": np.ones((4, 8), "i4")})
    return peft(t / "a", pairs(shapes), config(*shapes)), base


def of_one_kind_twice(t):
    """More modules than are shown, some of one kind that are not alike."""
    shapes = {f"h.{i}.fc": (4 + i % 2, 6) for i in range(12)} | {"h.0.up": (3, 6)}
    arrays = {f"{path}.weight": (10, 6) if path == "h.3.fc" else shape for path, shape in shapes.items()}
    ranks = dict.fromkeys(["h.0.fc"], 3)
    adapter = peft(t / "a", pairs(shapes, ranks=ranks), config("fc", "up", rank_pattern={"h.0.fc": 3}))
    return adapter, written(t / "b", ones(arrays))


WHOLE = {
    "wide, and in few bits": (wide_and_few_bits, True),
    "of one kind, not alike": (of_one_kind_twice, True),
    "a mixture's": (experts(), False),
    "DoRA's": (of(magnitudes, use_dora=True), False),
    "without a configuration": (lambda t: peft(t / "a", factors(paths(*QV, layers=[0])), None), False),
    **{what: (BROKEN[what][0], False) for what in ("half a pair", "integers in one factor", "a compiled model's names",
                                                   f"names with {WRAPPERS[0]}")},
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_a_report_is_shown_and_handed_over_whole(what, look, tmp_path, approved):
    make, merge = WHOLE[what]
    made = make(tmp_path)
    report = audit(*made, merge=merge) if isinstance(made, tuple) else audit(made)
    found = report.json()
    said = [*report.shown().splitlines(), *(report.shown(all=True).splitlines() if len(report.rms) > 12 else [])]
    said += [json.dumps(few_digits(found[key])) for key in ("adapter", "model", "kinds", "merged")]
    said += [json.dumps(few_digits(module)) for module in found["modules"][:3]]
    said = [line.replace(str(tmp_path), "~") for line in dict.fromkeys(said)]
    assert approved(f"all of it: {what}", said) == said


def test_every_approved_finding_is_of_an_adapter(request):
    if request.config.getoption("approve"):
        pytest.skip("the file is written at the end")
    found = json.loads((Path(__file__).parent / "auditing.json").read_text(encoding="utf-8"))
    assert found.keys() == RIGHT.keys() ^ BROKEN.keys() ^ {f"all of it: {what}" for what in WHOLE} ^ {
        f"names that begin with {own!r} on {first!r}" for own, first in BEGIN
    }


BODIES = ("model", "transformer", "bert", "roberta", "deberta", "distilbert", "gpt_neox")
BEGIN = [
    *((f"{body}.", "") for body in BODIES), ("model.", "language_model.model."), ("model.", "model.language_model."),
    *(("", f"{first}.") for first in (*BODIES[:4], "language_model", "language_model.model", "model.language_model")),
]  # fmt: skip
"""Beginnings of an adapter's names, and of the base's."""


@pytest.mark.parametrize(("own", "first"), BEGIN)
def test_names_land_whatever_they_begin_with(own, first, tmp_path, approved):
    adapter = of(name(f"{PREFIX}model.", PREFIX + own), target_modules=r".*[qv]_proj")(tmp_path)
    report = audit(adapter, model(tmp_path / "b", first=first))
    assert [*report.landing.places.values()] == paths(*QV, first=first)
    said = [f"{f.level}: {f.text} [{f.code}]" for f in report.findings]
    assert approved(f"names that begin with {own!r} on {first!r}", said) == said


def test_a_tied_head_lands_on_the_table_wherever_it_is(tmp_path):
    base = model(tmp_path / "b", tied=True, first="model.decoder.")
    report = audit(plain(kinds=("lm_head",), modules=["lm_head"])(tmp_path), base)
    assert report.landing.places == {"lm_head": "model.decoder.embed_tokens"}


def test_factors_of_one_number_are_read(tmp_path):
    path = "model.layers.0.mlp.gate"
    one = {f"{PREFIX}{path}.lora_{part}.weight": np.ones((1, 1), "f4") for part in "AB"}
    one[f"{PREFIX}{path}.lora_magnitude_vector"] = np.ones(1, "f4")
    report = audit(peft(tmp_path / "a", one, config("gate", r=1, use_dora=True)))
    assert report.word == "SOUND"
    assert report.details["modules"][0]["rms"] == 4


@pytest.mark.parametrize(("layers", "rows"), [(11, 11), (12, 12), (13, 1)])
def test_up_to_twelve_modules_have_a_row_each(tmp_path, layers, rows):
    """Of more, a kind has one; all of them are there where they are asked for."""
    modules = paths("q_proj", layers=range(layers))
    report = audit(peft(tmp_path / "a", factors(modules), config("q_proj")))
    for text, count in ((report.shown(), rows), (report.shown(all=True), layers)):
        table = [line for line in text.splitlines() if f" {Q} x {D} " in line]
        assert len(table) == count
        assert table[0].startswith(f"q_proj in {layers} " if count == 1 else "model.layers.0.")


def test_the_tensors_bytes_and_numbers_are_counted(tmp_path):
    tensors = factors(paths(*QV))
    report, file = audit(peft(tmp_path / "a", tensors, config(*QV))), tmp_path / "a" / "adapter_model.safetensors"
    assert f"\n{sum(array.nbytes for array in tensors.values()):,} bytes in {file}\n" in report.shown()
    assert f", {sum(array.size for array in tensors.values()):,} numbers in F32, " in report.first_line


def test_a_change_beyond_float64_is_no_number_for_programs(tmp_path):
    """JSON has no infinity."""
    large = {name: 1e160 * array.astype("f8") for name, array in factors(paths("q_proj")).items()}
    found = audit(peft(tmp_path / "a", large, config("q_proj"))).json()
    assert {module["delta"] for module in found["modules"]} == {None}
    assert "change-absurd" not in {finding["code"] for finding in found["findings"]}
    json.dumps(found, allow_nan=False)


def test_the_larger_vocabulary_is_the_one_to_resize_to(tmp_path):
    """Whichever comes first."""
    for rows in ((V + 5, V + 2), (V + 2, V + 5)):
        tensors = ones({name: (n, D) for name, n in zip((EMBEDDING, HEAD), rows, strict=True)})
        adapter = peft(tmp_path / f"a{rows[0]}", factors(paths(*QV)) | tensors, config(*QV))
        (base := tmp_path / "b").exists() or model(base)
        (grown,) = [one.text for one in audit(adapter, base).findings if one.code == "vocabulary-grown"]
        assert f"resize_token_embeddings({V + 5}) before loading" in grown


def test_where_numbers_are_none_no_rank_is_told(tmp_path):
    """Of one expert a rank is not used, and another holds NaN, which is what is wrong."""
    tensors = expert_factors()
    for name, array in tensors.items():
        if "lora_A" in name:
            array[1] = array[0]
            array[-1] = np.nan
    report = audit(peft(tmp_path / "a", tensors, config(target_parameters=EXPERTS)))
    assert "not-finite" in {finding.code for finding in report.findings}
    assert "rank-unused" not in {finding.code for finding in report.findings}


def test_what_merging_loses_of_an_arrays_part_is_measured(tmp_path):
    adapter, base = of_one_expert("mixtral")(tmp_path)
    tensors, arrays = (load_file(next(folder.glob("*.safetensors"))) for folder in (adapter, base))
    parts = {"w1": ("gate_up_proj", slice(6)), "w3": ("gate_up_proj", slice(6, 12)), "w2": ("down_proj", slice(D))}
    for path, loss in audit(adapter, base, merge=True).merged.items():
        before, e, last = path.replace("block_sparse_moe", "mlp").rsplit(".", 2)
        name, rows = parts[last]
        share = np.linalg.norm(change(tensors, path)) / np.linalg.norm(arrays[f"{before}.{name}"][int(e), rows])
        assert loss.relative == pytest.approx(share, rel=1e-5)


NO_RANGES = ([[-1, 3]], [[0, -1]], [[1, 3.0]], [[1, True]], [[1, 2, 3]], [3], 3)


@pytest.mark.parametrize(("ranges", "layers"), [([[1, 3], [0, 3]], "12012"), *((none, "012") for none in NO_RANGES)])
def test_layers_that_stand_several_times_are_those_of_their_ranges(look, ranges, layers):
    five = plain({"layer_replication": ranges}, kinds=("q_proj",), modules=paths("q_proj", layers=range(5)))
    assert "".join(place.split(".")[2] for place in look(five).landing.places.values()) == layers


SCALINGS = {
    "PEFT's": (plain(), 2.0),
    "rsLoRA's": (plain({"use_rslora": True}), 4 / 2**0.5),
    "a pattern's": (plain({"alpha_pattern": {"q_proj": 9, "v_proj": 9}}), 4.5),
    "PEFT's own defaults": (plain({"lora_alpha": None, "r": None}, r=8), 1.0),
    "an alpha of 0": (plain({"lora_alpha": 0}), 0.0),
    "MLX's": (of_mlx(), 20.0),
    "an old MLX's": (of_mlx(lora_parameters={"rank": 2, "alpha": 40}), 20.0),
    "kohya's": (of_kohya(lambda x: x), 0.5),
    "kohya's without alpha": (of_kohya(lambda x: without(x, ".alpha")), 1.0),
    "kohya's alpha of 0": (of_kohya(lambda x: changed(x, ".alpha", np.zeros_like)), 0.0),
    "GGUF's": (of_gguf(), 2.0),
    "GGUF's without alpha": (of_gguf(alpha=None), 1.0),
    "GGUF's alpha of 0": (of_gguf(alpha=0.0), 1.0),
    "none": (lambda t: peft(t / "a", factors(paths(*QV)), None), None),
    "a mixture's": (lambda t: experts()(t)[0], 2.0),
    "MLX's for a mixture": (lambda t: mlx_experts(t)[0], 20.0),
}


@pytest.mark.parametrize("what", SCALINGS)
def test_a_change_is_the_formats_scaling_times_the_product(what, tmp_path):
    (make, scaling), expert = SCALINGS[what], what == "a mixture's"
    report = audit(make(tmp_path))
    found = {module["scaling"] for module in report.details["modules"]}
    assert [*found] == [scaling if scaling is None else pytest.approx(scaling)]
    for path, m in report.adapter.modules.items() if scaling is not None else ():
        A, B = (m.tensors.read(m.parts[part]).astype("f8") for part in "AB")
        A, B = (A.reshape(4, 2, -1), np.moveaxis(B.reshape(len(B), 2, 4), 2, 0)) if expert else (A, B)
        product = B @ A if B.shape[-1] == A.shape[-2] else A @ B
        assert report.numbers[path].norm == pytest.approx(scaling * np.linalg.norm(product))


# --- targets, as PEFT 0.21.2 answered: `tests/peers/test_audit_peers.py` asks the PEFT that is there ---

ASKED = json.loads((Path(__file__).parent / "peft_targets.json").read_text())


@pytest.mark.parametrize("row", ASKED["answers"], ids=lambda row: json.dumps(row["config"])[:80])
def test_the_targets_are_those_of_peft(row):
    with within_time():
        found = are_targets(row["config"], ASKED["paths"])
    assert [path for path, is_target in zip(ASKED["paths"], found, strict=True) if is_target] == row["targets"]


# --- what a configuration says of how it came to be ---


def test_each_start_that_changed_the_base_is_suspicious(tmp_path):
    """A table of PEFT's own names, of which BROKEN has one."""
    for value in ("pissa", "olora", "corda", "loftq", "lora_ga"):
        (tmp_path / value).mkdir()
        report = audit(plain({"init_lora_weights": value})(tmp_path / value))
        assert codes(report, "wrong", "suspicious") == "start-changes-base"


def test_files_of_two_saves_are_wrong(tmp_path):
    """Unless another program wrote the configuration in its own way: what it changed was meant."""
    save_adapter(tmp_path / "a", {"q_proj": LoRA(np.ones((2, D)), np.ones((Q, 2)), 4.0)})
    file = tmp_path / "a" / "adapter_config.json"
    ours = json.loads(file.read_text())
    for changes, indent, said in (({}, 2, ""), ({"lora_alpha": 5}, 2, "two-saves"), ({"lora_alpha": 5}, None, "")):
        file.write_text(json.dumps(ours | changes, indent=indent) + "\n")
        assert codes(audit(tmp_path / "a"), "wrong") == said


def test_all_linear_names_no_embedding_and_no_head():
    names = "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "lm_head"
    found = are_targets({"target_modules": "all-linear"}, [f"model.{name}" for name in (*names, "pooler.dense")])
    assert found == [False] * 7 + [True]


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_an_expression_that_is_none_is_refused_by_its_key(key):
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    config |= {key: "(" if key in ("target_modules", "exclude_modules") else ["("]}
    with pytest.raises(ValueError, match=rf"{key}: .*is not a regular expression"):
        are_targets(config, ASKED["paths"])
