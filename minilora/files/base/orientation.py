"""Which way round a weight lies in a checkpoint: (out, in), as in a Linear, or (in, out), as in a Conv1D of GPT-2.

An adapter's configuration has one `fan_in_fan_out` for all of its modules. A model with both kinds of layer needs one
for each, and PEFT, which sees the layers, gets by without. A file shows the shape alone, and the shape of a square
weight says nothing. What the base shows of its neighbours does: a bias as long as one side of a weight that is not
square, or an adapter's factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ...checks import FileRefused, short
from ..peft.adapterfolder import AdapterFolder
from ..tensors import Weights

LAYOUTS = ("out-in", "in-out")
"""The sides of a weight in the order of its shape: of a Linear, and of a Conv1D."""


def layouts_of(
    names: Mapping[str, str], folder: AdapterFolder, base: Weights, layouts: Mapping[str, str] | None
) -> dict[str, str]:
    """Return how each adapted module's weight lies.

    Parameters
    ----------
    names : mapping of str to str
        The base's name of the weight, by module.
    folder : AdapterFolder
        The adapter, whose flag is the answer unless the base speaks against it.
    base : Weights
        The checkpoint.
    layouts : mapping of str to str, optional
        What the caller says, by a module's path or its end.

    Raises
    ------
    ValueError, TypeError
        If `layouts` names no module, or another layout.
    FileRefused
        If a square weight may lie otherwise than the adapter's flag says.
    """
    layout_of = _said_of(list(names), layouts)
    flag = LAYOUTS[folder.config.fan_in_fan_out]
    square = [m for m, name in names.items() if m not in layout_of and len(set(base.spec(name).shape)) == 1]
    if square:
        evidence = _Evidence(names, folder, base)
        for module in square:
            _check_square(module, names[module], flag, evidence, base)
    return {module: layout_of.get(module, flag) for module in names}


def _said_of(modules: list[str], layouts: Mapping[str, str] | None) -> dict[str, str]:
    """Return what the caller says of each module; the longest name decides."""
    if layouts is None:
        return {}
    if not isinstance(layouts, Mapping):
        raise TypeError(f"layouts must be a dict of module names and layouts, got {layouts!r}")
    layout_of: dict[str, str] = {}
    for name in layouts:
        if not isinstance(name, str):
            raise TypeError(f"layouts has the key {name!r}, expected the name of a module")
    for name in sorted(layouts, key=len):
        if layouts[name] not in LAYOUTS:
            raise ValueError(f"layouts[{name!r}] must be 'out-in' or 'in-out', got {layouts[name]!r}")
        named = [module for module in modules if module == name or module.endswith(f".{name}")]
        if not named:
            has = short(modules[0]) if modules else "no linear layer, and only their weights lie in two ways"
            raise ValueError(f"layouts has {name!r}, which is no module of the adapter; it has {has}")
        layout_of |= dict.fromkeys(named, layouts[name])
    return layout_of


class _Evidence:
    """The layouts that weights which are not square show, by what their modules' paths share."""

    def __init__(self, names: Mapping[str, str], folder: AdapterFolder, base: Weights) -> None:
        self.by_last: dict[str, set[str]] = defaultdict(set)  # by the last name of a module's path
        self.by_parent: dict[str, set[str]] = defaultdict(set)  # by all before the last name
        self.anywhere: set[str] = set()
        self.adapted = len(names)  # modules
        self.kinds = {_parts(name)[1] for name in names.values()}  # the adapted modules' last names
        outputs = {name: folder.shapes(module)[0] for module, name in names.items()}
        for name in base.holder:
            shape, bias = base.spec(name).shape, name.removesuffix("weight") + "bias"
            if not name.endswith(".weight") or len(shape) != 2 or shape[0] == shape[1]:
                continue
            out = outputs.get(name)
            if out is None and bias in base.holder and len(base.spec(bias).shape) == 1:
                (out,) = base.spec(bias).shape
            if out in shape:
                layout = LAYOUTS[shape.index(out)]
                parent, last = _parts(name)
                self.by_last[last].add(layout)
                self.by_parent[parent].add(layout)
                self.anywhere.add(layout)


def _parts(name: str) -> tuple[str, str]:
    """Split the name of a weight: "h.0.attn.c_proj.weight" is "c_proj" of "h.0.attn"."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return parent, last


def _check_square(module: str, name: str, flag: str, evidence: _Evidence, base: Weights) -> None:
    """Refuse a square weight where the base speaks against the flag, or a flag for Conv1D stands alone.

    Most models hold no Conv1D, and their square weights merge without a question. A flag for Conv1D comes from one
    module of the adapter: it holds for that one, for modules of its last name, and where the base confirms it.
    """
    parent, last = _parts(name)
    alike = evidence.by_last.get(last, set())
    near = alike | evidence.by_parent.get(parent, set())
    if flag == "out-in":
        doubtful = "in-out" in near or (not alike and "in-out" in evidence.anywhere)
    elif evidence.adapted == 1:
        doubtful = "out-in" in alike
    else:
        doubtful = "out-in" in near or (not alike and len(evidence.kinds) > 1)
    if doubtful:
        shown = sorted(near or evidence.anywhere) or ["nothing"]
        raise FileRefused(
            base.holder[name].path,
            f"{short(name)} is square: its shape does not show whether it is stored (out, in) or (in, out). "
            f"The adapter says fan_in_fan_out = {str(flag == 'in-out').lower()} for all its modules; the base shows "
            f"{' and '.join(shown)} around it. Say which it is: layouts={{{short(module)}: 'out-in'}} or 'in-out'; on "
            f"the command line, --layout {short(module)[1:-1]}=out-in",
        )
