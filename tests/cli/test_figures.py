"""What a picture shows: the numbers behind its lines, bars and cells, at a scaling and a rank that are not 1."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from minilora import LoRA, article
from minilora.cli.figures import (
    check_figure_path,
    draw_losses,
    draw_spectrum,
    new_figure,
    plot_adapter,
    plot_article,
    plot_learning,
)
from minilora.files.inspection import LayerSummary
from minilora.files.peft import AdaptedModule, Form

from ..support.compare import same_but_rounding


@pytest.fixture(autouse=True, scope="module")
def style():
    """That of matplotlib: the site's pictures, which other tests import, have their own."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@pytest.fixture(scope="module")
def result():
    found = article.run(n=64, in_features=6, out_features=5, batch_size=8, epochs=20, rank=2, alpha=6)
    assert found.adapter.scaling == 3
    return found


@pytest.fixture(scope="module")
def figure(result):
    return plot_article(result)


def axes():
    return new_figure(4, 4).subplots()


def test_each_loss_curve_has_its_own_points_of_the_article(result):
    drawn = axes()
    draw_losses(drawn, result)
    base, article_base, lora, article_lora, _ = drawn.get_lines()
    assert list(base.get_ydata()) == result.base_history.losses
    assert list(lora.get_ydata()) == result.lora_history.losses
    assert tuple(article_base.get_ydata()) == article.ARTICLE_BASE_LOSSES
    assert tuple(article_lora.get_ydata()) == article.ARTICLE_LORA_LOSSES
    for line in (article_base, article_lora):
        assert tuple(line.get_xdata()) == article.ARTICLE_EPOCHS


def test_the_bars_are_the_singular_values_of_the_change(result):
    draw_spectrum(drawn := axes(), result)
    heights = [bar.get_height() for bar in drawn.patches]
    np.testing.assert_allclose(heights[:2], np.linalg.svd(result.delta, compute_uv=False)[:2], rtol=1e-5)
    assert max(heights[2:]) < 1e-14 * heights[0]  # computed in float64, whatever the factors are
    mark, rounding = drawn.get_lines()
    np.testing.assert_allclose(mark.get_ydata(), [30**0.5], rtol=1e-15)
    np.testing.assert_allclose(rounding.get_ydata(), 30**0.5 * 2**-52, rtol=1e-12)
    louder = LoRA(result.adapter.lora_A, result.adapter.lora_B, 12)  # twice the scaling
    draw_spectrum(drawn := axes(), replace(result, adapter=louder))
    assert drawn.patches[0].get_height() == pytest.approx(2 * heights[0], rel=1e-12)


def test_the_change_is_drawn_around_the_truth(figure, result):
    """Its colours end as far above 1 as below it, where the entry is that is furthest from 1."""
    image = figure.axes[1].get_images()[0]
    np.testing.assert_array_equal(image.get_array(), result.delta)
    low, high = image.get_clim()
    assert low + high == pytest.approx(2, abs=1e-12)
    assert high - 1 == pytest.approx(np.abs(result.delta - 1).max(), rel=1e-12)


def test_a_picture_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "nowhere"):
        with pytest.raises(ValueError, match=f"there is no folder '.*{folder}'"):
            check_figure_path(tmp_path / folder / "p.png")
    check_figure_path(tmp_path / "p.png")


@pytest.mark.long
def test_a_figure_is_a_picture_where_ipython_shows_it(figure, tmp_path):
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    data, _ = formatters.DisplayFormatter().format(figure)
    figure.savefig(tmp_path / "saved.png")
    for png in (data["image/png"], (tmp_path / "saved.png").read_bytes()):
        assert png.startswith(b"\x89PNG")
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        assert (width, height) == tuple(figure.get_size_inches() * figure.dpi)


def test_a_bar_is_never_below_what_is_shown(result):
    """A log scale has no place for the zeros beyond the rank."""
    flat = LoRA(np.eye(4, 12), np.zeros((11, 4)), 1)
    draw_spectrum(drawn := axes(), replace(result, adapter=flat))
    assert [bar.get_height() for bar in drawn.patches] == [drawn.get_ylim()[0]] * 10
    assert list(drawn.get_xticks()) == list(range(1, 11))


def summary(module, shares, norm):
    shares = np.array(shares)
    adapted = AdaptedModule(Form(), (4, 3), rank=len(shares), alpha=1.0, use_rslora=False, full_norm=False)
    return LayerSummary(module, adapted, parameters=7, norm=norm, singular_values=shares, shares=shares)


def test_each_cell_is_a_share_over_its_number():
    summaries = [summary("a.fc", [0.7, 0.2, 0.1], 2.5), summary("b.fc", [0.9, 0.1], 4.0)]
    norms, picture = plot_adapter(summaries).axes[:2]
    (image,) = picture.get_images()
    np.testing.assert_allclose(image.get_array().filled(np.nan), [[70, 20, 10], [90, 10, np.nan]], rtol=1e-12)
    assert image.get_clim() == (0, 100)
    assert [bar.get_width() for bar in norms.patches] == [2.5, 4.0]
    assert [label.get_text() for label in norms.get_yticklabels()] == ["a.fc", "b.fc"]
    left, right, bottom, top = image.get_extent()
    assert (left, right) == (0.5, 3.5)  # the third singular value stands over 3
    assert (top, bottom) == (-0.5, 1.5)
    assert picture.get_ylim() == norms.get_ylim() == (bottom, top)  # the first layer is above
    assert [bar.get_y() + bar.get_height() / 2 for bar in norms.patches] == [0, 1]


@pytest.mark.parametrize(("count", "height"), [(1, 3), (20, 6.5), pytest.param(1000, 30, marks=pytest.mark.long)])
def test_a_picture_grows_with_the_layers_to_a_size(count, height):
    figure = plot_adapter([summary("fc", [0.5, 0.5], 1.0)] * count)
    assert figure.get_figheight() == height
    picture, bar = figure.axes[1:]
    assert all(number == round(number) for number in picture.get_xticks())
    assert bar.get_ylabel() == "% of the squared norm"


def test_of_many_layers_every_second_has_its_name():
    summaries = [summary(f"layer{i}", [1.0], 1.0) for i in range(200)]
    norms = plot_adapter(summaries).axes[0]
    assert list(norms.get_yticks()) == list(range(0, 200, 2))
    assert [label.get_text() for label in norms.get_yticklabels()] == [f"layer{i}" for i in range(0, 200, 2)]


def test_a_step_that_was_not_measured_has_no_point():
    means, held_out = plot_learning([(0, np.nan, 3.0), (5, 2.5, np.nan), (9, 2.0, 2.8)]).axes[0].get_lines()
    np.testing.assert_array_equal(held_out.get_xydata(), [[0, 3.0], [9, 2.8]])
    np.testing.assert_array_equal(means.get_xdata(), [0.5, 5.5, 5.5, 5.5, 9.5, 9.5])
    np.testing.assert_array_equal(means.get_ydata(), [2.5, 2.5, np.nan, 2.0, 2.0, np.nan])


def test_a_notebook_gets_a_picture_of_a_figure():
    """Where the figure is a cell's last line: IPython asks for this."""
    assert new_figure(1, 1)._repr_png_().startswith(b"\x89PNG")


def described(figure):
    """Yield all that a figure shows but for its numbers, axes after axes."""
    yield f"{figure.get_size_inches().tolist()} inches, {figure.dpi} dots each, {figure.get_layout_engine()!r:.40}"
    for drawn in figure.axes:
        legend = [text.get_text() for text in drawn.get_legend().get_texts()] if drawn.get_legend() else []
        limits = [f"{limit:.2g}" for limit in (*drawn.get_xlim(), *drawn.get_ylim())]
        grid = [(line.get_visible(), line.get_alpha()) for line in drawn.get_xgridlines() + drawn.get_ygridlines()]
        yield f"{drawn.get_title()!r}: {drawn.get_xlabel()!r}, {drawn.get_ylabel()!r}, {legend}"
        yield f"  grid {sorted({*grid}, key=str)}"
        yield f"  {drawn.get_xscale()} {drawn.get_yscale()} {limits} aspect {drawn.get_aspect()}"
        for line in drawn.get_lines():
            marker = line.get_marker(), line.get_markersize(), line.get_markeredgewidth(), line.get_fillstyle()
            look = to_hex(line.get_color()), line.get_linestyle(), line.get_linewidth(), line.get_alpha()
            yield f"  line {line.get_label()!r}: {look} {marker} {len(line.get_xdata())} points"
        for container in drawn.containers:
            yield f"  bars {container.get_label()!r}: { {to_hex(bar.get_facecolor()) for bar in container} }"
        for image in drawn.get_images():
            yield f"  image {image.cmap.name} {image.get_interpolation()} {image.origin}"


def test_each_figure_looks_as_it_did(result, request):
    """Losses and singular values on log scales, a matrix as it is written: `--approve` writes it anew."""
    summaries = [summary("a.fc", [0.7, 0.2, 0.1], 2.5), summary("b.fc", [0.9, 0.1], 4.0)]
    rows = [(0, np.nan, 3.0), (5, 2.5, np.nan), (9, 2.0, 2.8)]
    figures = {
        "article": plot_article(result),
        "adapter": plot_adapter(summaries),
        "learning": plot_learning(rows, [(1, 3.0), (2, 2.0)]),
    }
    found = "".join(f"{line}\n" for name, one in figures.items() for line in [name, *described(one)])
    file = Path(__file__).with_name("figures.txt")
    if request.config.getoption("approve"):
        file.write_text(found, encoding="utf-8")
    approved = file.read_text(encoding="utf-8")
    if not same_but_rounding(found, approved):
        assert found == approved  # shows where
