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

A notebook's code cells run once, in order, in this process. At each exercise everything that a trial has named or drawn
at random is put back, so that the next trial and the notebook itself see none of it.
"""

import contextlib
import gc
import io
import linecache
import os
import random
import re
import runpy
import sys
import textwrap
import traceback
import types
from copy import deepcopy
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import torch
from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
from traitlets.config import Config

from . import findings, runner
from .course import CONFIG, STUB_SAYS

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


class Session:
    """The names of a running notebook, without a kernel."""

    def __init__(self, name):
        self.name = name
        self.module = types.ModuleType(f"running_{name}")
        self.names = self.module.__dict__
        self.names["display"] = nothing

    def run(self, source, label):
        """Execute one cell."""
        source = python_of(source)
        file = f"<{self.name}, {label}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, file, "exec"), self.names)
        plt.close("all")

    def attempt(self, *cells):
        """Execute (source, label) cells; return the label and the exception that ended it, or None. All is put back."""
        names, drawn = dict(self.names), (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
        label = ""
        try:
            for source, label in cells:
                self.run(source, label)
        except (Exception, SystemExit) as error:
            return label, error
        finally:
            self.names.clear()
            self.names.update(names)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002
            torch.set_rng_state(drawn[2])
        return None


def nothing(*_, **__):
    """In place of functions that show something."""


@contextlib.contextmanager
def surroundings(session, folder):
    """The notebook's folder, figures that open nothing, and no file for results."""
    here, begun, backend = Path.cwd(), findings._run, matplotlib.get_backend()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MMFM_RESULTS")}
    sys.modules[session.module.__name__] = session.module
    os.chdir(folder)
    matplotlib.use("Agg")
    try:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch("IPython.display.display", nothing),
            mock.patch.object(plt, "show", nothing),
        ):
            yield
    finally:
        os.chdir(here)
        findings._run = begun
        matplotlib.use(backend)
        del sys.modules[session.module.__name__]
        session.names.clear()
        gc.collect()


def told(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error)[:300] or '(no message)'}"


def is_stub(error):
    """Whether the stub is behind an exception."""
    while error is not None:
        if isinstance(error, NotImplementedError) and str(error) == STUB_SAYS:
            return True
        error = error.__cause__ or error.__context__
    return False


def wrong_answers(name):
    """{grade_id: [(name, pattern, answer)]} of tests/wrong_answers/NAME.py, or nothing where there is none."""
    path = findings.root() / "tests" / "wrong_answers" / f"{name}.py"
    return runpy.run_path(str(path))["WRONG"] if path.exists() else {}


def check(nb, name, wrong, folder, whole=True):
    """What is wrong with the exercises of a notebook, in plain words.

    The cells after the last exercise run too, so that the reference is known to carry the notebook to its end; without
    `whole` they do not, which is for those who execute the notebook anyway.
    """
    pairs = exercises(nb)
    if not pairs and not wrong:
        return []
    ids = {i: nb.cells[i].metadata["nbgrader"].get("grade_id") for i, _ in pairs}
    found = [f"wrong answers to {key!r}, which is no exercise here" for key in wrong if key not in ids.values()]
    found += [f"{key}: {len(wrong.get(key, []))} wrong answers in tests/wrong_answers/{name}.py; {LEAST} are needed"
              for key in ids.values() if len(wrong.get(key, [])) < LEAST]  # fmt: skip
    found += [f"{ids[i]}: no test cell follows" for i, test in pairs if test is None]
    if found:
        return found
    try:
        students = assignment(nb)
        answers = {i: [(n, p, answered(nb.cells[i].source, a)) for n, p, a in wrong[ids[i]]] for i in ids}
    except (RuntimeError, ValueError) as error:
        return [str(error)]
    session, tests = Session(name), dict(pairs)
    with surroundings(session, folder):
        for i, cell in enumerate(nb.cells if whole else nb.cells[: max(tests.values()) + 1]):
            if cell.cell_type != "code":
                continue
            here = place(nb, i)
            if i in tests:
                found += _stub(session, ids[i], students, i, tests[i])
                for title, pattern, source in answers[i]:
                    outcome = session.attempt((source, "wrong answer"), (nb.cells[tests[i]].source, "test"))
                    found += [f"{ids[i]}: the wrong answer '{title}' {what}" for what in _verdict(outcome, pattern)]
            try:
                session.run(cell.source, here)
            except (Exception, SystemExit) as error:
                what = " (the reference)" if i in ids else " (the test, after the reference)" if is_test(cell) else ""
                trace = "".join(traceback.format_exception(error)[-6:])
                return [*found, f"{here}{what} fails: {told(error)}\n{textwrap.indent(trace, '    ')}"]
    return found


def _stub(session, key, students, i, test):
    """The student's cell and its visible test: they must end at the stub."""
    outcome = session.attempt((students.cells[i].source, "stub"), (students.cells[test].source, "visible test"))
    if outcome is None:
        return [f"{key}: the assignment runs through before anything is written; the visible test must use the answer"]
    if not is_stub(outcome[1]):
        return [f"{key}: the assignment fails, but not at the stub: {told(outcome[1])}"]
    return []


def _verdict(outcome, pattern):
    """What is wrong with the way in which a wrong answer ended."""
    if re.search(pattern, ""):
        return [f"has the pattern {pattern!r}, which any message matches"]
    if outcome is None:
        return ["passes the test"]
    label, error = outcome
    if label != "test" or not isinstance(error, AssertionError):
        return [f"ends in the {label} with {told(error)}; the test must catch it with a message of its own"]
    if not re.search(pattern, str(error)):
        return [f"is told {str(error)[:300]!r}, which does not match {pattern!r}"]
    return []
