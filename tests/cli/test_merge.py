"""``minilora merge``."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, LoRA, load_adapter, save_adapter
from minilora.language import save_llama

from ..support.command_line import FINETUNE
from ..support.language import tiny_llama


def test_merge_writes_the_checkpoint_and_a_dry_run_does_not(adapter, tmp_path, shell):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    command = f"merge {base} {adapter} -o {out}"
    shell(command, "--dry-run")
    assert not out.exists()
    out.write_bytes(b"kept")
    assert shell.refused(command) == f"-o {str(out)!r} already exists: choose another path, or pass --overwrite"
    shell(command, "--dry-run")  # which replaces nothing
    assert out.read_bytes() == b"kept"
    out.unlink()
    shell(command)
    before, after = load_file(base), load_file(out)
    for name, lora in load_adapter(adapter).items():
        np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + lora.delta(), rtol=1e-5)
    assert after["enc.fc.bias"].tobytes() == before["enc.fc.bias"].tobytes()


@pytest.mark.parametrize(("count", "more", "rows"), [(1, "", 1), (24, "", 24), (25, "", 1), (25, "--all", 25)])
def test_up_to_24_tensors_have_a_row_each(tmp_path, shell, count, more, rows):
    """More of them have one for each kind, and all are counted."""
    save_adapter(tmp_path / "a", {f"h.{i}.q": LoRA(np.ones((1, 2)), np.ones((3, 1)), 1.0) for i in range(count)})
    save_file({f"h.{i}.q.weight": np.ones((3, 2)) for i in range(count)}, tmp_path / "base.safetensors")
    _, *lines, last = shell(f"merge {tmp_path}/base.safetensors {tmp_path}/a -o {tmp_path}/o {more}").splitlines()
    assert len(lines) == rows
    assert lines[0].startswith("q x 25 " if rows < count else "h.0.q.weight ")
    assert last == f"{count} tensor{'s' * (count > 1)} merged into {tmp_path}/o"


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
    monkeypatch.setattr("minilora.language.files.save.merge_gguf", lambda *places: given.append(places) or "abc")
    monkeypatch.setattr(
        "minilora.language.files.ggufexport.export_adapter", lambda *places: given.append(places) or "abcd"
    )
    monkeypatch.chdir(tmp_path)
    assert shell("merge m.gguf a -o o") == "3 layers merged into o, in float32 and with the tokenizer\n"
    assert shell("export a --model m.gguf -o o.gguf") == "2 modules written to o.gguf\n"
    assert [" ".join(map(str, places)) for places in given] == ["m.gguf a o", "a m.gguf o.gguf"]
    for more in ("--dry-run", "--layout c=in-out"):
        said = "--layout and --dry-run apply to safetensors, but the model is a .gguf file"
        assert shell.refused(f"merge m.gguf a -o o {more}") == said
    Path("o.gguf").write_bytes(b"GGUF" + bytes(12) + b"\x04" + bytes(7) + b"adapter.lora.alpha")
    said = "-o 'o.gguf' already exists: choose another path, or pass --overwrite"
    assert shell.refused("export a --model m.gguf -o o.gguf") == said
    shell("export a --model m.gguf -o o.gguf --overwrite")


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


def test_an_adapter_is_not_applied_over_its_own_merge(folder, shell):
    """Whichever command would; another adapter is, and so is the same one over its base."""
    shell(f"{FINETUNE} --steps 2")
    shell(f"{FINETUNE} --steps 2 --save b --seed 3")
    shell("merge model a -o merged")
    shell("merge merged b -o both")
    for adapter, model in (("a", "merged"), ("a", "both"), ("b", "both")):
        said = (
            f"'{model}/model.safetensors': already contains the adapter {adapter}: use the model without it, or give "
            "the base"
        )
        for command in (
            f"merge {model} {adapter} -o twice",
            f"generate 'the cat' --model {model} --adapter {adapter}",
            f"evaluate text --model {model} --adapter {adapter} --length 8",
            f"finetune text --model {model} --adapter {adapter} --save c --length 8 --steps 1 --batch-size 2",
        ):
            assert shell.refused(command).endswith(said)
        assert "[merged-before]" in shell(f"audit {adapter} --model {model}", code=1)
    assert "merged-before" not in shell("audit b --model merged")
    assert "merged-before" not in shell("audit a --model model")
    shutil.copytree("a", "moved")
    shell.refused("merge merged moved -o twice")
    shell("generate 'the cat' --model merged --adapter b --tokens 2")
    assert not Path("twice").exists()
