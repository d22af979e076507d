"""Exercises: the stub fails, the wrong answers fail with the right words, the reference passes, and nothing else fails.

`mmfm course check [NAME ...]` tells how the exercises of the notebooks stand. The wrong answers to those of
notebooks/NAME.ipynb stand in tests/wrong_answers/NAME.py:

    WRONG = {
        "ex1-direct-effect": [
            ("forgot the projection", r"projection", '''
    parts = record(model, images)
    return parts.mean(0)
    '''),
            ("took the wrong axis", r"wrong axis", '''...'''),
        ],
    }

A key is the grade_id of a solution cell. Each wrong answer is a name for it, a regular expression that the test's
message must match, and what a student would have written between `### BEGIN SOLUTION` and `### END SOLUTION`, at any
indentation: it is moved to where the marker stands. At least two for every exercise.

A notebook runs once, whole, as the runner runs every notebook; what is tried at each exercise is in trials.py.
"""

import re
import runpy
import textwrap
from copy import deepcopy

import nbformat
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
from traitlets.config import Config

from .. import root, runner
from . import CONFIG, STUB_SAYS

LEAST = 2  # wrong answers for each exercise


def place(nb, i):
    """The name of the cell at an index of the notebook: `cell 7`, or `the Markdown after cell 7`."""
    before = len(runner.code_cells(nbformat.from_dict({"cells": nb.cells[:i]})))
    if nb.cells[i].cell_type == "code":
        return f"cell {before + bool(nb.cells[i].source.strip())}"
    return f"the Markdown after cell {before}" if before else "the Markdown at the top"


def python_of(source):
    """The cell without lines that only IPython understands, each in its place."""
    return "\n".join("pass" if re.match(r"\s*[%!?]", line) else line for line in source.splitlines())


def is_solution(cell):
    """Whether a cell is for students to fill in."""
    return cell.cell_type == "code" and bool(cell.metadata.get("nbgrader", {}).get("solution"))


def is_test(cell):
    """Whether a cell is a test that gives points."""
    return cell.cell_type == "code" and bool(cell.metadata.get("nbgrader", {}).get("grade"))


def exercises(nb):
    """[(index of the solution cell, index of its test cell or None)]: the test is the next code cell."""
    found = []
    for i, cell in enumerate(nb.cells):
        if is_solution(cell):
            after = next((j for j, other in enumerate(nb.cells) if j > i and other.cell_type == "code"), None)
            found.append((i, after if after is not None and is_test(nb.cells[after]) else None))
    return found


def assignment(nb):
    """The notebook as students get it: solutions replaced by the stub, hidden tests taken out."""
    nb = deepcopy(nb)
    for step in (ClearSolutions(config=Config(CONFIG)), ClearHiddenTests()):
        nb, _ = step.preprocess(nb, {})
    return nb


def answered(source, answer):
    """The solution cell with another answer between the markers."""

    def fill(match):
        return textwrap.indent(textwrap.dedent(answer).strip("\n"), match["indent"]) + "\n"

    mark = r"^(?P<indent>[ \t]*)### BEGIN SOLUTION[ \t]*\n.*?^[ \t]*### END SOLUTION[ \t]*(?:\n|\Z)"
    filled, times = re.subn(mark, fill, source, flags=re.M | re.S)
    if times != 1:
        raise ValueError("a solution cell needs one `### BEGIN SOLUTION` and one `### END SOLUTION`")
    return filled


def wrong_answers(name):
    """{grade_id: [(name, pattern, answer)]} of tests/wrong_answers/NAME.py, or nothing where there is none."""
    path = root() / "tests" / "wrong_answers" / f"{name}.py"
    return runpy.run_path(str(path))["WRONG"] if path.exists() else {}


def of(nb, name, wrong=None):
    """(what is wrong with the exercises as far as the source shows it, {grade_id: what `trials.check` takes}).

    wrong: {grade_id: [(name, pattern, answer)]}, by default that of `wrong_answers`.
    """
    wrong, pairs = wrong_answers(name) if wrong is None else wrong, exercises(nb)
    ids = {i: nb.cells[i].metadata["nbgrader"].get("grade_id") for i, _ in pairs}
    found = [f"wrong answers to {key!r}, which is no exercise here" for key in wrong if key not in ids.values()]
    found += [f"{key}: {len(wrong.get(key, []))} wrong answers in tests/wrong_answers/{name}.py; {LEAST} are needed"
              for key in ids.values() if len(wrong.get(key, [])) < LEAST]  # fmt: skip
    found += [f"{ids[i]}: no test cell follows" for i, test in pairs if test is None]
    if found or not pairs:
        return found, {}
    try:
        students = assignment(nb)
        answers = {i: [(n, p, answered(nb.cells[i].source, a)) for n, p, a in wrong[ids[i]]] for i in ids}
    except (RuntimeError, ValueError) as error:
        return [str(error)], {}
    return [], {
        ids[i]: {"grade_id": ids[i], "stub": [students.cells[i].source, students.cells[test].source],
                 "says": STUB_SAYS, "wrong": answers[i], "test": nb.cells[test].source}
        for i, test in pairs
    }  # fmt: skip


def check(path, wrong=None):
    """What is wrong with the exercises of a notebook, in plain words; it is executed whole, and nothing is written.

    So the reference is known to carry the notebook to its end. A notebook without exercises is not run.
    """
    found, trials = of(runner.read(path), path.stem, wrong)
    if found or not trials:
        return found
    task = runner.make_task(path, (), "tiny", "auto", 1, 1800, lambda *_: (found, trials))
    return runner.execute(task)["problems"]
