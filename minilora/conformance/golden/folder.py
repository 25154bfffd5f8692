"""Write a folder of golden adapters with its index, and read such an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from ... import __version__
from ...extras import needed
from ...files.disk import is_new_or_empty, read_json, written_folder
from ...files.peft import CONFIG_NAME, WEIGHTS_NAME
from ...report import links
from ...texts import FileRefused, reading, short
from .bases import BASES, LIVING, UNTIED, Base, write_base, write_gguf, write_json, write_safetensors
from .cases import CASES, LOGIT_TOLERANCE, Case
from .leftovers import LEFTOVERS, ROUNDED
from .misreadings import MISREADINGS, MIXTURE_MISREADINGS
from .reading import NamedArrays
from .sessions import SESSIONS, Session, Use, session_adapters
from .signatures import APART, SHOWN_ROWS, SIGNATURE_ROWS, CaseAnswers, answers, session_answers

FOLDER_FORMAT = 1
"""The version of the folder's format. Later versions of minilora read all earlier formats."""
GOLDEN_INDEX, GOLDEN_SCHEMA = "index.json", "index.schema.json"
HOW_TO_ANSWER = (
    "For each case, load `base` with `adapter` beside it, and compute the logits after each token of `prompts`. Nothing"
    " is put before a prompt. An `adapter` is a folder in PEFT's layout, or a list of such folders with weights: their"
    " updates are summed, each times its weight; an empty list is the base alone. A case with `after` is answered just"
    " after that one, by the same process.",
    "Write ID.safetensors into a folder of your own, with a tensor `logits` (prompts, T, V), or (prompts, V) after the"
    " last token; or, where you have no logits, `log_probabilities` of the same shape; with a tensor `ids` beside it,"
    " of the same shape, only those of these tokens. Beside or instead, `merged.NAME` is the base's weight NAME with"
    " the adapter folded in. Leave out what you do not have, but no case.",
    "A case that is `refused` must be refused: write nothing for it. Where such a case has `answers`, these are right"
    " too.",
    "`tolerance` is how far a logit may be off, by the precision that you compute in. It is that of the tensors, or"
    ' what the metadata of your file say: {"computed_in": "bfloat16"}. For a log-probability it is twice that.',
    "`sessions` are for an engine that lives on: one of its own for each session answers all `requests` in their order."
    " `adapters` has one for each prompt, or null for the base alone: the `name` that the engine is to know it by, its"
    " `folder`, and the `weight` that its update is multiplied by. Where a name stands for another folder than before,"
    " the engine takes the new one. `unload` has names to forget before the request. With `merged` the adapter is"
    " folded into the weights for this request, and taken out after it. Write SESSION.N.safetensors, N from 0. Leave"
    " out a whole session that your engine has no means for.",
    "`load` has adapters that the engine is to load before a request, though no prompt of it may ask for them. With"
    " `generate` that many tokens follow each prompt, the likeliest each time; the answer is (prompts, generate, V),"
    " after the prompt's last token and after each that follows but the last. With `each` it is (prompts, T - 1, V),"
    " after each token of the prompt but the last, as one pass over the prompt gives it.",
    "`minilora golden THIS --compare YOURS` says what is wrong.",
    "A file of answers has `logits`, `next_tokens` (prompts,), the rows of `merged.NAME` that come first, and for each"
    " of the case's flags a known bug's numbers: `signature.FLAG` is what it makes of the logits (prompts, V) after"
    " the last token, and `signature.FLAG.merged` of the merged weight's first rows. Of a request with `generate` or"
    " `each`, `each.logits` and `each.signature.FLAG` are those of all its positions, and without `each.` the last's.",
)


def index(
    every: Iterable[tuple[Case, CaseAnswers | None]], sessions: Iterable[tuple[Session, Sequence[CaseAnswers]]] = ()
) -> dict[str, Any]:
    """Return the contents of index.json."""
    flags = {bug.flag: bug for bug in (*MISREADINGS, *MIXTURE_MISREADINGS, *LEFTOVERS, ROUNDED)}  # some in several
    return {
        "$schema": GOLDEN_SCHEMA,
        "format": FOLDER_FORMAT,
        "minilora": __version__,
        "license": "MIT",
        "how": list(HOW_TO_ANSWER),
        "tolerance": LOGIT_TOLERANCE,
        "apart": APART,
        "rows": {"merged": SHOWN_ROWS, "signature": SIGNATURE_ROWS},
        "base": f"bases/{UNTIED.name}",
        "bases": {f"bases/{base.name}": base_entry(base) for base in BASES},
        "cases": [entry(case, numbers) for case, numbers in every],
        "sessions": [session_entry(session, numbers) for session, numbers in sessions],
        "flags": {flag: {"bug": bug.says, "made in": links(bug.source)} for flag, bug in flags.items()},
    }


def base_entry(base: Base) -> dict[str, Any]:
    """Return a base's entry of the index."""
    return {
        "tied": base.tied,
        "layers": base.layers,
        **({"quantised": "nf4"} if base.nf4 else {}),
        **({"gguf": f"bases/{base.name}.gguf"} if base.gguf else {}),
        **({"experts": base.mixture.num_experts, "fused": base.fused} if base.mixture else {}),
    }


def entry(case: Case, numbers: CaseAnswers | None) -> dict[str, Any]:
    """Return a case's entry of the index."""
    names = adapter_names(case)
    weighted = [[name, adapter.weight] for name, adapter in zip(names, case.adapters, strict=True)]
    base = {} if case.base is UNTIED else {"base": f"bases/{case.base.name}"}
    more = {} if numbers is None else {"answers": f"answers/{case.id}.safetensors", "flags": list(numbers.signatures)}
    return {
        "id": case.id,
        **base,
        "adapter": names[0] if len(names) == 1 else weighted,
        **({"after": case.after} if case.after else {}),
        "prompts": case.prompts.tolist(),
        "refused": case.refused,
        "note": case.note,
        **({"apart": case.apart} if case.answered and case.apart != APART else {}),
        **more,
    }


def session_entry(session: Session, numbers: Sequence[CaseAnswers]) -> dict[str, Any]:
    """Return a session's entry of the index."""
    return {
        "id": session.id,
        "base": f"bases/{LIVING.name}",
        "requests": [
            {
                **({"unload": list(request.unload)} if request.unload else {}),
                **({"merged": True} if request.merged else {}),
                **({"load": list(map(use_entry, request.load))} if request.load else {}),
                **({"generate": request.generate} if request.generate else {}),
                **({"each": True} if request.each else {}),
                "adapters": [use and use_entry(use) for use in request.adapters],
                "prompts": request.prompts.tolist(),
                "answers": f"answers/{session.id}.{n}.safetensors",
                "flags": list(answers.signatures),
            }
            for n, (request, answers) in enumerate(zip(session.requests, numbers, strict=True))
        ],
        "note": session.note,
    }


def use_entry(use: Use) -> dict[str, Any]:
    """Return an adapter's entry in a request."""
    return {"name": use.name, "folder": use.folder.as_posix(), "weight": use.weight}


def schema() -> Any:
    """Return the JSON Schema of index.json."""
    return json.loads(Path(__file__).with_name(GOLDEN_SCHEMA).read_text(encoding="utf-8"))


def adapter_names(case: Case) -> list[str]:
    """Return the folder names of a case's adapters."""
    name = f"adapters/{case.id}"
    return [name] if len(case.adapters) == 1 else [f"{name}-{i}" for i in range(len(case.adapters))]


def write_golden(folder: Path) -> int:
    """Write the golden adapters into a new or empty folder, and return the number of cases.

    Raises
    ------
    ValueError
        If the folder is not empty, or the package `gguf` is missing.
    """
    if not is_new_or_empty(folder):
        raise ValueError(f"{str(folder)!r} already exists, expected a new folder or an empty one")
    needed("gguf", "the copies in llama.cpp's format")
    every = [(case, answers(case) if case.answered else None) for case in CASES]
    sessions = [(session, session_answers(session)) for session in SESSIONS]
    with written_folder(folder) as new:
        (new / "bases").mkdir()
        for base in BASES:
            write_base(new / "bases" / base.name, base)
            if base.gguf:
                write_gguf(new / "bases" / f"{base.name}.gguf", base)
        (new / "answers").mkdir()
        for case, numbers in every:
            for name, contents in zip(adapter_names(case), case.files(), strict=True):
                write_adapter(new / name, *contents, case.stored)
            if numbers is not None:
                write_safetensors(new / "answers" / f"{case.id}.safetensors", numbers.tensors())
        for place, contents in session_adapters():
            write_adapter(new / place, *contents)
        for session, requests in sessions:
            for n, request in enumerate(requests):
                write_safetensors(new / "answers" / f"{session.id}.{n}.safetensors", request.tensors())
        (new / GOLDEN_INDEX).write_text(json.dumps(index(every, sessions), indent=1) + "\n", encoding="utf-8")
        (new / GOLDEN_SCHEMA).write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    return len(every)


def write_adapter(folder: Path, config: dict[str, Any], tensors: NamedArrays, stored: str = "") -> None:
    """Write an adapter in PEFT's layout."""
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_NAME, config)
    write_safetensors(folder / WEIGHTS_NAME, tensors, stored)


# --- reading ----------------------------------------------------------------------------------------

Above0: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]


class BugEntry(msgspec.Struct):
    """A known bug's entry in the index."""

    bug: str
    made_in: list[str] = msgspec.field(name="made in")  # URLs


class CaseEntry(msgspec.Struct):
    """A case's entry in the index, as far as the judge uses it."""

    id: str
    refused: bool
    note: str = ""
    adapter: str | list[tuple[str, float]] = ""
    answers: str = ""
    flags: list[str] = []


class UseEntry(msgspec.Struct):
    """An adapter's entry in a request."""

    name: str
    folder: str
    weight: float


class RequestEntry(msgspec.Struct):
    """A request's entry in a session."""

    answers: str
    flags: list[str]
    adapters: list[UseEntry | None] = []
    prompts: list[list[int]] = []
    unload: list[str] = []
    merged: bool = False
    load: list[UseEntry] = []
    generate: int = 0
    each: bool = False


class SessionEntry(msgspec.Struct):
    """A session's entry in the index."""

    id: str
    requests: list[RequestEntry]
    base: str = ""


class GoldenIndex(msgspec.Struct):
    """The contents of index.json, as far as the judge uses them."""

    cases: Annotated[list[CaseEntry], msgspec.Meta(min_length=1)]
    flags: dict[str, BugEntry]
    tolerance: dict[str, Above0]
    sessions: list[SessionEntry] = []


def read_index(folder: Path) -> GoldenIndex:
    """Read index.json, in this format or an earlier one."""
    path = folder / GOLDEN_INDEX
    raw = read_json(path)
    version = raw.get("format")
    if type(version) is not int or not 1 <= version <= FOLDER_FORMAT:
        raise FileRefused(
            path, f"format is {short(version)}, expected at most {FOLDER_FORMAT}; a later minilora may have written it"
        )
    with reading(path):
        index = msgspec.convert(raw, GoldenIndex)
    if lacking := [name for name in LOGIT_TOLERANCE if name not in index.tolerance]:
        raise FileRefused(path, f"tolerance has no {lacking[0]}")
    entries: list[CaseEntry | RequestEntry] = [*index.cases]
    entries += (request for session in index.sessions for request in session.requests)
    for one in entries:
        if unknown := [flag for flag in one.flags if flag not in index.flags]:
            raise FileRefused(path, f"{short(one.answers)} has the flag {short(unknown[0])}, which is not in flags")
    return index
