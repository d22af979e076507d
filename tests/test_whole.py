"""The whole as its users meet it: every notebook runs and agrees with what is committed; README says what is so."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from mmfm_utils import UsageError, models, runner

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_notebooks_run_headless_and_agree_with_the_committed_results(tmp_path, capsys):
    code = runner.run(jobs=runner.usual_jobs("tiny", write=False), results=tmp_path)
    assert code == 0, capsys.readouterr().out
    ledger = json.loads((tmp_path / "tiny" / "ledger.json").read_text())
    committed = json.loads((ROOT / "data" / "expected" / "tiny.json").read_text())
    assert {row["id"] for row in ledger} == set(committed)
    assert {row["notebook"] for row in ledger} == {path.stem for path in NOTEBOOKS}


def test_readme_names_every_notebook_that_is_here_and_no_other():
    linked = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) .*\| here \|$", README, re.M)
    assert linked == [path.stem for path in NOTEBOOKS]


def test_readme_gives_the_held_out_figures_of_the_card():
    card = models.read_card("contrastive")
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|$", README, re.M))
    assert rows == {name: f"{value:.3f}" for name, value in card["held_out"].items()}


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
