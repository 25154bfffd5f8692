"""A door: ``python -m minilora.conformance`` is ``minilora conformance``."""

from ..cli.conformance import main

if __name__ == "__main__":
    raise SystemExit(main())
