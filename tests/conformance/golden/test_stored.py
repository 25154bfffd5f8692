"""Files as they are found: what is read of them is what the answers are of, and the rest is refused by name."""

import json

import numpy as np
import pytest

from minilora import FileRefused, Llama, attach, load_adapter
from minilora.conformance.golden.folder import write_adapter
from minilora.files.tensors import TensorFile

from .conftest import FOUND

BY_ID = {case.id: case for case in FOUND}


@pytest.fixture
def adapter(tmp_path):
    def written(id):
        (contents,) = BY_ID[id].files()
        write_adapter(tmp_path / id, *contents, BY_ID[id].stored)
        return tmp_path / id

    return written


@pytest.mark.parametrize("id", ["file-in-bfloat16", "file-in-float16", "dora-square", "alpha-float", "b-zero"])
def test_what_we_read_of_a_file_is_what_its_answer_is_of(adapter, id):
    loaded = load_adapter(adapter(id), dtype="float64")
    ((given, _),) = BY_ID[id].given
    assert loaded.keys() == given.modules.keys()
    for path, module in given.modules.items():
        np.testing.assert_array_equal(loaded[path].lora_A, module.lora_A)
        np.testing.assert_array_equal(loaded[path].lora_B, module.lora_B)
        assert loaded[path].alpha == given.config["lora_alpha"]


@pytest.mark.parametrize(("id", "stored"), [("file-in-bfloat16", "BF16"), ("file-in-float16", "F16")])
def test_a_file_in_half_precision_has_no_other_tensors(adapter, id, stored):
    file = TensorFile(adapter(id) / "adapter_model.safetensors")
    assert {spec.dtype for spec in file.tensors.values()} == {stored}


def test_a_missing_alpha_is_pefts_default(adapter):
    folder = adapter("alpha-missing")
    assert "lora_alpha" not in json.loads((folder / "adapter_config.json").read_text())
    assert {layer.alpha for layer in load_adapter(folder).values()} == {8.0}


@pytest.mark.parametrize(
    ("id", "said"), [("trained-tokens", "trainable_token_indices"), ("refused-empty", "no tensor")]
)
def test_what_we_do_not_read_is_refused_by_its_name(adapter, id, said):
    with pytest.raises(FileRefused, match=said):
        load_adapter(adapter(id))


def test_names_under_a_language_model_fit_no_module(adapter, golden):
    loaded = load_adapter(adapter("language-model-prefix"))
    with pytest.raises(ValueError, match="language_model"):
        attach(Llama.load(golden / "bases" / "tied"), loaded)
