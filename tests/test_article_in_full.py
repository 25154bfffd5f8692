"""The article at its full length (`pytest -m full`): its figures, and the README's, within their spread."""

import re

import numpy as np
import pytest

from minilora import article
from minilora.article import ARTICLE_BASE_LOSSES, ARTICLE_LORA_LOSSES

from .packaging.test_readme import is_excerpt, under

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def result():
    return article.run()


def test_the_base_learns_as_in_the_article(result):
    losses = result.base_history.losses
    np.testing.assert_allclose(losses[:6], ARTICLE_BASE_LOSSES[:6], rtol=0.03)
    assert losses[-1] < 0.002


def test_the_adapter_learns_as_in_the_article(result):
    """Within a factor of 2: the start of A alone moves it by a third from seed to seed."""
    losses = result.lora_history.losses
    np.testing.assert_allclose(np.log2(losses[:5]), np.log2(ARTICLE_LORA_LOSSES[:5]), atol=1)
    assert losses[-1] < 0.02


def test_the_base_fails_on_the_new_task_as_expected(result):
    """Each row's error is a sum of 1,001 Gaussians, the same for all outputs: 1001 (1 +- sqrt(2 / 10000)), 3 sigma."""
    assert result.shifted_loss == pytest.approx(1001, rel=0.045)


def test_what_is_learned_is_a_matrix_of_ones(result):
    assert np.abs(result.delta - 1).max() < 0.05


def test_the_merged_layer_is_as_good_as_the_adapted_one(result):
    assert result.merged_loss == pytest.approx(result.lora_history.losses[-1], rel=1e-3)


def numbers(line: str) -> np.ndarray:
    """Return every number of a line but the seconds, which belong to the machine."""
    return np.array(
        re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", re.sub(r"\([\d.]+ s\)|CPU \(.*?\)|,(?=\d)", "", line)), float
    )


def alike(line: str, other: str) -> bool:
    """Another BLAS rounds differently, which training magnifies: a few percent at the end of it."""
    words, others = (re.sub(r"[\d.e-]+", "#", text).split() for text in (line, other))
    return words == others and np.allclose(numbers(line), numbers(other), rtol=0.05, atol=1e-6)


def test_the_readme_shows_this_run(result):
    shown = under("python -m minilora article")
    assert len(shown.splitlines()) <= 12
    assert is_excerpt(shown, result.told, alike)
