"""The widgets as readers meet them: their twins at the end of a run; a toy in JupyterLab, in headless Chromium; and the
notebooks on a page without a kernel. And the report of a run, on a phone.

Where Playwright or Chromium is missing the tests that need them are skipped.
"""

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook

from mmfm_utils import findings, runner

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROKEN = ("Loading widget", "Error displaying widget", "Click to show javascript error", "VBox(children=")
ERROR = '.jp-RenderedText:has-text("Traceback (most recent call last)")'
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def widget_cell(nb):
    """The one code cell that makes a widget."""
    (cell,) = [cell for cell in runner.code_cells(nb) if "plots.explore(" in cell.source]
    return cell


# ------------------------------------------------------------------------------------------------------- twins, redrawn
TOY = """import random
import ipywidgets
import matplotlib.pyplot as plt
from mmfm_utils import plots

height, other, heights, gone = 2, 2, [2], 2


def draw(power, colour="red", height=1):
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot([height * x**power for x in range(9)], color=colour)
    return figure


def scaled(power):
    return draw(power, "green", height)


control = ipywidgets.IntSlider(2, 1, 9)
"""
WIDGETS = """plots.explore(draw, power=control, colour=ipywidgets.Dropdown(options=["red", "blue"]))
plots.explore(scaled, power=control)
plots.explore(lambda power: draw(power, height=other), power=control)
plots.explore(lambda power: draw(power, height=heights[0]), power=control)
plots.explore(lambda power: draw(power + random.random()), power=control)
plots.explore(lambda power: draw(power, height=gone), power=control)"""


def toy(*cells):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[new_code_cell(source) for source in (TOY, *cells)], metadata=kernel)


def test_a_widget_whose_globals_are_rebound_below_it_fails_the_run(tmp_path):
    """And one that reads nothing that changes, or is drawn by chance, does not."""
    nb = toy(WIDGETS, "other = 2\nheight = 3\nheights.append(heights.pop() + 1)\ndel gone")
    nb.cells.insert(0, new_code_cell('profile = "tiny"\ndevice = "auto"', metadata={"tags": ["parameters"]}))
    nb.cells[1].source += "print(profile, device)"
    nbformat.write(nb, tmp_path / "toy.ipynb")
    result = runner.execute(runner.make_task(tmp_path / "toy.ipynb", (), "tiny", "auto", 1, 600))
    end = "draws another picture at the end than its twin: it reads globals that were rebound or changed below it"
    assert result["problems"] == [
        f"the widget of `scaled` {end}: height",
        f"the widget of `<lambda>` {end}",
        "the widget of `<lambda>` can no longer be drawn at the end: NameError: name 'gone' is not defined",
    ]
    shown = [output for output in nbformat.reads(result["executed"], 4).cells[3].outputs if "image/png" in output.data]
    assert len(shown) == 6 and shown[0].data["text/plain"] == "<Figure size 300x200 with 1 Axes>"


# --------------------------------------------------------------------------------------------- Chromium and JupyterLab
@pytest.fixture(scope="module")
def browser():
    why = "`pip install playwright` (it is in the dev extra)"
    playwright = pytest.importorskip("playwright.sync_api", reason=f"Playwright is missing: {why}")
    found = os.environ.get("MMFM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as p:
        if not found and not Path(p.chromium.executable_path).exists():
            pytest.skip(
                "no Chromium: install chromium or Chrome, or name one in MMFM_CHROMIUM, or `playwright install`"
            )
        chromium = p.chromium.launch(executable_path=found)  # without its sandbox, which root cannot have
        yield chromium
        chromium.close()


class Lab:
    """A JupyterLab of this Python on a free port, with no settings of the user; it shows a folder of its own."""

    def __init__(self, browser, folder):
        self.browser, self.folder, self.token = browser, folder / "notebooks", secrets.token_hex()
        settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        kernel = folder / "jupyter/kernels/python3/kernel.json"
        for place in (self.folder, settings.parent, kernel.parent):
            place.mkdir(parents=True)
        settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        own = {"MMFM_ROOT": ROOT, "JUPYTER_PATH": folder / "jupyter", "JUPYTER_CONFIG_DIR": folder / "config",
               "JUPYTER_DATA_DIR": folder / "data", "JUPYTER_RUNTIME_DIR": folder / "run"}  # fmt: skip
        environment = os.environ | runner.environment(str(folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = {"ServerApp.port": self.address.split(":")[-1], "ServerApp.port_retries": 0,
                   "ServerApp.root_dir": self.folder, "IdentityProvider.token": self.token}  # fmt: skip
        self.log = folder / "server.log"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=environment | {name: str(value) for name, value in own.items()},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        while True:
            assert self.server.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                self.ask("GET", "api")
                break
            time.sleep(0.2)

    def ask(self, method, what):
        """Ask the server for something."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.address}/{what}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    @contextlib.contextmanager
    def showing(self, nb, name):
        """The page of JupyterLab with a notebook in it; in the end its kernels are gone, and nothing had complained."""
        nbformat.write(nb, self.folder / f"{name}.ipynb")
        page, complaints = self.browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        try:
            page.goto(f"{self.address}/lab/tree/{name}.ipynb?token={self.token}&reset")
            page.locator(IDLE).wait_for()
            yield page
            assert not complaints, complaints
        finally:
            page.close()
            for kernel in json.loads(self.ask("GET", "api/kernels")):
                self.ask("DELETE", f"api/kernels/{kernel['id']}")

    @contextlib.contextmanager
    def running(self, nb, name):
        """The last cell of a notebook in JupyterLab, after all cells have run."""
        with self.showing(nb, name) as page:
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.locator(f"{BOX}, {ERROR}").first.wait_for(timeout=600_000)
            assert not page.locator(ERROR).all_inner_texts()
            yield page.locator(".jp-CodeCell").last


IDLE = '.jp-StatusBar-TextItem:has-text("| Idle")'  # the mark in the notebook's corner says so too early
BOX = ".widget-vbox:has(> .widget-hbox)"  # what `explore` makes: the controls, and a place for the picture below
PICTURE = "box => box.querySelector('.jp-OutputArea img')?.src"
CHANGED = """([box, before]) => {
    const picture = box.querySelector('.jp-OutputArea img')
    return picture && picture.naturalWidth > 0 && picture.src != before
}"""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    lab = Lab(browser, tmp_path_factory.mktemp("lab"))
    yield lab
    lab.server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for ever for a thread of its own
        lab.server.wait(timeout=10)
    lab.server.kill()
    lab.server.wait()


# ---------------------------------------------------------------------------------------------------------- the reader
def settled(page, box):
    """The picture below the controls once the kernel has drawn all that a move asked for; None before the first."""
    while True:
        before = box.evaluate(PICTURE)
        page.wait_for_timeout(500)
        page.locator(IDLE).wait_for()
        if box.evaluate(PICTURE) == before:
            return before


def moves(control):
    """Ways to move a control, one after the other; some choices may happen to draw the same picture."""
    page = control.page
    if control.locator(".noUi-handle").count():
        for share in (0.8, 0.2, 0.5):
            at, bar = (control.locator(part).bounding_box() for part in (".noUi-handle", ".noUi-base"))
            x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(bar["x"] + share * bar["width"], y, steps=4)
            page.mouse.up()
            yield
        control.locator(".noUi-handle").press("ArrowRight")
        yield
    else:
        options, (chosen,) = (control.locator(f"option{which}").all() for which in ("", ":checked"))
        for n in [n for n in range(len(options)) if n != chosen.evaluate("option => option.index")][:4]:
            control.locator("select").select_option(index=n)
            yield


def use(cell, patience=30):
    """Move every control of a widget as a reader does; each must redraw the picture below within so many seconds."""
    from playwright.sync_api import TimeoutError

    page, box, twin = cell.page, cell.locator(BOX), cell.locator(f":not({BOX} *) > img")
    box.scroll_into_view_if_needed()
    assert twin.evaluate("img => img.complete && img.naturalWidth > 0"), "no static twin"
    assert twin.bounding_box()["y"] < box.bounding_box()["y"], "the twin stands below"
    assert box.evaluate(PICTURE) is None, "there is a second picture before anything has moved"
    shown, controls = twin.get_attribute("src"), box.locator("> .widget-hbox > *").all()
    assert controls, "nothing to move"
    for control in controls:
        name, readout = control.locator(".widget-label").inner_text(), control.locator(".widget-readout")
        for label in control.locator(".widget-label").all():
            assert label.evaluate("label => label.scrollWidth <= label.clientWidth"), f"`{name}` is cut off"
        before, said = settled(page, box), readout.all_inner_texts()
        for _ in moves(control):
            assert not said or readout.all_inner_texts() != said, f"the readout of `{name}` stays at {said}"
            with contextlib.suppress(TimeoutError):
                page.wait_for_function(CHANGED, arg=[box.element_handle(), before], timeout=1000 * patience)
                break
            assert not page.locator(ERROR).all_inner_texts()
        else:
            pytest.fail(f"`{name}` moves and the picture stays as it is")
    settled(page, box)
    assert twin.get_attribute("src") == shown, "the twin has changed"
    assert not cell.locator(f"{ERROR}, {STDERR}").all_inner_texts()
    assert not [words for words in BROKEN if words in cell.inner_text()]


def test_every_control_redraws_its_picture_in_jupyterlab(lab):
    line = 'plots.explore(draw, power=control, colour=ipywidgets.Dropdown(options=["red", "blue"]))'
    with lab.running(toy(line), "toy") as cell:
        use(cell)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("plots.explore(draw, power=control)\ncontrol.unobserve_all()", "`power` moves and the picture stays"),
        ("plots.explore(lambda power: draw(power, {2: 'red'}[power]), power=control)", "KeyError"),
        ("plots.explore(draw, power=control)\ncontrol.style.description_width = '9px'", "`power` is cut off"),
    ],
    ids=("not wired", "raises", "cut off"),
)
def test_a_broken_widget_would_be_noticed(lab, line, wrong):
    with lab.running(toy(line), "toy") as cell, pytest.raises((AssertionError, pytest.fail.Exception), match=wrong):
        use(cell, patience=2)


def test_a_slider_follows_the_arrow_keys(lab):
    with lab.running(toy("plots.explore(draw, power=control)"), "toy") as cell:
        box = cell.locator(BOX)
        box.locator(".noUi-handle").press("ArrowRight")
        cell.page.wait_for_function(CHANGED, arg=[box.element_handle(), None])
        assert box.locator(".widget-readout").inner_text() == "3"


# ----------------------------------------------------------------------------------------------- pages without a kernel
@contextlib.contextmanager
def opened(browser, file, width=1280, height=900):
    """A file in Chromium, cut off from the network; what it asked for elsewhere is in `page.asked`."""
    phone = width < 500  # which lays out a wider page, unless the page names the width of the screen
    page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=phone, has_touch=phone)
    page.asked = []

    def answer(route):
        if route.request.url.startswith(("file:", "data:")):
            return route.continue_()
        page.asked.append(route.request.url)
        return route.abort()

    page.route("**/*", answer)
    page.goto(file.as_uri(), wait_until="load")
    yield page
    page.close()


def broken_images(page):
    return page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt || i.src)")


@each_notebook
def test_the_committed_widget_is_its_static_twin(path):
    """All that a code host has to show."""
    nb = nbformat.read(path, 4)
    (twin,) = widget_cell(nb).outputs
    assert base64.b64decode(twin.data["image/png"]).startswith(b"\x89PNG")
    assert not [words for words in (*BROKEN, "widget-view") if words in json.dumps(nb)]


@each_notebook
def test_a_page_without_a_kernel_shows_the_twin_and_no_broken_widget(browser, path, tmp_path):
    nb = nbformat.read(path, 4)
    (tmp_path / "page.html").write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")
    with opened(browser, tmp_path / "page.html") as page:
        text = page.inner_text("body")
        assert not [words for words in BROKEN if words in text] and not page.locator(".widget-subarea").count()
        twin = widget_cell(nb).outputs[0].data["image/png"].replace("\n", "")
        assert page.evaluate("twin => [...document.images].some(i => i.src.endsWith(twin))", twin)
        assert not broken_images(page)


def test_a_notebook_that_is_only_opened_in_jupyterlab_shows_the_twin(lab):
    path = NOTEBOOKS[0]
    with lab.showing(nbformat.read(path, 4), path.stem) as page:
        cell = page.locator(".jp-CodeCell").filter(has_text="plots.explore(")
        cell.scroll_into_view_if_needed()
        assert cell.locator("img").evaluate("img => img.naturalWidth") > 0
        assert not cell.locator(BOX).count() and not [words for words in BROKEN if words in cell.inner_text()]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the committed outputs and values, as a run would have left it."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    folder.mkdir()
    known, committed = findings.registry(), findings.expected("tiny")
    for path in NOTEBOOKS:
        rows = [
            {"id": id, "notebook": path.stem, "claim": known[id].claim, "rule": "", "why": "", **row}
            | {"control": row["value"], "interval": [0, 1], "n": 9, "seconds": 1.0, "peak_mb": 1.0}
            for id, row in committed.items()
            if known[id].notebook == path.stem
        ]
        result = runner.blank({"name": path.stem, "profile": "tiny", "parameters": {}, "key": ""})
        result |= {"rows": rows, "versions": runner.versions(), "status": "ok", "reason": ""}
        (folder / f"{path.stem}.json").write_text(json.dumps(result))
        shutil.copy(path, folder)
    return runner.show(folder)


@pytest.mark.parametrize("width", [320, 390, 901, 1200])
def test_the_report_is_self_contained_and_readable(browser, report, width):
    with opened(browser, report, width, 800) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not page.asked and not broken_images(page)
        assert page.evaluate("document.images.length") > len(NOTEBOOKS)
        small = "[...document.querySelectorAll('td, p')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 14)"
        assert not page.evaluate(f"{small}.length")
        lost = "[...document.querySelectorAll('a')].filter(a => !document.querySelector(CSS.escape ? '#' + "
        lost += "CSS.escape(a.hash.slice(1)) : a.hash)).map(a => a.hash)"
        assert not page.evaluate(lost) and page.locator("a").count() > len(NOTEBOOKS)
        page.locator("a").first.click()
        assert page.evaluate("scrollY") > 0


def test_the_filter_leaves_what_fits(browser, report):
    known = findings.registry()
    fits = [id for id, row in findings.expected("tiny").items() if row["verdict"] == "partly"]
    fits = {id for id in fits if known[id].family == "generative"}
    with opened(browser, report, 390, 800) as page:
        everything = page.locator(".finding:visible").count()
        for words in ("generative", "partly"):
            page.locator("#filter label", has_text=words).click()
        seen = page.evaluate("[...document.querySelectorAll('.finding:not([hidden])')].map(e => e.id)")
        assert set(seen) == fits and f"{len(fits)} of {everything} shown" in page.locator("#filter").inner_text()
        assert page.locator(".chip:visible").count() == len(fits)
        for kind in ("family", "verdict"):
            page.locator(f"fieldset:has(legend:text-is('{kind}')) label").first.click()
        assert page.locator(".finding:visible").count() == everything


def test_the_report_is_whole_without_javascript(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".finding").count() == page.locator(".finding:visible").count() > len(NOTEBOOKS)
    assert not page.locator("#filter").is_visible()
    context.close()
