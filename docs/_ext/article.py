"""A run of the article's experiment at its full size, some minutes.

``python docs/_ext/article.py`` writes docs/recordings/article-run.json.

`tests/test_article_in_full.py` compares a fresh run with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora import article

RESULT = Path(__file__).parent.parent / "recordings" / "article-run.json"


def record(result: article.ArticleResult) -> dict[str, Any]:
    """Return what the page shows of a run; JSON can hold it."""
    histories = {"base": result.base_history, "lora": result.lora_history}
    return {
        "settings": result.settings,
        "parameters": {
            "base": result.base.weight.size,
            "adapter": sum(p.size for p in result.adapter.trainable().values()),
        },
        "losses": {name: [float(loss) for loss in history.losses] for name, history in histories.items()},
        "epochs": [int(epoch) for epoch in result.base_history.epochs],
        "shifted": float(result.shifted_loss),
        "merged": float(result.merged_loss),
        "corner": np.round(result.delta[:5, :5].astype(float), 4).tolist(),
        "between": [float(result.delta.min()), float(result.delta.max())],
    }


def recorded() -> SimpleNamespace:
    """Return the recorded run, its parts named as in `article.ArticleResult`."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    histories = {
        f"{name}_history": SimpleNamespace(epochs=found["epochs"], losses=losses)
        for name, losses in found["losses"].items()
    }
    return SimpleNamespace(
        settings=found["settings"],
        parameters=found["parameters"],
        shifted_loss=found["shifted"],
        merged_loss=found["merged"],
        adapter=SimpleNamespace(rank=1),
        corner=np.array(found["corner"]),
        between=found["between"],
        **histories,
    )


if __name__ == "__main__":
    RESULT.write_text(json.dumps(record(article.run(progress=True)), indent=1) + "\n", encoding="utf-8")
