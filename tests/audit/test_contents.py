"""Which modules are targets, as PEFT 0.21.2 answered: `tests/peers/test_audit_peers.py` asks the PEFT that is there."""

import json
from pathlib import Path

import pytest

from minilora.audit.contents import are_targets
from minilora.files.patterns import within_time

ASKED = json.loads((Path(__file__).parent / "peft_targets.json").read_text())


@pytest.mark.parametrize("row", ASKED["answers"], ids=lambda row: json.dumps(row["config"])[:80])
def test_the_targets_are_those_of_peft(row):
    with within_time():
        found = are_targets(row["config"], ASKED["paths"])
    assert [path for path, is_target in zip(ASKED["paths"], found, strict=True) if is_target] == row["targets"]


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_an_expression_that_is_none_is_refused_by_its_key(key):
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    config |= {key: "(" if key in ("target_modules", "exclude_modules") else ["("]}
    with pytest.raises(ValueError, match=rf"{key}: .*is not a regular expression"):
        are_targets(config, ASKED["paths"])
