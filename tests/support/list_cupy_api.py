"""Print the names and parameters of the installed CuPy as JSON: how cupy_api.json is made, on any machine.

``import cupy`` needs no GPU. Where the wheel is installed, run
``python tests/support/list_cupy_api.py > tests/support/cupy_api.json``.
"""

import inspect
import json
import re

import cupy

NAMESPACES = {
    "cupy": cupy,
    "cupy.ndarray": cupy.ndarray,
    "cupy.linalg": cupy.linalg,
    "cupy.cuda": cupy.cuda,
    "cupy.cuda.Device": cupy.cuda.Device,
    "cupy.cuda.runtime": cupy.cuda.runtime,
}


def parameters(member):
    """Return the parameter names of a function, or None where they are not known."""
    try:
        found = inspect.signature(member).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
            return None
        names = [parameter.name for parameter in found]
    except (TypeError, ValueError):
        # Compiled functions tell their signature in the docstring: "take(self, indices, axis=None) -> ndarray".
        head = re.match(r"[\w.]+\((.*?)\)(?: ->.*)?$", (member.__doc__ or "").split("\n")[0])
        if head is None:
            return None
        listed = [part.split("=")[0].split()[-1] for part in head[1].split(",") if part.strip()]
        names = [name.strip("*\\") for name in listed]
    return [name for name in names if name not in ("", "/", "self")]


def names_of(space):
    """Return the public names of a namespace with their parameters; constants and classes have none."""
    listed = {}
    for name in dir(space):
        member = getattr(space, name, None)
        operator = name.startswith("__") and space is cupy.ndarray
        if (name.startswith("_") and not operator) or inspect.ismodule(member):
            continue
        plain = not callable(member) or isinstance(member, type) or operator
        listed[name] = None if plain else parameters(member)
    return listed


if __name__ == "__main__":
    api = {title: names_of(space) for title, space in NAMESPACES.items()}
    api["cupy.cuda.runtime"] = {
        name: names for name, names in api["cupy.cuda.runtime"].items() if not name.startswith(("cuda", "CUDA"))
    }
    lines = ",\n".join(
        f"{json.dumps(title)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in names.items()) + "\n}"
        for title, names in api.items()
    )
    print(f'{{\n"version": {json.dumps(cupy.__version__)},\n{lines}\n}}')
