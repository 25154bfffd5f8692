"""Run the sessions on an engine that can be called from Python, saving its answers as files.

    def start(base):                 # a folder; each session gets a new engine
        engine = ...
        def answer(request):         # a `Request`; returns logits (prompts, V) after the last token, or (prompts, T, V)
            ...
        return answer

    ask(golden, start, results)

`request.adapters` has a `Use` for each prompt, with `name`, `folder` and `weight`, or None for the base.
`request.generate` is the number of tokens to generate greedily. If it is not 0, the answer is (prompts, generate, V):
the logits after the prompt, and after each generated token but the last. With `request.each` the answer is
(prompts, T - 1, V): the logits after each token of the prompt but the last, from one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .answerfiles import COMPUTED_IN
from .folder import RequestEntry, UseEntry, read_index
from .sessions import Request, Use

Answer = np.ndarray | Mapping[str, np.ndarray]
"""Logits, or tensors under the names that files of answers use, such as ``log_probabilities``."""


def ask(
    folder: str | Path,
    start: Callable[[Path], Callable[[Request], Answer]],
    results: str | Path,
    *,
    computed_in: str | None = None,
) -> dict[str, str]:
    """Run all sessions of a folder of golden adapters on an engine, and save its answers.

    Parameters
    ----------
    folder : path
        The golden adapters.
    start : callable
        Takes the folder of a base, and returns a function that answers a request. It is called once for each session.
    results : path
        The folder for the answers; it is created if it does not exist.
    computed_in : str, optional
        The precision that the engine computes in, if it differs from its arrays' dtype. It is saved as metadata.

    Returns
    -------
    dict of str to str
        The errors, by the id of what has no answer: the id of a session, which is then skipped as a whole, if the
        engine raised NotImplementedError because it does not support it; SESSION.N if a request raised another error.
    """
    folder, results = Path(folder).resolve(), Path(results)
    results.mkdir(parents=True, exist_ok=True)
    metadata = None if computed_in is None else {COMPUTED_IN: computed_in}
    errors: dict[str, str] = {}
    for session in read_index(folder).sessions:
        answers: dict[str, dict[str, np.ndarray]] = {}
        try:
            answer = start(folder / session.base)
            for n, entry in enumerate(session.requests):
                id = f"{session.id}.{n}"
                try:
                    answers[id] = _tensors(answer(request_of(folder, entry)))
                except NotImplementedError:
                    raise
                except Exception as error:
                    errors[id] = _line(error)
        except NotImplementedError as error:
            errors = {id: said for id, said in errors.items() if not id.startswith(f"{session.id}.")}
            errors[session.id] = _line(error)
            continue
        for id, tensors in answers.items():
            save_file(tensors, results / f"{id}.safetensors", metadata)
    return errors


def request_of(folder: Path, entry: RequestEntry) -> Request:
    """Return the request of an entry of the index, with its adapters' folders inside `folder`."""

    def used(use: UseEntry) -> Use:
        return Use(use.name, folder / use.folder, use.weight)

    uses = tuple(None if use is None else used(use) for use in entry.adapters)
    prompts, load = np.array(entry.prompts), tuple(map(used, entry.load))
    return Request(prompts, uses, tuple(entry.unload), entry.merged, load, entry.generate, entry.each)


def _tensors(answer: Answer) -> dict[str, np.ndarray]:
    tensors = answer if isinstance(answer, Mapping) else {"logits": answer}
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
