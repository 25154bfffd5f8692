"""``python -m minilora.conformance MODULE[:OBJECT]``: the command ``minilora conformance`` under its first name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands import conformance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 where a claim is broken, and 2 where nothing could be checked."""
    parser = argparse.ArgumentParser("python -m minilora.conformance", description=conformance.DESCRIPTION)
    conformance.add_arguments(parser)
    return conformance.run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
