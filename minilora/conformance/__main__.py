"""``python -m minilora.conformance`` is the same as ``minilora conformance``: it runs the code in the given file.

The code runs in a child process, which is not a sandbox: it can do anything that the user can.
"""

import sys

from .. import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return cli.main(["conformance", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
