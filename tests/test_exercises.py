"""The exercises of every notebook, and the harness that checks them, on a small notebook with faults."""

import copy
import os
import random
import time

import nbformat
import pytest
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.preprocessors import CheckCellMetadata

from mmfm_utils import cli, exercises
from tests import toy_notebook
from tests.notebook_contract import ROOT, notebooks
from tests.toy_notebook import WRONG, toy


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_exercises_of(path):
    """The stub fails, each wrong answer is told what is wrong, the reference passes, and no other cell fails.

    Up to the last exercise; tests/test_whole.py executes every notebook to its end.
    """
    start = time.perf_counter()
    nb = nbformat.read(path, as_version=4)
    found = exercises.check(nb, path.stem, exercises.wrong_answers(path.stem), path.parent, whole=False)
    assert not found, f"{path.name} ({time.perf_counter() - start:.0f} s):\n" + "\n".join(found)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_nbgrader_accepts(path):
    nb = nbformat.read(path, as_version=4)
    MetadataValidator().validate_nb(nb)
    CheckCellMetadata().preprocess(nb, {})


def test_wrong_answers_belong_to_a_notebook():
    known = {path.stem for path in notebooks()}
    assert {path.stem for path in (ROOT / "tests" / "wrong_answers").glob("*.py")} <= known


# ---- the harness -------------------------------------------------------------------------------------------------


def complaints(tmp_path, nb=None, wrong=WRONG):
    return "\n".join(exercises.check(nb or toy(), toy_notebook.NAME, wrong, tmp_path, whole=False))


def changed(grade_id, before, after):
    """The toy with a piece of one nbgrader cell replaced."""
    nb = toy()
    (cell,) = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id]
    assert before in cell.source
    cell.source = cell.source.replace(before, after)
    return nb


def test_a_good_notebook_passes(tmp_path):
    assert complaints(tmp_path) == ""


def test_the_cells_after_the_last_exercise_run_too_unless_told_otherwise(tmp_path):
    nb = toy()
    nb.cells[12].source = "raise SystemExit"
    assert complaints(tmp_path, nb) == ""
    (found,) = exercises.check(nb, toy_notebook.NAME, WRONG, tmp_path)
    assert found.startswith("cell 8 fails: SystemExit")


def test_a_notebook_without_exercises_is_not_run(tmp_path):
    nb = toy()
    nb.cells = [nb.cells[0], nbformat.v4.new_code_cell("raise SystemExit")]
    assert complaints(tmp_path, nb, {}) == ""


def test_a_wrong_answer_that_passes(tmp_path):
    wrong = {**WRONG, "ex2-total": [*WRONG["ex2-total"], ("right by another way", "x", "return 2 * sum(numbers)")]}
    assert complaints(tmp_path, wrong=wrong) == "ex2-total: the wrong answer 'right by another way' passes the test"


def test_a_wrong_answer_that_is_told_something_else(tmp_path):
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("a mean", "projection", "return 2.5")]}
    assert "is told 'this is not the sum of the doubled numbers', which does not match" in complaints(
        tmp_path, wrong=wrong
    )


@pytest.mark.parametrize("answer", ["return undefined", "return None + 1", "return (", "raise SystemExit"])
def test_a_wrong_answer_that_is_not_caught_by_an_assert(tmp_path, answer):
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("breaks", "sum", answer)]}
    assert "the test must catch it with a message of its own" in complaints(tmp_path, wrong=wrong)


def test_an_assert_without_a_message(tmp_path):
    nb = changed("test-ex2-total", ', "this is not the sum of the doubled numbers"', "")
    assert "is told ''" in complaints(tmp_path, nb)


def test_a_pattern_that_any_message_matches(tmp_path):
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("a mean", ".*", "return 2.5")]}
    assert "any message matches" in complaints(tmp_path, wrong=wrong)


def test_a_test_that_always_passes(tmp_path):
    found = complaints(tmp_path, changed("test-ex2-total", "assert total(numbers) == 2 * sum(numbers)", "assert True"))
    assert "ex2-total: the assignment runs through" in found and "'not doubled' passes the test" in found


def test_visible_tests_that_do_not_use_the_answer(tmp_path):
    nb = changed("test-ex2-total", "assert", "### BEGIN HIDDEN TESTS\nassert")
    nb.cells[11].source += "\n### END HIDDEN TESTS"
    assert complaints(tmp_path, nb) == (
        "ex2-total: the assignment runs through before anything is written; the visible test must use the answer"
    )


def test_an_assignment_that_fails_elsewhere_than_at_the_stub(tmp_path):
    nb = changed("ex2-total", "def total", "assert double.__doc__\nundefined\n\n\ndef total")
    assert "fails, but not at the stub: NameError" in complaints(tmp_path, nb)


def test_a_test_that_swallows_the_stub(tmp_path):
    nb = changed("test-ex2-total", "assert", "try:\n    total([1])\nexcept Exception:\n    assert False, 'no'\nassert")
    assert complaints(tmp_path, nb) == ""  # the stub is still behind it
    nb = changed(
        "test-ex2-total", "assert", "try:\n    total([1])\nexcept Exception as e:\n    raise KeyError from None\nassert"
    )
    assert complaints(tmp_path, nb) == ""  # even so: the context is kept


def test_a_reference_that_fails_its_test(tmp_path):
    nb = changed("ex1-double", "2 * x", "3 * x")
    assert "cell 4 (the test, after the reference) fails: AssertionError: not the double" in complaints(tmp_path, nb)


def test_a_failure_elsewhere_is_told_with_its_cell(tmp_path):
    nb = toy()
    nb.cells[8].source = "double(numbers)\nprint(undefined)"
    found = complaints(tmp_path, nb)
    assert found.startswith("cell 5 fails: NameError") and "print(undefined)" in found


def test_wrong_answers_that_are_missing(tmp_path):
    assert exercises.wrong_answers("none") == {}
    found = complaints(tmp_path, wrong={})
    assert found.count("0 wrong answers in tests/wrong_answers/01_toy.py; 2 are needed") == 2
    assert "1 wrong answers" in complaints(tmp_path, wrong={**WRONG, "ex1-double": WRONG["ex1-double"][:1]})
    assert "wrong answers to 'ex7', which is no exercise here" in complaints(tmp_path, wrong={**WRONG, "ex7": []})


def test_the_command_reads_the_wrong_answers_and_says_how_each_notebook_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    for folder in ("notebooks", "tests/wrong_answers"):
        (tmp_path / folder).mkdir(parents=True)
    good, bad = toy(), changed("test-ex2-total", "assert total(numbers) == 2 * sum(numbers)", "assert True")
    for name, nb in (("01_toy", good), ("02_toy", bad)):
        nb.cells[12].source = "total(numbers)"
        nbformat.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
        (tmp_path / "tests/wrong_answers" / f"{name}.py").write_text(f"WRONG = {WRONG!r}\n")
    assert exercises.wrong_answers("01_toy") == WRONG
    assert cli.main(["course", "check", "01"]) == 0
    assert "01_toy: 2 exercises, 4 wrong answers, as they should be (" in capsys.readouterr().out
    assert cli.main(["course", "check"]) == 1
    told = capsys.readouterr().out
    assert "02_toy: 2 exercises, 4 wrong answers, 3 complaints (" in told
    assert "  ex2-total: the wrong answer 'not doubled' passes the test" in told
    assert cli.main(["course", "check", "03"]) == 2


def test_an_exercise_without_a_test_cell(tmp_path):
    nb = toy()
    del nb.cells[11]
    assert "ex2-total: no test cell follows" in complaints(tmp_path, nb)


def test_an_exercise_without_markers(tmp_path):
    nb = changed("ex2-total", "    ### BEGIN SOLUTION\n", "")
    assert "one `### BEGIN SOLUTION`" in complaints(tmp_path, nb)


def test_a_trial_leaves_nothing_behind(tmp_path):
    nb = changed("test-ex1-double", "doubled = d", "import random\nleft, drawn = 1, random.random()\ndoubled = d")
    stain = "globals()['stain'] = random.seed(5)\nreturn [sum(numbers)]"
    wrong = {**WRONG, "ex1-double": [("stains", "sum", stain), WRONG["ex1-double"][1]]}
    draw = random.Random(0).random()
    nb.cells[8].source = f"assert 'stain' not in globals() and left == 1 and drawn == {draw!r}, drawn"
    before, here, names = random.getstate(), os.getcwd(), set(os.environ)
    assert complaints(tmp_path, nb, wrong) == ""
    random.setstate(before)
    assert os.getcwd() == here and set(os.environ) == names


def test_the_answer_is_put_between_the_markers():
    source = toy_notebook.SOLUTION_1 + "\n    # after"
    filled = exercises.answered(source, "\n        if numbers:\n            return 1\n        return 2\n    ")
    assert filled == (
        'def double(numbers):\n    """Each number, doubled."""\n'
        "    if numbers:\n        return 1\n    return 2\n    # after"
    )


def test_the_assignment_is_what_students_get():
    nb = toy()
    before = copy.deepcopy(nb)
    students = exercises.assignment(nb)
    assert nb == before and len(students.cells) == len(nb.cells)
    assert students.cells[6].source == (
        'def double(numbers):\n    """Each number, doubled."""\n'
        '    raise NotImplementedError("Write this part, then run the cell again.")'
    )
    assert "HIDDEN" not in students.cells[7].source and "square" not in students.cells[7].source
    kept = [i for i in range(len(nb.cells)) if i not in (6, 7, 10)]
    assert all(students.cells[i].source == nb.cells[i].source for i in kept)


def test_nbgrader_accepts_the_toy():
    MetadataValidator().validate_nb(toy())
    CheckCellMetadata().preprocess(toy(), {})
