"""An adapter's folder: two files that belong together, each a regular one and sound."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from minilora import FileRefused, LoRA, load_adapter, merge_adapter, save_adapter
from minilora.files.inspection import inspect_adapter

from ..support.adapter_folder import CONFIG, WEIGHTS, assert_same_adapters, change_json, variant


def test_a_configuration_of_another_save_is_refused(tmp_path):
    """The shapes agree, and nothing else would show that the alpha is not theirs."""
    A, B = np.ones((2, 3)), np.ones((4, 2))
    for alpha in (1.0, 2.0):
        save_adapter(tmp_path / str(alpha), {"fc": LoRA(A, B, alpha)})
    shutil.copy(tmp_path / "1.0" / CONFIG, tmp_path / "2.0" / CONFIG)
    other = (
        f"not the configuration that was saved with {WEIGHTS}: the two files come from different saves, or one "
        "was edited"
    )
    with pytest.raises(FileRefused, match=f"config.json': {other}. Save the adapter again$"):
        load_adapter(tmp_path / "2.0")
    change_json(tmp_path / "2.0" / CONFIG)  # as another program writes it
    assert load_adapter(tmp_path / "2.0")["fc"].alpha == 1.0


PREFIX, QUERY = "base_model.model.head.", "base_model.model.enc.q_proj."
A, B = PREFIX + "lora_A.weight", PREFIX + "lora_B.weight"
WRONG_KEY = "base_model.model.<module>.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({key: np.ones(6, "f4")}, f"the key '{key}' does not have the form {WRONG_KEY}")
            for key in (
                *(PREFIX + "lora_B.bias", PREFIX + "lora_C.weight"),
                *("base_model.model.modules_to_save.head", "head.lora_A.weight", "x"),
            )
        ),
        (dict.fromkeys((A, B, *(QUERY + f"lora_{f}.weight" for f in "AB"))), "there are no tensors"),
        ({B: None}, f"there is no '{B}'"),
        ({A: None}, f"there is no '{A}'"),
        ({B: np.ones((6, 3, 1), "f4")}, f"'{B}' has shape [6, 3, 1], expected [6, 3] for the rank 3"),
        ({B: np.ones((), "f4")}, f"'{B}' has shape [], expected [0, 3] for the rank 3"),
        ({A: np.ones((2, 4), "f4")}, f"'{A}' has shape [2, 4], expected [3, 4] for the rank 3"),
        ({B: np.ones((6, 2), "f4")}, f"'{B}' has shape [6, 2], expected [6, 3] for the rank 3"),
        ({A: np.ones((3, 0), "f4")}, f"'{A}' has shape [3, 0], which is empty"),
        ({A: np.ones((3, 4), "i4")}, f"'{A}' has dtype I32, expected one of F16, BF16, F32, F64"),
        ({B: np.ones((6, 3))}, f"'{A}' has dtype F32 and '{B}' has dtype F64"),
        ({B: np.full((6, 3), np.nan, "f4")}, f"'{B}' holds NaN or infinity"),
        ({A: np.full((3, 4), -np.inf, "f4")}, f"'{A}' holds NaN or infinity"),
    ],
)  # fmt: skip
def test_a_refusal_of_tensors_is_said_in_full(saved, tmp_path, change, message):
    folder = variant(saved, tmp_path, tensors=lambda t: {k: v for k, v in (t | change).items() if v is not None})
    for read in (load_adapter, inspect_adapter):
        with pytest.raises(FileRefused) as error:
            read(folder)
        assert str(error.value) == f"'{folder / WEIGHTS}': {message}"


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        (CONFIG, b"[" * 100_000, "Expected `object`"),
        (CONFIG, b"[1]", "Expected `object`"),
        (CONFIG, b"\xff", "JSON is malformed"),
        (CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "out of range"),
        (WEIGHTS, b"", "header too small"),
        (WEIGHTS, (2).to_bytes(8, "little") + b"{}", "no tensors"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(saved, tmp_path, file, text, named):
    folder = variant(saved, tmp_path)
    (folder / file).write_bytes(text)
    with pytest.raises(FileRefused, match=named):
        load_adapter(folder)


def test_a_cache_of_the_hugging_face_hub_is_read(saved, tmp_path):
    """Its snapshots hold links to blobs/, which are named by their digests."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(saved / name, blobs / f"{number:064}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064}")
    assert_same_adapters(load_adapter(snapshot), load_adapter(saved))


NO_FILES = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_regular_file_is_refused(saved, tmp_path, file, what):
    folder = variant(saved, tmp_path)
    (folder / file).unlink()
    NO_FILES[what](folder / file)
    with pytest.raises(FileRefused, match=f"{file}': (not a regular file|No such file|Too many levels)"):
        load_adapter(folder)


def test_a_name_too_long_for_the_system_is_refused(saved, tmp_path):
    for call in (load_adapter, inspect_adapter, lambda path: merge_adapter(path, saved, tmp_path / "out")):
        with pytest.raises(FileRefused, match="xxx"):
            call(tmp_path / ("x" * 5000))
    with pytest.raises(OSError, match=r"File name too long: '.*xxx"):
        save_adapter(tmp_path / ("x" * 5000), ONE)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(saved, tmp_path):
    for read in (load_adapter, inspect_adapter):
        with pytest.raises(FileRefused) as error:
            read(tmp_path / "nowhere")
        assert str(error.value) == f"'{tmp_path / 'nowhere'}': not a folder; expected one with {CONFIG} and {WEIGHTS}"
    folder = variant(saved, tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileRefused, match=r"': No such file or directory$"):
        load_adapter(folder)
    pickled = folder / "adapter_model.bin"
    pickled.write_bytes(b"")
    with pytest.raises(FileRefused, match=f"^'{pickled}': a pickle, which can run code when it is loaded: save it as"):
        load_adapter(folder)


def test_a_pickle_beside_safetensors_is_not_read(saved, tmp_path):
    folder = variant(saved, tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"anything")
    assert load_adapter(folder).keys() == load_adapter(saved).keys()


ONE = {"fc": LoRA(np.ones((1, 1)), np.ones((1, 1)), 1)}


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    paths = [f"layers.{number}.fc" for number in (10, 2, 1)]
    save_adapter(tmp_path, {path: LoRA(np.ones((1, 2)), np.ones((3, 1)), 1.0) for path in paths})
    assert list(load_adapter(tmp_path)) == paths[::-1]
