"""A model's folder is merged into a folder that loads, with all that stands beside the weights."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import (
    FileRefused,
    Llama,
    adapt,
    adapters,
    attach,
    load_adapter,
    merge_adapter,
    save_adapter,
)

from ...support.language import tiny_llama, write_folder
from ..test_merge import contents

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


def write(folder, *, tied=False, shards=1, total=True):
    """A model's folder with every kind of file beside the weights."""
    write_folder(folder, of_kind(False))
    arrays = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    if tied:
        del arrays["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    else:
        names, weight_map = sorted(arrays), {}
        for i in range(shards):
            file = f"model-{i + 1}-of-{shards}.safetensors"
            weight_map |= dict.fromkeys(names[i::shards], file)
            save_file({name: arrays[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
        metadata = {"total_size": sum(a.nbytes for a in arrays.values()), "total_parameters": 1}
        (folder / INDEX).write_text(json.dumps({"metadata": metadata if total else {}, "weight_map": weight_map}))
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


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter", drawn(of_kind(), "all-linear"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_folder_is_the_adapted_model(tmp_path, adapter, shards):
    base = write(tmp_path / "base", shards=shards)
    merge_adapter(base, adapter, tmp_path / "out")
    adapted = attach(Llama.load(base), load_adapter(adapter))
    np.testing.assert_allclose(Llama.load(tmp_path / "out")(IDS), adapted(IDS), atol=1e-4)
    weights = {path.name for path in base.glob("model*")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*BESIDE, "config.json", "tokenizer.json", *weights}
    for name in (*BESIDE, "config.json", "tokenizer.json", *([INDEX] if shards > 1 else [])):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def refused(base, adapter, out, message, error=ValueError):
    folder = adapter.parent
    before = contents(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            merge_adapter(base, adapter, out, dry_run=dry_run)
    assert contents(folder) == before


@pytest.mark.parametrize("what", ["pipe", "circle"])
def test_what_is_no_regular_file_beside_is_refused_first(tmp_path, adapter, what):
    base = write(tmp_path / "base")
    os.mkfifo(base / "vocab.txt") if what == "pipe" else (base / "vocab.txt").symlink_to("vocab.txt")
    refused(base, adapter, tmp_path / "out", "vocab.txt': (not a regular file|cannot be opened)", FileRefused)


def test_a_configuration_that_is_no_json_is_refused(tmp_path, adapter):
    base = write(tmp_path / "base")
    (base / "config.json").write_text("{")
    refused(base, adapter, tmp_path / "out", "config.json': the file is not sound JSON", FileRefused)


def test_links_are_followed_and_files_written(tmp_path, adapter):
    """As in a cache of the Hugging Face hub."""
    model = tmp_path / "models--x"
    cache = model / "snapshots" / "rev"
    cache.mkdir(parents=True)
    write(model / "blobs")
    for path in (model / "blobs").iterdir():
        (cache / path.name).symlink_to(f"../../blobs/{path.name}")
    merge_adapter(cache, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "merges.txt").read_text() == BESIDE["merges.txt"]


@pytest.mark.parametrize("name", ["LICENSE.txt", "tokenizer.json", "additional_chat_templates/rag.jinja"])
def test_a_link_out_of_the_models_folder_is_not_followed(tmp_path, adapter, name):
    """The merged folder is made to be given away."""
    base = write(tmp_path / "base")
    (tmp_path / "key").write_text("private")
    (base / name).unlink(missing_ok=True)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to(tmp_path / "key")
    refused(base, adapter, tmp_path / "out", "a link out of the model's folder", FileRefused)


def test_further_chat_templates_are_merged_with_the_model(tmp_path, adapter):
    base = write(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    merge_adapter(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS"
