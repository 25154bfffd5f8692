"""A merge writes a folder or a file, whole or not at all, and says what works where it cannot."""

import numpy as np
import pytest

from minilora import (
    FileRefused,
    Llama,
    attach,
    load_adapter,
    merge,
    merge_adapter,
    quantize,
)
from minilora.cli import main
from minilora.files.base import companions
from minilora.language import save_llama

from ..support.model_folder import IDS, of_kind, write
from .test_merge import contents


def test_weights_alone_are_merged_into_a_file(tmp_path, adapter):
    base = write(tmp_path / "base")
    merge_adapter(base, adapter, tmp_path / "whole")
    merge_adapter(base, adapter, tmp_path / "one.safetensors")
    merge_adapter(base / "model.safetensors", adapter, tmp_path / "two")
    for file in ("one.safetensors", "two"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def refused(base, adapter, out, message, error=ValueError):
    folder = adapter.parent
    before = contents(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            merge_adapter(base, adapter, out, dry_run=dry_run)
    assert contents(folder) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_neither_the_base_nor_the_adapter_is_written_over(tmp_path, adapter, shards):
    base = write(tmp_path / "base", shards=shards)
    (tmp_path / "link").symlink_to("base")
    for out in (base, adapter, tmp_path / "link", base / "config.json", base / ".." / "base"):
        refused(base, adapter, out, "exists, expected a folder that is empty or new: the base is a model's folder")
    refused(base, adapter, tmp_path / "no" / "out", "there is no folder")


def test_a_merge_that_fails_on_its_way_leaves_nothing(tmp_path, adapter, monkeypatch):
    base = write(tmp_path / "base")

    def failing(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(companions.shutil, "copyfileobj", failing)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "weights"])
def test_a_gguf_file_is_known_whatever_its_name(tmp_path, adapter, name):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / name, adapter, tmp_path / "out", rf"{name}': a .gguf file, and merge writes safet", FileRefused)


@pytest.mark.parametrize("name", ["model.Q4_1.gguf", "model.safetensors"])
def test_a_folder_of_a_gguf_file_is_known(tmp_path, adapter, name):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "base", adapter, tmp_path / "out", "`minilora export ADAPTER --model MODEL.gguf", FileRefused)


def test_a_base_in_four_bits_names_the_way_that_works(tmp_path, adapter):
    base, out = tmp_path / "base", tmp_path / "out"
    save_llama(quantize(of_kind()), base)
    refused(base, adapter, out, r"once loaded: save_llama\(merge\(attach\(Llama.load\(BASE\), load_adap", FileRefused)
    model = attach(Llama.load(base), load_adapter(adapter))
    save_llama(merge(model), out)  # as the message says
    np.testing.assert_allclose(Llama.load(out)(IDS), model(IDS), atol=1e-4)


def test_the_command_writes_a_folder_and_says_where(tmp_path, adapter, capsys):
    base = write(tmp_path / "base")
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"14 tensors merged into {tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "tokenizer.json").exists()
