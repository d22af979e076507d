"""The whole as its users meet it: every notebook runs and agrees with what is committed; README says what is so."""

import base64
import json
import re
from pathlib import Path

import nbformat

from mmfm_utils import models, runner

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


def test_the_picture_in_readme_is_a_figure_of_the_tour():
    picture = (ROOT / "data" / "readme" / "hand_over.png").read_bytes()
    tour = nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", 4)
    outputs = [out for cell in tour.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures = [base64.b64decode(out["data"]["image/png"]) for out in outputs if "image/png" in out.get("data", {})]
    assert picture in pictures
