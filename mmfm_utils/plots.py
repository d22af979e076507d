"""One style for all figures, pictures with maps over them, and widgets with a static twin."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .metrics import interval

# Colour-blind safe (Okabe and Ito 2008), named by role so that a role looks the same in every notebook.
COLOUR = {
    "main": "#0072B2", "control": "#999999", "second": "#D55E00", "third": "#009E73", "fourth": "#CC79A7",
    "fifth": "#E69F00", "sixth": "#56B4E9",
}  # fmt: skip
EFFECT, ATTENTION = "RdBu_r", "viridis"  # diverging maps are centred on zero, sequential ones start there


def use_style() -> None:
    """Set the collection's matplotlib style for this notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10,
            "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "legend.frameon": False,
            "image.interpolation": "nearest",
            "axes.prop_cycle": plt.cycler(color=list(COLOUR.values())),
        }
    )  # fmt: skip


def picture(ax: Axes, image: np.ndarray, title: str = "") -> None:
    """Show one picture (height, width, 3) without axes."""
    ax.imshow(image)
    ax.set_title(textwrap.fill(title, 26), fontsize=9)
    ax.set_axis_off()


def gallery(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 6, title: str = "", size: float = 1.75
) -> Figure:
    """Pictures side by side, `columns` to a row, each under its title and `size` inches wide."""
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.25) * rows + 0.3 * bool(title)), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for index, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        picture(ax, image, titles[index] if index < len(titles) else "")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def heatmap(
    ax: Axes,
    values: np.ndarray,
    xlabel: str,
    ylabel: str,
    title: str = "",
    effect: bool = True,
    limit: float | None = None,
    unit: str = "",
):
    """A map (row, column); `effect` centres a diverging map on zero, otherwise a sequential one starts there."""
    limit = limit or float(np.abs(values).max()) or 1.0
    low, colours = (-limit, EFFECT) if effect else (0.0, ATTENTION)
    shown = ax.imshow(values, cmap=colours, vmin=low, vmax=limit, aspect="auto")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.grid(False)
    ax.figure.colorbar(shown, ax=ax, label=unit, shrink=0.85)
    return shown


def overlay(
    ax: Axes, image: np.ndarray, values: np.ndarray, title: str = "", effect: bool = True, limit: float | None = None
) -> None:
    """A picture in grey with a map of patches (row, column) over it; `limit` fixes the colour scale."""
    limit = limit or float(np.abs(values).max()) or 1.0
    side = image.shape[0]
    ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255, extent=(0, side, side, 0))
    low, colours = (-limit, EFFECT) if effect else (0.0, ATTENTION)
    ax.imshow(values, cmap=colours, vmin=low, vmax=limit, alpha=0.6, extent=(0, side, side, 0))
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def band(ax: Axes, x: Sequence[float], examples: np.ndarray, label: str, role: str, dashed: bool = False) -> None:
    """A line of means over examples with its 95 % band (`metrics.interval`); `examples` is (example, x).

    There is no band over a single example, nor where values are missing.
    """
    ends = np.full((2, examples.shape[1]), np.nan)
    known = np.isfinite(examples).all(0) & (len(examples) > 1)
    if known.any():
        ends[:, known] = interval(examples[:, known])
    style = "--" if dashed else "-"
    ax.plot(x, examples.mean(0), style, marker="o", markersize=3.5, color=COLOUR[role], label=label)
    ax.fill_between(x, *ends, color=COLOUR[role], alpha=0.18, linewidth=0)


def bars(
    ax: Axes, groups: Mapping[str, np.ndarray], role: str, label: str = "", shift: float = 0.0, width: float = 0.8
):
    """A bar at the mean of each group of examples, with its 95 % interval (`metrics.interval`); {name: (example,)}.

    Several calls with a `shift` of their own set bars side by side; the names stand under shift 0.
    """
    place, means = np.arange(len(groups)), np.array([np.mean(values) for values in groups.values()])
    ends = np.transpose([interval(values) for values in groups.values()])  # (low and high, group)
    # the mean lies in its interval but for rounding, and for a bootstrap of very skewed values
    reach = np.maximum((ends - means) * [[-1], [1]], 0)
    shown = ax.bar(place + shift, means, width, yerr=reach, capsize=3, color=COLOUR[role], label=label or None)
    ax.set_xticks(place, groups)
    return shown


_twins: list[tuple[Callable[..., Figure], dict, dict, dict]] = []  # (draw, first values, picture, globals it read)


def explore(draw: Callable[..., Figure], **controls: widgets.Widget) -> None:
    """A widget that redraws `draw(**values)` whenever a control moves, and its static twin.

    The twin is the figure for the controls' first values. It is an ordinary picture in the page, so a page without a
    kernel shows the same thing; with a kernel, the widget draws into its own place below. `changed` compares the twin
    with what the same values draw later.
    """
    values = {name: control.value for name, control in controls.items()}
    first = draw(**values)
    if get_ipython():
        data, about = _shown(first)
        display(data, metadata=about, raw=True)
        _twins.append((draw, values, data, _globals(draw)))
    else:
        display(first)
    plt.close(first)
    place = widgets.Output()

    def redraw(_change) -> None:
        with place:  # around `draw` too, or its errors would be seen by nobody
            place.clear_output(wait=True)
            figure = draw(**{name: control.value for name, control in controls.items()})
            display(figure)
            plt.close(figure)

    for name, control in controls.items():
        control.description = control.description or name
        if hasattr(control, "continuous_update"):
            control.continuous_update = False  # one figure when a slider is let go, not one for each step of a drag
        control.style.description_width = "initial"  # as wide as it is; and so are the choices of a list
        if isinstance(control, widgets.Dropdown):
            control.layout.width, control.layout.max_width = "max-content", "100%"
        control.observe(redraw, names="value")
    row = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap", "grid_gap": "0 16px"})
    display(widgets.VBox([row, place]))


def changed() -> list[str]:
    """What is wrong with the widgets of this notebook: those that would now draw another picture than their twin.

    A reader who moves a control sees what `draw` makes of the globals as they are then, so none that it reads may be
    rebound below it. Pictures are compared byte by byte. One that differs from itself when it is drawn twice in a row
    depends on chance or on the time, and nothing is said of it.
    """
    wrong = []
    for draw, values, twin, read in _twins:
        what = f"the widget of `{getattr(draw, '__name__', draw)}`"
        try:
            pictures = [_picture(draw, values)]
            pictures += [_picture(draw, values)] if pictures[0] != twin else []
        except Exception as error:
            wrong.append(f"{what} can no longer be drawn at the end: {type(error).__name__}: {error}")
            continue
        if pictures[0] != twin and pictures[0] == pictures[1]:
            now = _globals(draw)
            names = ", ".join(sorted(name for name in read if now.get(name) != read[name]))
            rebound = f"that were rebound or changed below it{names and f': {names}'}"
            wrong.append(f"{what} draws another picture at the end than its twin: it reads globals {rebound}")
    return wrong


def _shown(figure: Figure) -> tuple[dict, dict]:
    """A figure as the notebook shows it: {MIME type: data}, {MIME type: metadata}."""
    return get_ipython().display_formatter.format(figure)


def _picture(draw: Callable[..., Figure], values: dict) -> dict:
    figure = draw(**values)
    try:
        return _shown(figure)[0]
    finally:
        plt.close(figure)


def _globals(function: Callable, found: dict[str, int] | None = None) -> dict[str, int]:
    """The globals that a function reads, and those that the functions among them read: {name: id of its value}."""
    found, codes = {} if found is None else found, [getattr(function, "__code__", None)]
    for code in filter(None, codes):
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        for name in code.co_names:
            if name in function.__globals__ and name not in found:
                value = function.__globals__[name]
                found[name] = id(value)
                if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
                    _globals(value, found)
    return found
