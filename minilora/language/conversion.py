"""The keys in rows of other programs' data, with the jq programs that convert such rows into examples.

Other programs give the parts of an example other names, or train on parts that are not read here. A row is refused if
such a key would be ignored, and the message contains a jq program for the whole file. The program keeps every key that
it does not convert, so that none is lost unnoticed, and leaves lines of other formats unchanged. It contains only keys
from the tables below, never a text of the row, since it is pasted into a shell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..texts import enumerated

ASKED = ("context", "instruction", "question", "query", "problem", "prompt", "input", "inputs")
"""Keys of the parts of a prompt, in the order in which they are joined."""
CHOSEN = ("chosen", "chosen_response", "chosen_messages", "preferred_output")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
ANSWERS = (*CHOSEN, "completion", "response", "output", "answer", "solution")
"""Keys of an answer, the first to be used first."""
SYSTEMS = ("system", "system_prompt", "system_message")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
"""Keys of a message's role and of its content."""
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles in ShareGPT's format, with their names here."""
PREFERENCES = "finetune learns one answer to each prompt (supervised fine-tuning), not preferences (DPO, KTO)"
"""The sentence about rows of preferences."""
EQUAL, PART = "all examples and all tokens of an answer have the same weight", "an example has no such part"
LOST = {
    **dict.fromkeys((
        "tools", "functions", "function_call", "documents", "chat_template_kwargs", "enable_thinking", "tool_choice",
        "parallel_tool_calls", "reasoning_effort", "response_format",
    ), "a chat template receives only messages and tools"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "the model reads only text"),
    **dict.fromkeys((*SYSTEMS, "history", *ASKED, *CONVERSATIONS, *ANSWERS, "suffix"), PART),
    **dict.fromkeys((*CHOSEN, *REJECTED), PREFERENCES),
    **dict.fromkeys((
        "weight", "weights", "loss_weight", "sample_weight", "score", "scores", "reward", "rewards", "rating", "label",
        "labels", "advantage", "mask", "loss_mask", "completion_mask", "assistant_mask", "assistant_masks",
    ), EQUAL),
}  # fmt: skip
"""Keys that change what other programs learn, with the reason why they are not read here."""
OF_ANSWERS = {key for key, reason in LOST.items() if reason in (EQUAL, PREFERENCES)} | {*ANSWERS, "suffix"}
"""The keys in LOST that do not change a prompt."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""The values of a key without content."""


def check_keys(record: Mapping[str, Any], read: Iterable[str]) -> None:
    """Raise ValueError if a key that changes what other programs learn has content, and is not among those `read`."""
    lost = [key for key in LOST if key not in {*read} and record.get(key) not in EMPTY]
    lost = [key for key in lost if LOST[key] != EQUAL or record[key] != 1]
    if "label" in lost and record["label"] == 0:  # or false, as in rows for KTO
        good = "select(.label == null or .label == true or .label == 1) | del(.label)"
        raise ValueError(f"its label marks a bad answer, but {PREFERENCES}: jq -c '{good}' keeps the good ones")
    if lost:
        program, used = conversion(record)
        lost = [key for key in lost if key in used] or lost
        remedy = f"jq -c '{program}' converts it, and " if {*lost} <= {*used} else ""
        remedy += f"jq -c '{_deletion(lost)}' removes {'them' if len(lost) > 1 else 'it'}"
        reasons = "; ".join(dict.fromkeys(LOST[key] for key in lost))
        raise ValueError(f"its {enumerated(lost)} would be ignored: {reasons}; {remedy}")


def how_to_convert(record: Mapping[str, Any]) -> str:
    """Return the end of an error message about a row in another program's format: how to convert it, or ""."""
    preferred = any(record.get(key) not in EMPTY for key in (*CHOSEN, *REJECTED))
    program, _ = conversion(record)
    return f"; {PREFERENCES}" * preferred + (f"; jq -c '{program}' converts it" if program else "")


def conversion(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return a jq program that makes a row an example, and the keys that it reads; ("", []) for an unknown format."""
    if record.get("text"):  # it may contain all of the others
        return "", []
    for key in ASKED:
        if isinstance(record.get(key), dict) and "messages" in record[key]:  # as in OpenAI's rows of preferences
            program, used = conversion({**record, key: None, **record[key]})
            lifted = f"if .{key} then . + .{key} | del(.{key}) else . end"
            return " | ".join(filter(None, [lifted, program])), [key, *used]
    texts = {key for key, value in record.items() if isinstance(value, str)}
    chats = {key: roles for key, value in record.items() if (roles := _roles(value))}
    chat = [key for key in (*CONVERSATIONS, *ASKED) if key in chats][:1]
    asked = [key for key in ASKED if key in texts and not chat]
    answered = any(chats[key][-1] == "assistant" for key in chat)
    answer = [key for key in (CHOSEN if answered else ANSWERS) if key in texts or key in chats][:1]
    parts = {key: f'[.{key} | select(length > 0) | {{role: "system", content: .}}]' for key in SYSTEMS if key in texts}
    if isinstance(record.get("history"), list) and record["history"]:
        pairs = '[.history[] | {role: "user", content: .[0]}, {role: "assistant", content: .[1]}]'
        parts["history"] = _messages("history", record["history"]) if "history" in chats else pairs
    parts |= {key: _messages(key, record[key]) + "[:-1]" * (answered and bool(answer)) for key in chat}
    parts |= {key: f'[{{role: "user", content: {_joined_by_jq(asked)}}}]' for key in asked}
    parts |= {key: _messages(key, record[key]) for key in answer}
    made = {"messages": " + ".join(dict.fromkeys(parts.values()))}
    if answer and chats.get(answer[0], ["assistant"])[0] != "assistant":  # the answer repeats the prompt
        parts = dict.fromkeys([*answer, *({"prompt"} & texts)], "")
        made = {"messages": _messages(answer[0], record[answer[0]])}
    elif "prompt" in asked and {*asked, *answer} == parts.keys() <= texts:
        made = {"prompt": _joined_by_jq(asked), "completion": "".join(f".{key}" for key in answer)}
    elif [*parts] == answer:
        made = {"text": "".join(f".{key}" for key in answer if key in CHOSEN and key in texts)}
    changed = [f".{name} = {value}" for name, value in made.items() if value not in ("", f".{name}")]
    if not changed or [*parts] == asked:
        return "", []
    used = [*parts, *(key for key in REJECTED if key in record and {*answer} & {*CHOSEN})]
    gone = [key for key in used if key not in made]
    shared = () if "messages" in record else ("prompt", "completion")  # keys of other lines of the file, too
    guard = next((key for key in (*answer, *chat, *gone) if key in gone and key not in shared), None)
    program = " | ".join([*changed, *([_deletion(gone)] if gone else [])])
    return f"if .{guard} then {program} else . end" if guard else program, used


def _deletion(keys: Iterable[str]) -> str:
    """Return the jq program that deletes keys."""
    return f"del({', '.join(f'.{key}' for key in keys)})"


def _joined_by_jq(keys: Sequence[str]) -> str:
    """Return the jq expression of texts that are not empty, with a blank line between them."""
    if len(keys) == 1:
        return f".{keys[0]}"
    return f'([{", ".join(f".{key}" for key in keys)} | select(length > 0)] | join("\\n\\n"))'


def _roles(value: Any) -> list[str]:
    """Return the role of each message if a value is a message, or a list of messages; otherwise an empty list."""
    messages = value if isinstance(value, list) else [value]
    found = [[str(m[key]) for key in ROLE_KEYS if key in m] if isinstance(m, dict) else [] for m in messages]
    return [SHAREGPT_ROLES.get(roles[0], roles[0]) for roles in found] if all(found) else []


def _messages(key: str, value: Any) -> str:
    """Return the jq expression of an answer, or of messages that may have other keys, as a list of messages."""
    if isinstance(value, str):
        return f'[{{role: "assistant", content: .{key}}}]'
    items, first = (f".{key}[]", value[0]) if isinstance(value, list) else (f".{key}", value)
    role, content = (next((name for name in names if name in first), names[0]) for names in (ROLE_KEYS, CONTENT_KEYS))
    if foreign := [name for name in (role, content) if name not in ("role", "content")]:
        renamed = f".role = ({json.dumps(SHAREGPT_ROLES)}[.{role}] // .{role}) | .content = .{content}"
        return f"[{items} | {renamed} | {_deletion(foreign)}]"
    return f".{key}" if isinstance(value, list) else f"[.{key}]"
