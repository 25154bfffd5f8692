"""What a command opens: a model's files and an adapter's folder, each once, whatever is asked of them."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, Llama, load_adapter, save_adapter
from minilora.backend import get_backend
from minilora.files.adapters import system_message
from minilora.files.peft import AdapterFolder
from minilora.language import chat, data, source
from minilora.language.source import AdapterSource, ModelSource

from ..support.command_line import run
from ..support.language import CHAT, template

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytest.importorskip("jinja2", reason="pip install -e '.[models]'")

TUNE = "finetune chats.jsonl --model model --batch-size 2 --steps 1 --save"
COMMANDS = {  # and how many chats each reads
    "evaluate chats.jsonl --model model --adapter first": 4,
    "generate 'the cat' --chat --model model --adapter first --tokens 1": 0,
    "generate chats.jsonl -o out.jsonl --model model --adapter first --tokens 1": 4,
    f"{TUNE} b --valid held.jsonl --adapter first": 7,
}


@pytest.fixture
def chats(folder):
    """Chats to train on and others to measure on, a template, and an adapter that keeps a system message."""
    template(CHAT)
    for name, words in (("chats.jsonl", "abcd"), ("held.jsonl", "efg")):
        turns = [[("user", f"the {x}"), ("assistant", "mat")] for x in words]
        lines = [{"messages": [{"role": role, "content": said} for role, said in each]} for each in turns]
        Path(name).write_text("\n".join(map(json.dumps, lines)))
    assert run(f"{TUNE} first --system sat --rank 2 --target-modules q_proj") == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_opens_each_file_and_judges_each_chat_once(chats, monkeypatch, command):
    opened, judged, right = Counter(), Counter(), AdapterFolder.open

    def counted(module, name, counter, of=str):
        was = getattr(module, name)
        monkeypatch.setattr(module, name, lambda given: counter.update([f"{name} {of(given)}"]) or was(given))

    monkeypatch.setattr(AdapterFolder, "open", staticmethod(lambda path: opened.update(["adapter"]) or right(path)))
    counted(source, "load_tokenizer", opened)
    counted(source, "load_template", opened)
    for module in (data, chat):
        counted(module, "checked_messages", judged, lambda messages: json.dumps(messages[:2]))
    assert run(command) == 0
    assert opened == {"adapter": 1, "load_tokenizer model": 1, "load_template model": 1}
    assert (len(judged), sum(judged.values())) == (COMMANDS[command], COMMANDS[command])


def test_an_open_folder_says_what_its_path_does(chats):
    opened = AdapterSource.open(Path("first"), "float64", get_backend("numpy"))
    there = load_adapter("first", dtype="float64")
    assert {path: (one.lora_A.tobytes(), one.lora_B.tobytes()) for path, one in opened.adapters.items()} == {
        path: (one.lora_A.tobytes(), one.lora_B.tobytes()) for path, one in there.items()
    }
    assert opened.system == system_message("first") == "sat"
    save_adapter("first", there, overwrite=True)
    assert opened.system == "sat"  # it is not opened again
    assert AdapterSource.open(Path("first"), "float32", get_backend("numpy")).system is None


def test_a_bases_own_weight_is_told_and_compared(chats):
    file = Path("first/adapter_model.safetensors")
    model, backend = Llama.load("model"), get_backend("numpy")
    weight = model.model.layers[0].self_attn.q_proj.weight
    for change, refused in ((0, False), (1, True)):
        key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
        save_file(load_file(file) | {key: weight + np.float32(change)}, file)
        with pytest.warns(UserWarning, match="the base weight of 'model.layers.0.self_attn.q_proj'"):
            opened = AdapterSource.open(Path("first"), "float32", backend)
        with pytest.raises(FileRefused, match="the adapter is for another base") if refused else nullcontext():
            opened.attached(model, backend, None)


def test_what_a_model_lacks_is_refused_when_asked_for(tmp_path):
    lacking = ModelSource(tmp_path / "no\nmodel")
    assert lacking.name == f"{tmp_path}/no\\nmodel"
    for ask in (
        lambda: lacking.tokenizer,
        lambda: lacking.template,
        lambda: lacking.load("float32", get_backend("numpy")),
    ):
        with pytest.raises(ValueError, match=r"no\\nmodel': No such file or directory$"):
            ask()
