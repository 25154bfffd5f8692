"""Tiny models and adapters of every format, right ones and broken ones: a broken one is a right one with one change."""

import json
import math

import numpy as np
from safetensors.numpy import save_file

D, Q, KV, M, V, LAYERS = 8, 12, 4, 10, 16, 3
PREFIX = "base_model.model."
SIZES = {
    "self_attn.q_proj": (Q, D), "self_attn.k_proj": (KV, D), "self_attn.v_proj": (KV, D), "self_attn.o_proj": (D, Q),
    "mlp.gate_proj": (M, D), "mlp.up_proj": (M, D), "mlp.down_proj": (D, M),
}  # fmt: skip


def model(
    folder, *, tied=False, first="model.", experts=0, shared=False, apart=False, in_out=False, shards=1, square=False,
    dtype="f4", **config
):  # fmt: skip
    """A decoder's folder; with experts in the place of the MLP, each in tensors of its own or all in one."""
    rng, m = np.random.default_rng(0), (4 if square else 6)
    shapes = {f"{first}embed_tokens.weight": (V, D), f"{first}norm.weight": (D,)}
    for i in range(LAYERS):
        block = f"{first}layers.{i}."
        names = {k: s for k, s in SIZES.items() if not (experts and "mlp." in k)}
        shapes |= {f"{block}{name}.weight": shape for name, shape in names.items()}
        shapes[f"{block}input_layernorm.weight"] = (D,)
        if experts:
            d = D
            shapes[f"{block}mlp.gate.weight"] = (experts, d)
            gate_up, down = ((2 * m, d), (d, m)) if not in_out else ((d, 2 * m), (m, d))
            if apart:
                for e in range(experts):
                    shapes |= {f"{block}mlp.experts.{e}.{n}.weight": (m, d) for n in ("gate_proj", "up_proj")}
                    shapes[f"{block}mlp.experts.{e}.down_proj.weight"] = (d, m)
            else:
                shapes |= {f"{block}mlp.experts.gate_up_proj": (experts, *gate_up),
                           f"{block}mlp.experts.down_proj": (experts, *down)}  # fmt: skip
            if shared:
                shapes |= {f"{block}mlp.shared_expert.{n}.weight": (7, d) for n in ("gate_proj", "up_proj")}
                shapes[f"{block}mlp.shared_expert.down_proj.weight"] = (d, 7)
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    folder.mkdir()
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    _write_weights(folder, arrays, shards)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(kind | {"tie_word_embeddings": tied} | config))
    return folder


def written(folder, arrays, settings=None):
    """A model's folder with these arrays."""
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings or {}))
    return folder


def sparse(folder, shapes, shards=1):
    """Write a model of zeros in bfloat16 without filling the disk; return where in its file each tensor begins."""
    folder.mkdir()
    weight_map, starts = {}, {}
    for k in range(shards):
        file, header, end = f"model-{k + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in [*shapes][k::shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        starts |= {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
        with (folder / file).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            target.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return starts


def _write_weights(folder, arrays, shards):
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(arrays)}
    for file in {*files.values()}:
        save_file({name: arrays[name] for name in arrays if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def paths(*kinds, layers=range(LAYERS), first="model."):
    """The paths of modules of some kinds."""
    return [f"{first}layers.{i}.{name}" for i in layers for name in SIZES if name.rpartition(".")[2] in kinds]


def shape_of(path):
    """The shape (out, in) of a module's weight."""
    last = path.rpartition(".")[2]
    of_vocabulary = {"lm_head": (V, D), "embed_tokens": (D, V)}
    return of_vocabulary.get(last) or next(s for name, s in SIZES.items() if name.endswith(last))


def pairs(shapes, r=2, seed=0, ranks=None, dtype="f4"):
    """PEFT's tensors of modules whose weights have these shapes (out, in); some may have a rank of their own."""
    rng, tensors = np.random.default_rng(seed), {}
    for path, (out, width) in shapes.items():
        rank = (ranks or {}).get(path, r)
        a, b = ("embedding_A", "embedding_B") if path.endswith("embed_tokens") else ("A.weight", "B.weight")
        tensors[f"{PREFIX}{path}.lora_{a}"] = rng.standard_normal((rank, width)).astype(dtype)
        tensors[f"{PREFIX}{path}.lora_{b}"] = rng.standard_normal((out, rank)).astype(dtype)
    return tensors


def change(tensors, path):
    """What a module adds to its weight (out, in) at the scaling of `config`, in float64."""
    A, B = (tensors[f"{PREFIX}{path}.lora_{part}.weight"].astype("f8") for part in "AB")
    return 2 * B @ A


def factors(modules, **options):
    """PEFT's tensors for some modules of a decoder."""
    return pairs({path: shape_of(path) for path in modules}, **options)


def config(*targets, **more):
    """A configuration as PEFT writes it."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
        "target_modules": list(targets),
        "r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none",
        "lora_dropout": 0.05, "inference_mode": True, "init_lora_weights": True, "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "peft_version": "0.21.2",
    } | more  # fmt: skip


def peft(folder, tensors, settings):
    """A folder of PEFT's."""
    folder.mkdir()
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def mlx(folder, modules, r=2, change=lambda t: t, **more):
    """A folder of mlx-lm's."""
    rng, tensors = np.random.default_rng(0), {}
    for path in modules:
        out, width = shape_of(path)
        tensors[f"{path}.lora_a"] = rng.standard_normal((width, r)).astype("f4")
        tensors[f"{path}.lora_b"] = rng.standard_normal((r, out)).astype("f4")
    folder.mkdir()
    save_file(change(tensors), folder / "adapters.safetensors")
    keys = sorted({".".join(path.split(".")[-2:]) for path in modules})
    settings = {
        "fine_tune_type": "lora", "num_layers": 3, "model": "base",
        "lora_parameters": {"rank": r, "scale": 20.0, "dropout": 0.0, "keys": keys},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | more))
    return folder


def kohya(file, modules, r=2, start="lora_te_", change=lambda t: t):
    """A file with kohya's names."""
    rng, tensors = np.random.default_rng(0), {}
    for path in modules:
        out, width = shape_of(path)
        name = start + path.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((r, width)).astype("f2")
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((out, r)).astype("f2")
        tensors[f"{name}.alpha"] = np.array(1.0, "f2")
    save_file(change(tensors), file)
    return file


GGUF = {"q_proj": "attn_q", "v_proj": "attn_v", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def gguf(file, modules, r=2, alpha=4.0, change=lambda t: t, kind="adapter", how="lora", architecture="llama"):
    """A LoRA of llama.cpp's."""
    from gguf import GGUFWriter

    rng, tensors = np.random.default_rng(0), {}
    for path in modules:
        out, width = shape_of(path)
        name = f"blk.{path.split('.')[2]}.{GGUF[path.rpartition('.')[2]]}.weight"
        tensors[f"{name}.lora_a"] = rng.standard_normal((r, width)).astype("f4")
        tensors[f"{name}.lora_b"] = rng.standard_normal((out, r)).astype("f4")
    writer = GGUFWriter(file, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", how)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in change(tensors).items():
        writer.add_tensor(name, array)
    return closed(writer, file)


def closed(writer, file):
    """The file, written."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_model(file, sizes, architecture="llama", more=()):
    """A model of llama.cpp's with these weights in each layer, and more of the vocabulary's size."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    for i in range(LAYERS):
        for name, shape in sizes.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape, "f4"))
    for name in more:
        writer.add_tensor(f"{name}.weight", np.ones((V, D), "f4"))
    return closed(writer, file)


def expert_factors(E=4, r=2, m=6, layers=range(LAYERS), exchanged=False):
    """PEFT's tensors for a mixture's two arrays, as version 0.19.1 packs them or, exchanged, as those before."""
    rng, tensors = np.random.default_rng(0), {}
    for i in layers:
        place = f"{PREFIX}model.layers.{i}.mlp.experts."
        for inside, (out, width) in (("base_layer.", (2 * m, D)), ("", (D, m))):
            out, width = (width, out) if exchanged else (out, width)
            tensors[f"{place}{inside}lora_A.weight"] = rng.standard_normal((E * r, width)).astype("f4")
            tensors[f"{place}{inside}lora_B.weight"] = rng.standard_normal((out, r * E)).astype("f4")
    return tensors


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def renamed(tensors, old, new):
    """The same tensors under other names."""
    return {name.replace(old, new): array for name, array in tensors.items()}


def changed(tensors, end, change):
    """The same tensors, those whose name ends so changed."""
    return {name: change(array) if name.endswith(end) else array for name, array in tensors.items()}


def ones(shapes):
    """Arrays of ones of these shapes."""
    return {name: np.ones(shape, "f4") for name, shape in shapes.items()}


def without(tensors, *ends):
    """The tensors but those whose name ends so."""
    return {name: array for name, array in tensors.items() if not name.endswith(ends)}
