"""``minilora merge``."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Adapter, Llama, LoRA, load_adapter, save_adapter
from minilora.language import save_llama

from ..support.command_line import FINETUNE
from ..support.language import tiny_llama


def test_merge_writes_the_checkpoint_and_a_dry_run_does_not(adapter, tmp_path, shell):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    command = f"merge {base} {adapter} -o {out}"
    planned = shell(command, "--dry-run").splitlines()
    assert planned[0].split() == ["tensor", "file", "dtype", "shape", "layout", "rank", "scaling"]
    assert planned[1].split() == ["enc.fc.weight", "base.safetensors", "F64", *["3", "x", "5", "out-in", "2", "0.7071"]]
    assert planned[2].split() == ["head.weight", "base.safetensors", "F32", *["7", "x", "3", "out-in", "4", "3"]]
    assert planned[3:] == ["2 tensors would change; nothing was written"]
    assert not out.exists()
    assert shell(command).splitlines() == [*planned[:3], f"2 tensors merged into {out}"]
    assert shell(command, "--dry-run").splitlines() == planned  # also where it is there already
    before, after = load_file(base), load_file(out)
    for name, lora in load_adapter(adapter).items():
        np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + lora.delta(), rtol=1e-5)
    assert after["enc.fc.bias"].tobytes() == before["enc.fc.bias"].tobytes()


def test_merge_takes_the_layout_of_each_module(tmp_path, shell):
    rng = np.random.default_rng(1)
    layers = {name: LoRA(rng.standard_normal((1, 4)), rng.standard_normal((4, 1)), 2.0) for name in ("c", "s")}
    save_adapter(tmp_path / "a", layers, fan_in_fan_out=True)
    save_file({f"{name}.weight": np.zeros((4, 4)) for name in layers}, tmp_path / "base.safetensors")
    command = f"merge {tmp_path}/base.safetensors {tmp_path}/a -o {tmp_path}/o"
    assert "--layout c=out-in" in shell.refused(command)
    out = shell(command, "--layout", "c=in-out", "--layout", "s=out-in")
    assert [line.split()[6] for line in out.splitlines()[1:3]] == ["in-out", "out-in"]
    merged = load_file(tmp_path / "o")
    np.testing.assert_allclose(merged["c.weight"], layers["c"].delta().T)
    np.testing.assert_allclose(merged["s.weight"], layers["s"].delta())


def test_one_changed_tensor_is_not_plural(tmp_path, shell):
    save_adapter(tmp_path / "a", {"fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    save_file({"fc.weight": np.ones((3, 2))}, tmp_path / "b.safetensors")
    out = shell(f"merge {tmp_path}/b.safetensors {tmp_path}/a -o {tmp_path}/o")
    assert f"\n1 tensor merged into {tmp_path}/o\n" in out


def test_what_a_merge_warns_of_twice_is_one_line(monkeypatch, shell):
    """And what a library warns its programmers of is none of the user's business."""

    def merged(*given, **options):
        for kind in (UserWarning, UserWarning, DeprecationWarning):
            warnings.warn("mind this", kind, stacklevel=1)
        return []

    monkeypatch.setattr("minilora.files.merge.merge_adapter", merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        shell("merge b a -o o")
    assert shell.err == "minilora: mind this\n"


def test_a_gguf_model_is_merged_and_exported_for_as_asked(tmp_path, shell, monkeypatch):
    given = []
    monkeypatch.setattr("minilora.language.save.merge_gguf", lambda *places: given.append(places) or "abc")
    monkeypatch.setattr("minilora.language.ggufexport.export_adapter", lambda *places: given.append(places) or "abcd")
    monkeypatch.chdir(tmp_path)
    assert shell("merge m.gguf a -o o") == "3 layers merged into o, in float32 and with the tokenizer\n"
    assert shell("export a --model m.gguf -o o.gguf") == "2 modules written to o.gguf\n"
    assert [" ".join(map(str, places)) for places in given] == ["m.gguf a o", "a m.gguf o.gguf"]
    for more in ("--dry-run", "--layout c=in-out"):
        said = "--layout and --dry-run are for weights in safetensors, and the model is a .gguf file"
        assert shell.refused(f"merge m.gguf a -o o {more}") == said
    Path("o.gguf").touch()
    said = "-o 'o.gguf' is there already: name another, or say --overwrite"
    assert shell.refused("export a --model m.gguf -o o.gguf") == said
    shell("export a --model m.gguf -o o.gguf --overwrite")


def test_a_merged_convolution_has_a_kind_and_no_layout(tmp_path, shell):
    conv = Adapter(np.ones((1, 12)), np.ones((4, 1)), 1, kind="conv2d", kernel=(2, 3))
    save_adapter(tmp_path / "a", {"conv": conv})
    save_file({"conv.weight": np.ones((4, 2, 2, 3))}, tmp_path / "b.safetensors")
    row = shell(f"merge {tmp_path}/b.safetensors {tmp_path}/a -o {tmp_path}/o").splitlines()[1]
    assert " ".join(row.split()) == "conv.weight b.safetensors F64 4 x 2 x 2 x 3 conv2d 2x3 1 1"


pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("mistral", marks=pytest.mark.long)])
def test_what_was_tuned_and_merged_speaks_as_beside_its_base(folder, shell, kind):
    config = dataclasses.replace(tiny_llama().config, model_type=kind, attention_bias=kind == "qwen2")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s).astype("f4") / 4 for name, s in config.shapes().items()}
    save_llama(Llama.build(config, arrays), folder / kind)
    shutil.copy(folder / "model" / "tokenizer.json", folder / kind)
    shell(f"{FINETUNE} --model {kind} --steps 3")
    shell(f"merge {kind} a -o merged")
    greedy = "generate 'the cat' --tokens 20 --temperature 0"
    beside, merged = shell(f"{greedy} --model {kind} --adapter a"), shell(f"{greedy} --model merged")
    assert len(beside) == len("the cat") + 21
    assert merged == beside
