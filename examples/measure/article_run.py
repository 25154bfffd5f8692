"""A run of the article's experiment at its full size, some minutes.

``python examples/measure/article_run.py`` writes docs/recordings/article-run.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from written import RECORDINGS, keep

from minilora import article

RESULT = RECORDINGS / "article-run.json"


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


if __name__ == "__main__":
    keep(RESULT, __file__, record(article.run(progress=True)))
