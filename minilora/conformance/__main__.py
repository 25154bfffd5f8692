"""``python -m minilora.conformance`` is ``minilora conformance``, which runs the code of the file that is named.

It runs in a child process, which is no sandbox: the code can do what the user can.
"""

import sys

from .. import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return cli.main(["conformance", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
