from ..support.language import folder  # noqa: F401  (a fixture)
