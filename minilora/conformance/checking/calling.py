"""Call an implementation's functions in its own orientation, watching for side effects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..problems.formulas import QUANTITIES
from ..problems.kind import Kind
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import Trial
from .places import error_text, line_of, line_of_function


class NoAnswer(Exception):
    """Raised when a function's return value is not an answer; the message says why."""


def as_choice(value: Any, choices: Sequence[Any]) -> Any:
    """Return the choice that a declaration such as "in,out", np.float32 or torch.float32 means, or else `value`."""
    text = value if isinstance(value, str) else getattr(value, "__name__", str(value)).rpartition(".")[2]
    spellings = {"".join(choice.split()): choice for choice in choices if isinstance(choice, str)}
    return spellings.get("".join(text.lower().split()), value)


class Watch:
    """Calls an implementation's functions, and records which of them raise or modify their arguments.

    `layout` sets the memory order in which each array is passed; the default is C order.
    """

    def __init__(
        self, implementation: Any, kind: Kind, layout: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    ) -> None:
        self.functions, self.kind, self.layout = implementation, kind, layout
        self.changed = ""  # which function modified which array
        self.notes: dict[str, str] = {}  # observations that are no reason to fail, by habit
        self.inputs: list[tuple[str, Arrays, Arrays]] = []  # for each call: function, arrays passed, copies made before
        # For each function that raised or returned no answer: the problems on which it failed, and the message.
        self.failed: dict[str, dict[Problem, str]] = {}
        self.lines: dict[str, str] = {}  # the file and line of each function's first failure
        self.returned: list[str] | None = None  # the gradients' names, once the backward has returned a dict
        self.transposed = as_choice(getattr(implementation, "orientation", "out, in"), ("in, out",)) == "in, out"
        self.fan_in_fan_out = getattr(implementation, "fan_in_fan_out", None)  # None: same as the factors

    def offers(self, function: str) -> bool:
        """Return whether the implementation has this function."""
        return callable(getattr(self.functions, function, None))

    def parameters(self, function: str) -> frozenset[str]:
        """Return the names of a function's parameters."""
        try:
            return frozenset(inspect.signature(getattr(self.functions, function)).parameters)
        except (TypeError, ValueError, AttributeError):  # the function is compiled, or missing
            return frozenset()

    def options(self, function: str, problem: Problem) -> dict[str, Any]:
        """Return those of a problem's options, such as a convolution's stride, that a function accepts."""
        taken = self.parameters(function) if problem.keywords else ()
        return {name: value for name, value in problem.options.items() if name in taken}

    def reorient(self, name: str, array: Any) -> Any:
        """Transpose a weight or a factor if the implementation stores it transposed; works in both directions."""
        turned = self.transposed if name in ("lora_A", "lora_B") or self.fan_in_fan_out is None else self.fan_in_fan_out
        if turned and np.ndim(array) == self.kind.transposed.get(name):
            return np.ascontiguousarray(np.asarray(array).swapaxes(-2, -1))
        return array

    def call(self, function: str, arrays: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
        """Call a function with positional arguments, and record it if it modifies one of them."""
        arguments = {name: self._given(name, a, self.layout) for name, a in arrays.items()}
        inputs = {place: a for name, argument in arguments.items() for place, a in _arrays_in(name, argument)}
        copies = {name: a.copy() for name, a in inputs.items()}
        self.inputs.append((function, inputs, copies))
        result = getattr(self.functions, function)(*arguments.values(), **(options or {}))
        if not self.changed and (name := _changed(inputs, copies)):
            self.changed = f"{function} changes {name}, which the caller owns"
        return result

    def _given(self, name: str, value: Any, layout: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Return a copy of an array, or of each array in a list, as it is passed; anything else unchanged."""
        if isinstance(value, list):
            return [self._given(name, part, layout) for part in value]
        return layout(self.reorient(name, value.copy())) if isinstance(value, np.ndarray) else value

    def build_layer(self, trial: Trial) -> Any:
        """Return the layer that ``merging`` builds for a problem. The layer owns its arrays, and may write to them."""
        layer = trial.problem.arguments_of("merging", trial.arrays)
        arguments = [self._given(name, a, np.asarray) for name, a in layer.items()]
        return self.functions.merging(*arguments, **self.options("merging", trial.problem))

    def find_changes(self) -> str:
        """Return which argument of any call was modified, even by a later call; empty if none was."""
        for function, inputs, copies in self.inputs:
            if not self.changed and (name := _changed(inputs, copies)):
                self.changed = f"a later call changes {name} of an earlier call of {function}; the caller owns it"
        return self.changed

    def ask(self, function: str, trial: Trial) -> Arrays:
        """Return a function's answers to a problem; empty if it is missing or fails. Failures are recorded."""
        problem = trial.problem
        if not self.offers(function):
            return {}
        try:
            arguments = problem.arguments_of(function, trial.arrays)
            return self._answers(function, self.call(function, arguments, self.options(function, problem)), problem)
        except NoAnswer as error:
            text = str(error)
            self.lines.setdefault(function, line_of_function(getattr(self.functions, function)))
        except (Exception, SystemExit) as error:  # a foreign function may raise anything
            text = f"raises {error_text(error)}"
            self.lines.setdefault(function, line_of(error))
        self.failed.setdefault(function, {}).setdefault(problem, text)
        return {}

    def first_failure(self, function: str) -> str:
        """Return the message of a function's first failure, with the problem, file and line."""
        problem, text = next(iter(self.failed[function].items()))
        return f"{text} ({problem}, {'a' if problem.bias else 'no'} bias){self.lines[function]}"

    def _answers(self, function: str, result: Any, problem: Problem) -> Arrays:
        """Return what a function returned as NumPy arrays. They are copies, since it may reuse its own memory."""
        (names,) = (names for name, names in self.kind.answers.values() if name == function)
        if len(names) == 1:
            return {names[0]: self.array(result, names[0])}
        if not isinstance(result, Mapping):
            raise NoAnswer(f"returns {describe_type(result)}, expected a dict with the keys x, lora_A and lora_B")
        given = {name: result[name] for name in QUANTITIES if result.get(name) is not None}
        try:
            reply = {name: problem.from_returned(name, value, self.array) for name, value in given.items()}
        except ValueError as error:
            raise NoAnswer(f"returns gradients with {error}") from None
        self.returned = [str(name) for name in result]
        return reply

    def array(self, value: Any, name: str) -> np.ndarray:
        """Return a copy of an array that a function returned, in the suite's orientation."""
        if value is None or isinstance(value, (tuple, Mapping, str)):
            raise NoAnswer(f"returns {describe_type(value)}, expected one array")
        try:
            array = np.array(self.reorient(name, value))
        except Exception as error:  # PyTorch raises for a tensor that requires a gradient, or is bfloat16
            of_torch = type(value).__module__.partition(".")[0] == "torch"
            hint = "; with PyTorch, return y.detach().float().numpy()" if of_torch else ""
            raise NoAnswer(
                f"returns {describe_type(value)}, not an array: {error_text(error).rstrip('.')}{hint}"
            ) from None
        if array.dtype.kind not in "fiub" and not np.can_cast(array.dtype, np.float32):
            raise NoAnswer(f"returns an array of dtype {array.dtype}, expected real numbers")
        return array


def _arrays_in(name: str, value: Any) -> list[tuple[str, np.ndarray]]:
    """Return an argument's arrays, each with the name that messages use for it."""
    if isinstance(value, list):
        return [(f"{name}[{i}]", part) for i, part in enumerate(value) if isinstance(part, np.ndarray)]
    return [(name, value)] if isinstance(value, np.ndarray) else []


def _changed(inputs: Arrays, copies: Arrays) -> str:
    """Return the name of the first array that differs from its copy; empty if none does."""
    return next((name for name, copy in copies.items() if not np.array_equal(inputs[name], copy)), "")


def describe_type(value: Any) -> str:
    """Describe a value's type for a message."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def forward(watch: Watch, trial: Trial) -> Any:
    """Return the output that an implementation gives for one problem."""
    return watch.ask("forward", trial).get("y")


def reply_to(watch: Watch, trial: Trial, between: Trial | None = None) -> Arrays:
    """Return an implementation's answers to one problem, from all of its functions.

    With `between`, all functions are also called on that problem right after the first one: no function may rely on
    what was called last.
    """
    reply: Arrays = {}
    for number, (function, names) in enumerate(watch.kind.answers.values()):
        if number == 1 and between is not None:
            reply_to(watch, between)
        if not trial.right.keys().isdisjoint(names):
            reply |= watch.ask(function, trial)
    return {name: reply[name] for name in trial.right if name in reply}


def restricted(problem: Problem, watch: Watch) -> Problem:
    """Return a problem with only the options that the implementation's forward accepts or that it declares."""
    declared = {name: getattr(watch.functions, name, None) for name in watch.kind.declares}
    return problem.restrict(watch.parameters("forward"), declared)
