"""What is said of an adapter, as it was approved: in a file beside the tests that ask."""

import json

import pytest

from ..support.compare import same_but_rounding


@pytest.fixture(scope="module")
def approved(request):
    """Return what is approved, by a name and what is said now, which --approve takes for approved; the rest stays."""
    file = request.path.with_name(f"{request.path.stem.removeprefix('test_')}.json")
    anew = request.config.getoption("approve")
    texts = json.loads(file.read_text(encoding="utf-8"))

    def found(name, said):
        if anew:
            texts[name] = said
        told = texts.get(name)
        return said if same_but_rounding(json.dumps(told), json.dumps(said)) else told

    yield found
    if anew:
        file.write_text(json.dumps(texts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
