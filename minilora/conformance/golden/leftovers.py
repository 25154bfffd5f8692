"""Known bugs of engines that keep something from earlier requests.

A row is `Engine` with one part replaced: the adapters that are added for a prompt, each times its weight; those for the
tokens that follow, or for log-probabilities within the prompt; or those with which cached keys and values were
computed. A part is a function of a `Moment`, which has the adapter that the prompt asks for, those of earlier requests
and of the whole batch, and those that are loaded. The table says in whose code a bug was found.

In a session, several bugs can give the same numbers for one request. So a request names all of them, and the report
starts with the bug that explains the most requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..naming import Parts, Wrong
from .bases import HEAD_PATH
from .misreadings import MISREADINGS
from .reading import AdapterData
from .sessions import Use, adapter_of

Sum = list[tuple[AdapterData, float]]


@dataclass(frozen=True)
class Moment:
    """One prompt of a request, with what came before it."""

    now: Use | None
    before: Sequence[Use | None]  # this prompt's adapters in earlier requests
    batch: Sequence[Use | None]  # the adapters of all prompts of this request
    loaded: Sequence[Use] = ()  # the adapters loaded by now and not unloaded, used or not

    @property
    def last(self) -> Use | None:
        """The adapter of the previous request."""
        return self.before[-1] if self.before else None

    @property
    def earlier(self) -> Use | None:
        """The latest earlier adapter that is neither the current nor the previous one."""
        return next((use for use in reversed(self.before) if use not in (None, self.now, self.last)), None)

    @property
    def first(self) -> Use | None:
        """The first adapter that an earlier request used."""
        return next((use for use in self.before if use is not None), None)

    @property
    def changes(self) -> list[Use]:
        """Every adapter that was switched on until now, once for each time."""
        every = [*self.before, self.now]
        return [use for i, use in enumerate(every) if use is not None and (i == 0 or every[i - 1] != use)]

    @property
    def of_this_name(self) -> list[Use]:
        """The earlier uses of this adapter's name, in order."""
        return [use for use in self.before if use is not None and self.now is not None and use.name == self.now.name]

    @property
    def namesake(self) -> Use | None:
        """The first adapter with this name, if it is a different one."""
        first = next(iter(self.of_this_name), None)
        return None if first is None or self.now is None or first.folder == self.now.folder else first


def added(*uses: Use | None, times: float = 1.0) -> Sum:
    """Return the sum of some adapters, each times its weight."""
    return [(adapter_of(use.folder), times * use.weight) for use in uses if use is not None]


@dataclass(frozen=True)
class Engine:
    """An engine that answers several requests. By default, earlier requests have no effect."""

    sum: Callable[[Moment], Sum | None] = lambda m: added(m.now)  # the adapters it adds; None for the right ones
    cached: Callable[[Moment], Sequence[Use | None]] = lambda m: ()  # the adapters of cached keys and values, if any
    order: Callable[[Sequence[Use | None]], Sequence[int]] | None = None  # the prompts whose answers a batch gets
    generated: Callable[[Moment], Sum | None] = lambda m: None  # the sum for generated tokens; None for `sum`
    within: Callable[[Moment], Sum | None] = lambda m: None  # the sum within a prompt; None for `sum`
    late: bool = False  # whether its answers within a prompt are one token late


def of_case(flag: str, parts: Parts, count: int = 1) -> Wrong:
    """Return the row of a bug that shows in cases too, with its sentence and source from there, and other parts."""
    return replace(next(bug for bug in MISREADINGS if bug.flag == flag), parts=parts, count=count)


def _weighted(use: Use | None, weight: Callable[[float], float]) -> Sum | None:
    return None if use is None else added(replace(use, weight=weight(use.weight)))


def _last_weight(m: Moment) -> Sum | None:
    return _weighted(m.now, lambda weight: m.of_this_name[-1].weight) if m.of_this_name else None


def _product(m: Moment) -> Sum | None:
    return _weighted(m.now, lambda weight: weight * math.prod(use.weight for use in m.of_this_name))


def _old_scaling(m: Moment) -> Sum | None:
    now, old = m.now, m.namesake
    if now is None or old is None:
        return None
    return [(replace(adapter_of(now.folder), config=adapter_of(old.folder).config), now.weight)]


def _no_patterns(m: Moment) -> Sum | None:
    if m.now is None or not m.of_this_name or m.of_this_name[-1].folder == m.now.folder:
        return None
    given = adapter_of(m.now.folder)
    return [(replace(given, config={**given.config, "rank_pattern": {}, "alpha_pattern": {}}), m.now.weight)]


def _old_modules(m: Moment) -> Sum | None:
    if m.now is None or not m.of_this_name:
        return None
    now, old = m.now, m.of_this_name[-1]
    new, given = adapter_of(now.folder), adapter_of(old.folder)
    modules = {path: module for path, module in given.modules.items() if path not in new.modules}
    return [(new, now.weight), (replace(given, modules=modules), old.weight)]


def _union(m: Moment) -> Sum:
    return added(*{(use.name, use.folder): use for use in m.changes}.values())


def _name(use: Use | None) -> str:
    return "" if use is None else use.name


def _sorted(m: Moment) -> Sum:
    return added(sorted(m.batch, key=_name)[m.batch.index(m.now)])


def _in_the_batch(m: Moment) -> list[Use]:
    return [use for use in m.batch if use is not None]


def _without_head(m: Moment) -> Sum | None:
    if m.now is None:
        return None
    given = adapter_of(m.now.folder)
    modules = {path: module for path, module in given.modules.items() if path != HEAD_PATH}
    return [(replace(given, modules=modules), m.now.weight)]


def _mixed(m: Moment) -> bool:
    return len(set(m.batch)) > 1


# fmt: off
LEFTOVERS: Sequence[Wrong] = (
    # the names of adapters
    Wrong("the-adapter-that-had-this-name-answers",
          "the adapter that had this name before answers: its weights are kept by the name alone",
          {"sum": lambda m: added(m.namesake) if m.namesake else None}, source="huggingface/peft #3581"),
    Wrong("the-scaling-is-that-of-the-adapter-that-had-this-name",
          "the scaling is that of the adapter that had this name before: the factors are new, and alpha is not",
          {"sum": _old_scaling}, source="huggingface/peft #3581"),
    Wrong("patterns-are-dropped-where-an-adapter-is-swapped-in",
          "rank_pattern and alpha_pattern are dropped where an adapter takes the place of another",
          {"sum": _no_patterns}, source="peft 0.21.2"),
    Wrong("modules-of-the-adapter-that-had-this-name-stay-on",
          "modules that this adapter lacks keep the update of the adapter that had its name before",
          {"sum": _old_modules}),
    Wrong("keys-and-values-are-those-of-the-name",
          "the prompt's keys and values are those of the adapter that had this name before: they are kept by the "
          "tokens and the name",
          {"cached": lambda m: [m.namesake] if m.namesake else []}, source="vllm-project/vllm #30931"),
    # the scales of requests
    Wrong("the-scale-is-ignored", "the scale of a request is ignored: the update is added once",
          {"sum": lambda m: _weighted(m.now, lambda weight: 1.0)}),
    Wrong("the-scale-of-the-request-before-stays", "the scale of the request before stays", {"sum": _last_weight}),
    Wrong("the-first-scale-stays", "the scale of the first request stays",
          {"sum": lambda m: _weighted(m.now, lambda weight: m.of_this_name[0].weight) if m.of_this_name else None}),
    Wrong("the-scales-of-requests-are-multiplied",
          "the scale of a request is multiplied onto those of the requests before", {"sum": _product}),
    Wrong("the-scale-acts-squared", "the scale of a request goes into both factors: it acts squared",
          {"sum": lambda m: _weighted(m.now, lambda weight: weight * weight)}),
    # batches
    Wrong("the-first-adapter-of-a-batch-is-taken-for-all", "the adapter of a batch's first prompt is taken for all",
          {"sum": lambda m: added(m.batch[0]) if _mixed(m) else None}),
    Wrong("the-last-adapter-of-a-batch-is-taken-for-all", "the adapter of a batch's last prompt is taken for all",
          {"sum": lambda m: added(m.batch[-1]) if _mixed(m) else None}),
    Wrong("prompts-without-an-adapter-get-the-first-of-the-batch",
          "prompts without an adapter get the first one of their batch",
          {"sum": lambda m: added(m.now or _in_the_batch(m)[0]) if _mixed(m) else None}),
    Wrong("prompts-without-an-adapter-get-the-last-of-the-batch",
          "prompts without an adapter get the last one of their batch",
          {"sum": lambda m: added(m.now or _in_the_batch(m)[-1]) if _mixed(m) else None}),
    Wrong("all-adapters-of-a-batch-are-added-to-each-prompt", "each prompt of a batch gets all its adapters",
          {"sum": lambda m: added(*_in_the_batch(m)) if _mixed(m) else None}),
    Wrong("the-adapters-of-a-batch-are-sorted-and-its-prompts-are-not",
          "the adapters of a batch are brought into another order, by their names, and its prompts are not",
          {"sum": lambda m: _sorted(m) if _mixed(m) else None}),
    Wrong("the-answers-of-a-batch-are-sorted-by-their-adapters",
          "the prompts of a batch are sorted by their adapters, and the answers are not put back",
          {"order": lambda batch: sorted(range(len(batch)), key=lambda j: _name(batch[j]))}),
    Wrong("each-prompt-of-a-batch-gets-the-next-ones-adapter", "each prompt of a batch gets the next one's adapter",
          {"sum": lambda m: added(m.batch[(m.batch.index(m.now) + 1) % len(m.batch)]) if _mixed(m) else None}),
    Wrong("each-prompt-of-a-batch-gets-the-adapter-before",
          "each prompt of a batch gets the adapter of the prompt before",
          {"sum": lambda m: added(m.batch[m.batch.index(m.now) - 1]) if _mixed(m) else None}),
    # adapters that are added and not removed
    Wrong("what-was-added-stays-in-the-weights",
          "each adapter stays in the weights when another is asked for, or none: they add up, one as often as it "
          "is switched on",
          {"sum": lambda m: added(*m.changes)}, source="leejet/stable-diffusion.cpp #1307"),
    Wrong("every-adapter-so-far-is-applied", "every adapter that was asked for so far is applied",
          {"sum": _union}, count=2),
    Wrong("the-first-adapter-answers-always",
          "the first adapter answers always: its weights are constants of what was compiled",
          {"sum": lambda m: added(m.first) if m.first else None}, source="Goekdeniz-Guelmez/mlx-lm-lora #50"),
    of_case("the-previous-adapter-answers", {"sum": lambda m: added(m.last) if m.before else None}, count=2),
    of_case("the-previous-adapter-stays-on", {"sum": lambda m: added(m.last, m.now)}, count=2),
    Wrong("the-previous-adapter-is-taken-off-twice",
          "the previous adapter is subtracted, where it was no longer in the weights",
          {"sum": lambda m: added(m.now) + added(m.last, times=-1.0)}),
    Wrong("an-earlier-adapter-answers", "an earlier adapter answers, neither this request's nor the previous one",
          {"sum": lambda m: added(m.earlier) if m.earlier else None}),
    Wrong("an-earlier-adapter-stays-on", "an earlier adapter stays on, beside this request's",
          {"sum": lambda m: added(m.earlier, m.now) if m.earlier else None}),
    # cached keys and values
    Wrong("keys-and-values-are-the-first-requests",
          "the prompt's keys and values are those of the first request that had its tokens, under its adapter",
          {"cached": lambda m: m.before[:1]},
          source="ggml-org/llama.cpp #26207, vllm-project/vllm #42125, LMCache/LMCache #2961"),
    of_case("keys-and-values-are-the-previous-adapters", {"cached": lambda m: m.before[-1:]}),
    # adapters that are loaded but not requested
    Wrong("adapters-that-are-loaded-are-applied-to-requests-without-one",
          "a request without an adapter gets all that are loaded",
          {"sum": lambda m: None if m.now else added(*m.loaded)}, source="ggml-org/llama.cpp #28674"),
    Wrong("the-adapter-loaded-last-is-applied-to-requests-without-one",
          "a request without an adapter gets the one that was loaded last",
          {"sum": lambda m: None if m.now else added(*m.loaded[-1:])}, source="huggingface/peft #430"),
    Wrong("adapters-that-are-loaded-are-applied-to-every-request",
          "every request gets all adapters that are loaded: each is added to the weights when it is loaded",
          {"sum": lambda m: added(*dict.fromkeys([*m.loaded, m.now]))}),
    # tokens after a prompt and within it
    Wrong("generated-tokens-are-the-bases", "the adapter acts on the prompt, and not on the tokens that follow it",
          {"generated": lambda m: []}),
    Wrong("generated-tokens-take-the-first-adapter-of-the-batch",
          "the tokens that follow a batch's prompts are all computed with the adapter of its first prompt",
          {"generated": lambda m: added(m.batch[0])}),
    Wrong("log-probabilities-within-the-prompt-are-the-bases",
          "log-probabilities within a prompt are the base's", {"within": lambda m: []}),
    Wrong("log-probabilities-within-the-prompt-lack-the-heads-adapter",
          "log-probabilities within a prompt lack the adapter of lm_head, and those of generated tokens have it",
          {"within": _without_head}, source="vllm-project/vllm #51594"),
    Wrong("log-probabilities-within-the-prompt-take-the-first-adapter-of-the-batch",
          "log-probabilities within a batch's prompts are all computed with the adapter of its first prompt",
          {"within": lambda m: added(m.batch[0])}, source="vllm-project/vllm #16668"),
    Wrong("log-probabilities-within-the-prompt-are-one-token-late",
          "log-probabilities within a prompt are one token late: after a token stands what is after the next one",
          {"late": True}, source="AI-Hypercomputer/maxtext #2103"),
    # the adapter itself
    of_case("the-adapter-is-not-applied", {"sum": lambda m: []}),
    of_case("the-update-is-added-twice", {"sum": lambda m: added(m.now, m.now)}),
    of_case("the-update-is-subtracted", {"sum": lambda m: added(m.now, times=-1.0)}),
)
# fmt: on

ROUNDED = Wrong(
    "earlier-requests-leave-rounding",
    "earlier requests leave rounding: an adapter was merged or taken out in a lower precision, or a cache is in one",
    {},
    source="huggingface/trl #6688",
)
"""The only bug without a signature: a request is right only in a lower precision, and an earlier one was right."""
