"""A door: ``python -m minilora.conformance`` is ``minilora conformance``."""

from ..commands.conformance import main

if __name__ == "__main__":
    raise SystemExit(main())
