"""A tiny model's folder with every kind of file beside the weights, for what is merged into one."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from minilora import Llama, adapt, adapters

from .language import tiny_llama, write_folder

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


INDEX = "model.safetensors.index.json"


BESIDE = {
    "generation_config.json": '{"eos_token_id": 3}',
    "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b\n",
    "tokenizer.model": "pieces",
    "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}",
    "modeling_own.py": "",
}


LEFT = {
    "README.md": "of the base",
    "pytorch_model.bin": "the base's weights",
    "pytorch_model.bin.index.json": "{}",
    "consolidated.safetensors": "the base's weights",
    "base.Q4_0.gguf": "GGUF",
    ".hidden.json": "{}",
}


def of_kind(tied=False):
    """A tiny model whose head is its embedding, or has its own."""
    model = tiny_llama(dtype="float32")
    arrays = {name: a for name, a in model.trainable().items() if not (tied and name == "lm_head.weight")}
    config = model.config
    return Llama.build(type(config)(**{**vars(config), "tie_word_embeddings": tied}), arrays)


def shard(folder, count):
    """Write a folder's weights again, in shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + i % count}-of-{count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in {*weight_map.values()}:
        save_file({name: a for name, a in tensors.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    metadata = {"total_size": sum(a.nbytes for a in tensors.values()), "total_parameters": 1}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def write(folder, *, tied=False, shards=1):
    """A model's folder with every kind of file beside the weights."""
    write_folder(folder, of_kind(False))
    arrays = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    if tied:
        del arrays["lm_head.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    if shards > 1:
        shard(folder, shards)
    for name, text in (BESIDE | LEFT).items():
        (folder / name).write_text(text)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def drawn(model, targets, seed=0, **options):
    """Adapters that have moved, saved to a folder's two files by the caller."""
    rng = np.random.default_rng(seed)
    adapted = adapt(model, targets, rank=2, alpha=3, rng=rng, **options)
    for array in adapted.trainable().values():
        array += rng.standard_normal(array.shape).astype(array.dtype) / 4
    return adapters(adapted)
