"""Call the functions of a foreign implementation: in its own orientation, and with an eye on what it does beside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..problems.formulas import QUANTITIES
from ..problems.kind import Kind
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import Trial
from .places import line_of, line_of_function, raised


class NoAnswer(Exception):
    """What a function returned cannot be taken for an answer; the message says why."""


def spelled(value: Any, choices: Sequence[Any]) -> Any:
    """Return the choice that a declaration spells in another way: "in,out", np.float32, torch.float32; or itself."""
    text = value if isinstance(value, str) else getattr(value, "__name__", str(value)).rpartition(".")[2]
    spellings = {"".join(choice.split()): choice for choice in choices if isinstance(choice, str)}
    return spellings.get("".join(text.lower().split()), value)


class Watch:
    """Calls an implementation's functions, and notes where one raises or changes what it was handed.

    `lay` puts each array into memory as it is to arrive; by default, in C order.
    """

    def __init__(
        self, implementation: Any, kind: Kind, lay: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    ) -> None:
        self.functions, self.kind, self.lay = implementation, kind, lay
        self.changed = ""  # which function changed what
        self.notes: dict[str, str] = {}  # what a judge saw that is no reason to fail: habits
        self.lent: list[tuple[str, Arrays, Arrays]] = []  # for each call, the arrays that it was handed, and copies
        # For each function that raised, or returned no answer, the problems on which it did, and what it said there.
        self.failed: dict[str, dict[Problem, str]] = {}
        self.lines: dict[str, str] = {}  # and in which file and line it did first
        self.returned: list[str] | None = None  # the gradients' names, once the backward has returned a dict
        self.transposed = spelled(getattr(implementation, "orientation", "out, in"), ("in, out",)) == "in, out"
        self.fan_in_fan_out = getattr(implementation, "fan_in_fan_out", None)  # None: as the factors lie

    def offers(self, function: str) -> bool:
        """Return whether the implementation has a function."""
        return callable(getattr(self.functions, function, None))

    def takes(self, function: str) -> frozenset[str]:
        """Return the names of a function's parameters."""
        try:
            return frozenset(inspect.signature(getattr(self.functions, function)).parameters)
        except (TypeError, ValueError, AttributeError):  # it is compiled, or there is none
            return frozenset()

    def options(self, function: str, problem: Problem) -> dict[str, Any]:
        """Return a problem's options, such as how a kernel moves, as far as a function takes them."""
        taken = self.takes(function) if problem.keywords else ()
        return {name: value for name, value in problem.options.items() if name in taken}

    def turn(self, name: str, array: Any) -> Any:
        """Return a weight or a factor as it lies in the implementation, or one of its own as it lies here."""
        turned = self.transposed if name in ("lora_A", "lora_B") or self.fan_in_fan_out is None else self.fan_in_fan_out
        if turned and np.ndim(array) == self.kind.transposed.get(name):
            return np.ascontiguousarray(np.asarray(array).swapaxes(-2, -1))
        return array

    def call(self, function: str, arrays: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
        """Call a function with arguments in order, and note it where it changes one of them."""
        arguments = {name: self._given(name, a, self.lay) for name, a in arrays.items()}
        lent = {place: a for name, argument in arguments.items() for place, a in _arrays_in(name, argument)}
        copies = {name: a.copy() for name, a in lent.items()}
        self.lent.append((function, lent, copies))
        result = getattr(self.functions, function)(*arguments.values(), **(options or {}))
        if not self.changed and (name := _changed(lent, copies)):
            self.changed = f"{function} changes {name}, which belongs to the caller"
        return result

    def _given(self, name: str, value: Any, lay: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Return a copy of an array as it is handed over, or of each of a list; anything else as it is."""
        if isinstance(value, list):
            return [self._given(name, part, lay) for part in value]
        return lay(self.turn(name, value.copy())) if isinstance(value, np.ndarray) else value

    def built(self, trial: Trial) -> Any:
        """Return what ``merging`` makes of a problem. It keeps the arrays, and may write to them."""
        layer = trial.problem.arguments_of("merging", trial.arrays)
        arguments = [self._given(name, a, np.asarray) for name, a in layer.items()]
        return self.functions.merging(*arguments, **self.options("merging", trial.problem))

    def look_back(self) -> str:
        """Return what was changed of all that was handed over, also by a later call; empty where nothing was."""
        for function, lent, copies in self.lent:
            if not self.changed and (name := _changed(lent, copies)):
                self.changed = f"a later call changes {name} of an earlier {function}, which belongs to the caller"
        return self.changed

    def ask(self, function: str, trial: Trial) -> Arrays:
        """Return a function's answers to a problem; none where it is not there or raises, which is noted."""
        problem = trial.problem
        if not self.offers(function):
            return {}
        try:
            arguments = problem.arguments_of(function, trial.arrays)
            return self._answers(function, self.call(function, arguments, self.options(function, problem)), problem)
        except NoAnswer as error:
            text = str(error)
            self.lines.setdefault(function, line_of_function(getattr(self.functions, function)))
        except (Exception, SystemExit) as error:  # whatever a foreign function raises
            text = f"raises {raised(error)}"
            self.lines.setdefault(function, line_of(error))
        self.failed.setdefault(function, {}).setdefault(problem, text)
        return {}

    def said(self, function: str) -> str:
        """Return what a function that raised, or returned no answer, said first, and the line of its file."""
        problem, text = next(iter(self.failed[function].items()))
        return f"{text} ({problem}, {'a' if problem.bias else 'no'} bias){self.lines[function]}"

    def _answers(self, function: str, result: Any, problem: Problem) -> Arrays:
        """Return copies of what a function returned, as arrays here: it may use its own memory again."""
        (names,) = (names for name, names in self.kind.answers.values() if name == function)
        if len(names) == 1:
            return {names[0]: self.array(result, names[0])}
        if not isinstance(result, Mapping):
            raise NoAnswer(
                f"returns {described(result)}, expected a dict of gradients with the keys x, lora_A and lora_B"
            )
        given = {name: result[name] for name in QUANTITIES if result.get(name) is not None}
        try:
            reply = {name: problem.from_returned(name, value, self.array) for name, value in given.items()}
        except ValueError as error:
            raise NoAnswer(f"returns gradients with {error}") from None
        self.returned = [str(name) for name in result]
        return reply

    def array(self, value: Any, name: str) -> np.ndarray:
        """Return a copy of an array that a function returned, as arrays are here."""
        if value is None or isinstance(value, (tuple, Mapping, str)):
            raise NoAnswer(f"returns {described(value)}, expected one array")
        try:
            array = np.array(self.turn(name, value))
        except Exception as error:  # of torch, for a tensor that requires a gradient, or in bfloat16
            hint = "; of torch, return y.detach().float().numpy()" if _is_of_torch(value) else ""
            raise NoAnswer(f"returns {described(value)} that is no array: {raised(error).rstrip('.')}{hint}") from None
        if array.dtype.kind not in "fiub" and not np.can_cast(array.dtype, np.float32):
            raise NoAnswer(f"returns numbers of type {array.dtype}, expected real ones")
        return array


def _arrays_in(name: str, value: Any) -> list[tuple[str, np.ndarray]]:
    """Return an argument's arrays, each under the name that it is told by."""
    if isinstance(value, list):
        return [(f"{name}[{i}]", part) for i, part in enumerate(value) if isinstance(part, np.ndarray)]
    return [(name, value)] if isinstance(value, np.ndarray) else []


def _changed(lent: Arrays, copies: Arrays) -> str:
    """Return the name of an array that is not what it was."""
    return next((name for name, copy in copies.items() if not np.array_equal(lent[name], copy)), "")


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def described(value: Any) -> str:
    """Return what a value is, for a message."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def forward(watch: Watch, trial: Trial) -> Any:
    """Return the output that an implementation gives for one problem."""
    return watch.ask("forward", trial).get("y")


def reply_to(watch: Watch, trial: Trial, between: Trial | None = None) -> Arrays:
    """Return everything that an implementation offers for one problem.

    It is asked for all of another one in between, after its first function: none may count on what was asked for last.
    """
    reply: Arrays = {}
    for number, (function, names) in enumerate(watch.kind.answers.values()):
        if number == 1 and between is not None:
            reply_to(watch, between)
        if not trial.right.keys().isdisjoint(names):
            reply |= watch.ask(function, trial)
    return {name: reply[name] for name in trial.right if name in reply}


def suited(problem: Problem, watch: Watch) -> Problem:
    """Return a problem with the options that the implementation's forward takes, or that it declares."""
    declared = {name: getattr(watch.functions, name, None) for name in watch.kind.declares}
    return problem.restrict(watch.takes("forward"), declared)
