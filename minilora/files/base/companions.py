"""What stands beside the weights in a model's folder, so that a merged folder loads: configuration and tokenizer.

They are copied as they are; only of a model that gets a head of its own config.json says so, see `.tiedhead`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checks import FileRefused
from ..atomic import synced
from ..inputs import open_regular, read_json
from ..peft.adapterconfig import CONFIG_NAME
from ..tensors import MODEL_CONFIG

FURTHER_TEMPLATES = "additional_chat_templates"
"""A folder with chat templates for other occasions than the default: ``tool_use.jinja``."""
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""What files end in that say how a model is built, how it generates, and how its tokenizer splits text."""


def files_beside(folder: Path, *, untied: bool) -> dict[str, Path | bytes]:
    """Return what a new folder gets of a model's, by name: a file to copy, or a text.

    Of an untied model config.json says that it is. An index is of the weights that are written apart, an adapter's
    configuration of an adapter that is not written. What is no regular file is refused, and a configuration that is no
    JSON.
    """
    config, files = read_json(folder / MODEL_CONFIG), {}
    for path in [*sorted(folder.iterdir()), *sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))]:
        passed = path.name.startswith(".") or path.name.endswith(".index.json") or path.name == CONFIG_NAME
        if path.suffix in COPIED and not passed and not path.is_dir():
            open_regular(path).close()
            _check_within(folder, path)
            files[path.relative_to(folder).as_posix()] = path
    return files | ({MODEL_CONFIG: json_bytes(config | {"tie_word_embeddings": False})} if untied else {})


def _check_within(folder: Path, path: Path) -> None:
    """Refuse a link out of the model's folder and of the hub's cache, in which it lies: what it leads to is private.

    In the cache files are links: ``models--NAME/snapshots/REVISION/FILE`` leads to ``models--NAME/blobs/HASH``.
    """
    place, home = path.resolve(), folder.resolve()
    cache = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not {home, cache} & set(place.parents):
        raise FileRefused(path, "a link out of the model's folder, whose file would be copied: expected one in it")


def write_beside(files: Mapping[str, Path | bytes], part: Path) -> None:
    """Write them into the new folder."""
    for name, content in files.items():
        (part / name).parent.mkdir(exist_ok=True)
        with synced(part / name) as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with open_regular(content) as source:
                    shutil.copyfileobj(source, target)


def json_bytes(value: Any) -> bytes:
    """Return a value as a file of JSON that people read."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
