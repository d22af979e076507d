"""The report of made-up results: what stands in it. tests/test_widgets.py looks at one in a browser."""

import base64
import io
import json
import re

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mmfm_utils import runner
from mmfm_utils.runner import report
from tests.toy_notebook import png

PNG = png(width=900, height=300)
ENTRY = {key: "x" for key in ("claim", "paper", "arxiv", "reported", "measured", "control")}
ENTRY |= {"verified": True, "rule": "value > control", "tolerance": 0.01, "notebook": "04_parts"}
LINE = {"name": "04_parts", "title": "Which part?", "branch": "parts", "question": "q", "state": "here"}


def judge(id):
    return new_code_cell(f'findings.judge(\n    "{id}", value=1)')


def draw(words="*Figure: A grey rectangle, which stands for a figure.*"):
    cell = new_code_cell("draw()", outputs=[new_output("display_data", {"image/png": PNG})])
    return [cell, new_markdown_cell(words)]


def row(id, verdict="reproduced", **changed):
    numbers = {"value": 0.5, "control": 0.1, "interval": [0.2, 0.6], "n": 9}
    empty = {"claim": f"Claim of {id}.", "notebook": "04_parts", "rule": "", "why": "", "seconds": 1.0, "peak_mb": 1.0}
    return {"id": id, "verdict": verdict} | numbers | empty | changed


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A function that builds the report of one notebook with these rows and cells, and returns the page."""
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    folder = tmp_path / "results" / "tiny"
    for path in (folder, tmp_path / "data"):
        path.mkdir(parents=True)
    planned = LINE | {"name": "05_more", "branch": "more parts", "state": "planned", "papers": []}
    del planned["title"]
    table = [LINE | {"families": ["contrastive", "language"]}, planned | {"families": ["diffusion"]}]
    (tmp_path / "data/notebooks.yaml").write_text(yaml.safe_dump(table))

    def build(rows, cells=(), name="04_parts", **more):
        entries = [ENTRY | {"id": row["id"], "family": "contrastive"} for row in rows]
        entries += [ENTRY | {"id": "N1", "family": "diffusion", "not_done": "no such model"}]
        (tmp_path / "data/findings.yaml").write_text(yaml.safe_dump(entries))
        nbformat.write(new_notebook(cells=list(cells)), folder / f"{name}.ipynb")
        result = runner.blank({"name": name, "profile": "tiny", "parameters": {}, "key": ""})
        result |= {"status": "ok", "reason": "", "rows": rows, "seconds": 12.4, "peak_mb": 800.0} | more
        (folder / f"{name}.json").write_text(json.dumps(result))
        return runner.show(folder).read_text()

    return build


def chips(page):
    """[(id, family, verdict, sign)] of the map."""
    found = r'class="chip" href="#(\w+)".*?data-family="(\w*)"\s+data-verdict="([\w ]+)".*?<b>(.)</b>'
    return re.findall(found, page, re.S)


def test_it_opens_on_the_map(world):
    page = world([row("A1"), row("A2", "partly"), row("A3", "not reproduced")])
    assert chips(page) == [
        ("A1", "contrastive", "reproduced", "✓"), ("A2", "contrastive", "partly", "≈"),
        ("A3", "contrastive", "not reproduced", "✗"), ("N1", "diffusion", "not done", "∅"),
    ]  # fmt: skip
    assert page.index('id="map"') < page.index('id="findings"') < page.index(' id="A1"')
    planned = re.search(r'<tr class="planned">.*?</tr>', page, re.S)[0]
    assert "05 more parts" in planned and planned.count("○") == 1
    assert "Which part?" in page and "12 s" in page and "0.8 GB" in page


def test_a_finding_stands_beside_its_figure(world):
    page = world([row("A1"), row("A2")], [*draw(), judge("A1"), new_markdown_cell("## Next"), judge("A2")])
    (thumbnail,) = re.findall(
        r'class="thumbnail" href="#04_parts-1"><img alt="([^"]+)"\s+src="data:image/webp;base64,(.+?)"', page
    )
    assert thumbnail[0] == "A grey rectangle, which stands for a figure."
    assert Image.open(io.BytesIO(base64.b64decode(thumbnail[1]))).size == (report.THUMBNAIL, report.THUMBNAIL // 3)
    figure = re.search(r'<figure id="04_parts-1">.*?</figure>', page, re.S)[0]
    assert 'href="#A1"' in figure and 'href="#A2"' not in figure
    whole = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,(.+?)\"", figure)[1])))
    assert whole.size == (900, 300) and whole.convert("RGB").getpixel((5, 5)) == (128, 128, 128)  # as it was drawn


def test_numbers_stand_beside_their_control():
    several = row("A1", value={"early": 1, "late": 0}, control={"early": 0.1, "twin": 0.2}, interval={"early": [0, 1]})
    assert report._numbers(several) == [("early", 1, 0.1, [0, 1]), ("late", 0, None, None), ("twin", None, 0.2, None)]
    assert report._numbers(row("A1")) == [("", 0.5, 0.1, [0.2, 0.6])]
    assert report._numbers(row("A1", control={"twin": 0.2}, interval=None)) == [
        ("", 0.5, None, None), ("twin", None, 0.2, None)
    ]  # fmt: skip


def test_what_was_not_done_and_what_went_wrong_is_said(world):
    page = world([row("A1")], status="disagrees", reason="A1 is <partly>")
    assert "Not done: no such model." in page
    assert "<b>04_parts disagrees</b>: A1 is &lt;partly&gt;" in page


def test_all_text_is_escaped(world):
    evil = "<script>alert(1)</script>"
    page = world([row("A1", claim=evil, why=evil)], draw(f'*Figure: It is {evil} and "quoted", in six words.*'))
    assert evil not in page and page.count("<script>") == 1 and "&#34;quoted&#34;" in page


def test_a_notebook_that_is_not_in_the_table_has_a_line_too(world):
    page = world([row("A1", notebook="99_own")], name="99_own")
    assert ("A1", "contrastive", "reproduced", "✓") in chips(page) and 'id="99_own"' in page
    assert "04 parts</a><small>not run</small>" in re.sub(r"\s*\n\s*", "", page)


def test_the_ledger_keeps_its_columns(world, tmp_path):
    world([row("A1", claim="a | b", control={"twin": 0.2})])
    lines = (tmp_path / "results/tiny/ledger.md").read_text().split("\n\n")[0].splitlines()
    assert lines[0] == "| id | claim | paper | reported | ours | control | interval | verdict |"
    assert lines[2:] == ["| A1 | a \\| b | x, arXiv x | x | 0.5 | twin 0.2 | [0.2, 0.6] | reproduced |"]


def test_the_figure_of_a_finding():
    cell, text = new_code_cell, new_markdown_cell
    output = new_output("display_data", {"image/png": PNG})
    figure = [cell("figure", outputs=[output])]
    judged = [cell('findings.judge(\n    "F1", value=1)')]
    for cells, place in (
        ([*figure, *judged, *figure], 1),  # the one above
        ([*figure, text("## Next"), *judged, text("words"), *figure], 3),  # but not out of another section
        ([*judged, text("## Next"), *figure], None),
        ([*figure, cell('findings.judge("F2", value=1)')], None),
    ):
        assert report._figure_of(cells, "F1") == place, cells
