import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ipywidgets import IntSlider

from mmfm_utils import metrics, plots

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def clean():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # another test may have set the collection's style
        matplotlib.use("Agg")
        yield
        plt.close("all")


def test_effects_are_centred_on_zero_and_attention_starts_there():
    _, ax = plt.subplots()
    shown = plots.heatmap(ax, np.array([[0.2, -0.1]]), "layer", "head")
    assert shown.norm.vmin == -shown.norm.vmax == -0.2
    shown = plots.heatmap(ax, np.array([[0.2, 0.1]]), "layer", "head", effect=False)
    assert (shown.norm.vmin, shown.norm.vmax) == (0, 0.2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "head")
    plots.heatmap(ax, np.zeros((2, 2)), "x", "y")  # nothing to show is no error


def test_gallery_shows_every_picture_once():
    images = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(7)]
    figure = plots.gallery(images, [f"picture {i}" for i in range(7)], columns=3, title="seven")
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == [f"picture {i}" for i in range(7)]


def test_overlay_stretches_the_map_over_the_picture():
    _, ax = plt.subplots()
    plots.overlay(ax, np.zeros((64, 64, 3), dtype=np.uint8), np.eye(8))
    picture, values = ax.images
    assert list(picture.get_extent()) == list(values.get_extent()) == [0, 64, 64, 0]


def band_of(examples):
    """The line and the two edges of the band that are drawn: (x,) each."""
    _, ax = plt.subplots()
    plots.band(ax, range(examples.shape[1]), examples, "ours", "main")
    line = ax.lines[0].get_ydata()
    vertices = ax.collections[0].get_paths()[0].vertices if ax.collections[0].get_paths() else np.empty((0, 2))
    ends = [vertices[vertices[:, 0] == x, 1] for x in range(len(line))]
    return line, *(np.array([edge(y) if len(y) else np.nan for y in ends]) for edge in (np.min, np.max))


def test_band_shows_mean_and_interval():
    examples = np.random.default_rng(0).normal(2, 1, size=(100, 5))
    mean, low, high = band_of(examples)
    assert mean == pytest.approx(examples.mean(0))
    assert np.stack([low, high]) == pytest.approx(np.stack(metrics.interval(examples)))


def test_a_band_of_shares_stays_within_0_and_1():
    examples = (np.random.default_rng(0).random((14, 6)) < [0, 0.05, 0.3, 0.9, 0.95, 1]).astype(float)
    mean, low, high = band_of(examples)
    assert (0 <= low).all() and (high <= 1).all() and (high - low > 0.1).all()
    assert low[0] == 0 < high[0] and low[-1] < 1 == high[-1]  # also where all examples agree
    at = band_of(examples > 0)  # truth values, too
    assert np.stack(at) == pytest.approx(np.stack([mean, low, high]))


def test_there_is_no_band_where_there_is_no_interval():
    examples = np.random.default_rng(0).normal(2, 1, size=(100, 5))
    examples[3, 4] = np.nan
    _, low, high = band_of(examples)
    assert np.isfinite(low[:4]).all() and np.isnan([low[4], high[4]]).all()
    line, low, _ = band_of(examples[:1])
    assert line == pytest.approx(examples[0]) and np.isnan(low).all()


def test_bars_show_means_and_intervals():
    rng = np.random.default_rng(0)
    groups = {"all": np.ones(20), "some": rng.random(12) < 0.4, "real": rng.exponential(size=30)}
    _, ax = plt.subplots()
    for role, shift in (("main", -0.2), ("control", 0.2)):
        shown = plots.bars(ax, groups, role, f"these {role}", shift, 0.4)
        assert [bar.get_height() for bar in shown] == pytest.approx([np.mean(v) for v in groups.values()])
        assert [bar.get_x() + bar.get_width() / 2 for bar in shown] == pytest.approx([i + shift for i in range(3)])
        whiskers = [segment[:, 1] for segment in shown.errorbar.lines[2][0].get_segments()]
        assert np.array(whiskers) == pytest.approx(np.array([metrics.interval(v) for v in groups.values()]))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(groups)
    assert ax.get_legend_handles_labels()[1] == ["these main", "these control"]


def test_a_widget_has_a_static_twin_and_follows_its_controls(monkeypatch):
    displayed, asked = [], []
    monkeypatch.setattr(plots, "display", displayed.append)

    def draw(layer):
        asked.append(layer)
        return plt.figure()

    control = IntSlider(3, 0, 9)
    plots.explore(draw, layer=control)
    assert control.continuous_update is False  # or one drag would draw a figure at every step
    assert control.description == "layer"  # or the reader would not know what it moves
    assert asked == [3] and isinstance(displayed[0], plt.Figure)  # the twin, before anything is touched
    control.value = 7
    assert asked == [3, 7] and len(displayed) == 3
    assert not plt.get_fignums()  # nothing is left open


def test_an_error_while_redrawing_is_shown_in_the_place_of_the_picture(monkeypatch):
    caught = []
    monkeypatch.setattr(plots, "display", lambda _: None)
    monkeypatch.setattr(plots.widgets.Output, "__exit__", lambda place, kind, *_: caught.append(kind) or True)
    control = IntSlider(1, 0, 9)
    plots.explore(lambda layer: 1 / layer and plt.figure(), layer=control)
    control.value = 0
    assert caught[-1] is ZeroDivisionError
