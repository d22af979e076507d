"""The whole as its users meet it: every notebook runs once, and README says what is so.

In that run its exercises are tried, its values are compared with the committed ones, and its widgets are drawn again at
the end. `-k` with the name of a notebook runs that one alone.
"""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from mmfm_utils import UsageError, findings, models, runner
from mmfm_utils.course import exercises
from mmfm_utils.runner import readme

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{name: result} of the notebooks whose tests are to run; where they are is said on the terminal meanwhile."""
    names = [item.callspec.params["path"].stem for item in request.session.items
             if "results" in getattr(item, "fixturenames", ()) and "path" in item.callspec.params]  # fmt: skip
    folder = tmp_path_factory.mktemp("results")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        jobs = runner.usual_jobs("tiny", write=False)
        if runner.run(names, jobs=jobs, results=folder, exercises=exercises.of) == 130:
            pytest.exit("interrupted", 130)
    return {result["name"]: result for result in runner.stored(folder / "tiny")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook(results, path):
    """At each exercise the stub and the wrong answers fail as they should; all else runs, and the values agree."""
    result, known = results[path.stem], findings.registry()
    assert result["status"] == "ok", "\n".join(result["problems"]) or result["reason"]
    committed = json.loads((ROOT / "data" / "expected" / "tiny.json").read_text())
    assert {row["id"] for row in result["rows"]} == {id for id in committed if known[id].notebook == path.stem}


def test_every_committed_value_belongs_to_a_notebook_that_is_here():
    known, committed = findings.registry(), json.loads((ROOT / "data" / "expected" / "tiny.json").read_text())
    assert {known[id].notebook for id in committed} == {path.stem for path in NOTEBOOKS}


def test_readme_has_the_table_of_the_notebooks_and_their_minutes():
    assert readme.filled(README) == README, "`mmfm run NAME --write` fills them in"
    linked = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) .*\| \d+ \|$", README, re.M)
    assert linked == [path.stem for path in NOTEBOOKS]
    assert re.search(r"<!--minutes of 00_tour-->\d+ minutes?<", README)
    assert re.search(r"<!--minutes of all-->\d+ minutes<", README)


def test_the_minutes_of_readme_come_from_the_notebooks(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    for folder in ("data", "notebooks"):
        (tmp_path / folder).mkdir()
    line = {"branch": "b", "question": "q?", "families": ["contrastive", "language"]}
    table = [line | {"name": f"0{n}_x", "state": "here", "title": "T"} for n in (0, 1)]
    table += [line | {"name": "02_x", "state": "planned", "papers": []}]
    (tmp_path / "data/notebooks.yaml").write_text(yaml.safe_dump(table))
    for n, measured in enumerate(("20 s, 1.0 GB", "500 s, 1.0 GB")):
        (tmp_path / f"notebooks/0{n}_x.ipynb").write_text(f"<!--measured-->{measured}<!--/measured-->")
    places = [f"<!--minutes of {name}-->?<!--/minutes-->" for name in ("00_x", "all", "02_x")]
    text = readme.filled("\n".join(["<!--notebooks-->", "<!--/notebooks-->", *places]))
    assert "| [01_x](notebooks/01_x.ipynb) | q? | ● | | | ● | 8 |\n| 02_x | q? | ○ | | | ○ | planned |\n" in text
    assert "<!--minutes of 00_x-->1 minute<" in text and "<!--minutes of all-->9 minutes<" in text
    assert "<!--minutes of 02_x-->?<" in text  # it has never run


def test_what_readme_calls_these_results():
    assert "What is done here on embedded models is a *replication* of claims in another system." in " ".join(
        README.split()
    )


def test_readme_gives_the_held_out_figures_of_the_cards():
    clean, web = models.read_card("contrastive"), models.read_card("contrastive_web")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)? ?\|$", README, re.M)
    assert len(rows) == 13 and {"word_flips", "stroop_ink", "ground_unusual_planted"} < {row[0] for row in rows}
    for name, *said in rows:
        figures = (clean["held_out"][name], web["held_out"][name], clean["chance"].get(name))
        assert said == ["" if figure is None else f"{figure:.3f}" for figure in figures], name
    further = web["pairs_seen"] - models.read_card("contrastive_first")["pairs_seen"]
    assert (
        f"read clean captions ({clean['pairs_seen']:,} pairs)" in README and f"went on for {further:,} pairs" in README
    )


def test_readme_gives_the_figures_of_the_text_to_image_model():
    card, text = models.read_card("diffusion"), " ".join(README.split())
    said = card["held_out"]
    one, drawn, pair = (
        [f"{said[name]:.3f}" for name in names]
        for names in (
            ("object", "colour", "style", "ground"), ("drawn_object", "drawn_colour", "drawn_style", "drawn_ground"),
            ("pair_objects", "pair_bound", "drawn_pair_objects"),
        )
    )  # fmt: skip
    assert f"{card['steps'] * card['pictures_a_step']:,} pictures in {card['minutes']} minutes" in text
    assert f"{card['parameters'] / 1e6:.1f} M parameters) is a `StableDiffusionPipeline`" in text
    for part in (
        "object in {} of the pictures, its colour in {}, the style in {}, the ground in {};".format(*one),
        "both in {}, and both in their colours in {}.".format(*pair),
        "oracle reads {}, {}, {} and {}, and {} of pairs".format(*drawn, pair[2]),
    ):
        assert part in text, part


def test_the_pictures_in_readme_are_figures_of_the_notebooks():
    shown = re.findall(r"!\[(.+?)\]\((data/readme/(\w+)\.\d+\.png)\)", README)
    assert len(shown) == 4
    assert {path for _, path, _ in shown} == {f"data/readme/{p.name}" for p in (ROOT / "data" / "readme").glob("*")}
    for _, path, name in shown:
        drawn = runner.readme_pictures(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4), name)
        assert drawn[ROOT / path] == (ROOT / path).read_bytes(), f"{path}: `mmfm run {name} --write` writes it anew"


def test_a_picture_of_readme_whose_cell_draws_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    (tmp_path / "data" / "readme").mkdir(parents=True)
    (tmp_path / "data" / "readme" / "some.2.png").write_bytes(b"")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("y = 1")])
    with pytest.raises(UsageError, match="code cell 2 of some draws no figure"):
        runner.readme_pictures(nb, "some")
