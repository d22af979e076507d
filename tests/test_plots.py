import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ipywidgets import IntSlider

from mmfm_utils import plots

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


def test_band_shows_mean_and_interval():
    examples = np.random.default_rng(0).normal(2, 1, size=(100, 5))
    _, ax = plt.subplots()
    plots.band(ax, range(5), examples, "ours", "main")
    assert ax.lines[0].get_ydata() == pytest.approx(examples.mean(0))
    low, high = ax.collections[0].get_paths()[0].get_extents().intervaly
    assert low < examples.mean(0).min() < examples.mean(0).max() < high


def test_a_widget_has_a_static_twin_and_follows_its_controls(monkeypatch):
    displayed, asked = [], []
    monkeypatch.setattr(plots, "display", displayed.append)

    def draw(layer):
        asked.append(layer)
        return plt.figure()

    control = IntSlider(3, 0, 9)
    plots.explore(draw, layer=control)
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
