"""``python -m minilora.conformance`` is ``minilora conformance``."""

import sys

from .. import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return cli.main(["conformance", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
