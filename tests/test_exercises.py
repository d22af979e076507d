"""The harness that checks exercises, on a small notebook with faults; test_whole.py runs those of the notebooks."""

import copy

import nbformat
import pytest
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.preprocessors import CheckCellMetadata

from mmfm_utils import cli, runner, trials
from mmfm_utils.course import exercises
from tests import toy_notebook
from tests.notebook_contract import ROOT, notebooks
from tests.toy_notebook import WRONG, toy


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_nbgrader_accepts(path):
    nb = nbformat.read(path, as_version=4)
    MetadataValidator().validate_nb(nb)
    CheckCellMetadata().preprocess(nb, {})


def test_wrong_answers_belong_to_a_notebook():
    known = {path.stem for path in notebooks()}
    assert {path.stem for path in (ROOT / "tests" / "wrong_answers").glob("*.py")} <= known


# ---- the harness -------------------------------------------------------------------------------------------------


def complaints(nb=None, wrong=WRONG):
    """What is said of the toy up to its last test; its cells are executed here, which is faster than in a kernel."""
    nb, names = nb or toy(), {}
    found, tried = exercises.of(nb, toy_notebook.NAME, wrong)
    for cell in runner.code_cells(nb)[:-1] if tried else ():
        if (id := cell.metadata.get("nbgrader", {}).get("grade_id")) in tried:
            found += trials.check(names, **tried[id])
        try:
            exec(cell.source, names)
        except Exception as error:
            return "\n".join([*found, f"the notebook itself: {error!r}"])
    return "\n".join(found)


def checked(tmp_path, nb, wrong=WRONG):
    """The same of the whole toy, in a kernel."""
    nbformat.write(nb, tmp_path / f"{toy_notebook.NAME}.ipynb")
    return exercises.check(tmp_path / f"{toy_notebook.NAME}.ipynb", wrong)


def whole(nb):
    """The toy without findings, whose last cell only reads what came before."""
    nb.cells[12].source = "total(numbers)"
    return nb


def changed(grade_id, before, after):
    """The toy with a piece of one nbgrader cell replaced."""
    nb = toy()
    (cell,) = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id]
    assert before in cell.source
    cell.source = cell.source.replace(before, after)
    return nb


def test_a_good_notebook_passes(tmp_path):
    assert complaints() == ""
    assert checked(tmp_path, whole(toy())) == []


def test_all_that_is_wrong_is_told_and_the_rest_of_the_notebook_runs_too(tmp_path):
    nb, answer = whole(toy()), ("right by another way", "x", "return 2 * sum(numbers)")
    nb.cells[12].source = "raise SystemExit"
    assert checked(tmp_path, nb, {**WRONG, "ex2-total": [*WRONG["ex2-total"], answer]}) == [
        "ex2-total: the wrong answer 'right by another way' passes the test", "cell 8: SystemExit: "
    ]  # fmt: skip


def test_a_wrong_answer_that_ends_the_kernel(tmp_path):
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("leaves", "sum", "import os; os._exit(3)")]}
    assert checked(tmp_path, whole(toy()), wrong) == ["cell 6: the kernel died (exit code 3)"]


def test_an_exercise_that_cannot_be_tried_is_no_pass(tmp_path):
    nb = whole(toy())
    nb.cells[8].source = "import sys\nsys.modules['mmfm_utils.trials'] = None"
    (found,) = checked(tmp_path, nb)
    assert found.startswith("ex2-total: could not be tried: ModuleNotFoundError: ")


def test_a_notebook_without_exercises_is_not_run(tmp_path):
    nb = toy()
    nb.cells = [nb.cells[0], nbformat.v4.new_code_cell("raise SystemExit")]
    assert checked(tmp_path, nb, {}) == []


def test_a_wrong_answer_that_passes():
    wrong = {**WRONG, "ex2-total": [*WRONG["ex2-total"], ("right by another way", "x", "return 2 * sum(numbers)")]}
    assert complaints(wrong=wrong) == "ex2-total: the wrong answer 'right by another way' passes the test"


def test_a_wrong_answer_that_is_told_something_else():
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("a mean", "projection", "return 2.5")]}
    assert "is told 'this is not the sum of the doubled numbers', which does not match" in complaints(wrong=wrong)


@pytest.mark.parametrize("answer", ["return undefined", "return None + 1", "return (", "raise SystemExit"])
def test_a_wrong_answer_that_is_not_caught_by_an_assert(answer):
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("breaks", "sum", answer)]}
    assert "the test must catch it with a message of its own" in complaints(wrong=wrong)


def test_an_assert_without_a_message():
    nb = changed("test-ex2-total", ', "this is not the sum of the doubled numbers"', "")
    assert "is told ''" in complaints(nb)


def test_a_pattern_that_any_message_matches():
    wrong = {**WRONG, "ex2-total": [WRONG["ex2-total"][0], ("a mean", ".*", "return 2.5")]}
    assert "any message matches" in complaints(wrong=wrong)


def test_a_test_that_always_passes():
    found = complaints(changed("test-ex2-total", "assert total(numbers) == 2 * sum(numbers)", "assert True"))
    assert "ex2-total: the assignment runs through" in found and "'not doubled' passes the test" in found


def test_visible_tests_that_do_not_use_the_answer():
    nb = changed("test-ex2-total", "assert", "### BEGIN HIDDEN TESTS\nassert")
    nb.cells[11].source += "\n### END HIDDEN TESTS"
    assert complaints(nb) == (
        "ex2-total: the assignment runs through before anything is written; the visible test must use the answer"
    )


def test_an_assignment_that_fails_elsewhere_than_at_the_stub():
    nb = changed("ex2-total", "def total", "assert double.__doc__\nundefined\n\n\ndef total")
    assert "fails, but not at the stub: NameError" in complaints(nb)


def test_a_test_that_swallows_the_stub():
    nb = changed("test-ex2-total", "assert", "try:\n    total([1])\nexcept Exception:\n    assert False, 'no'\nassert")
    assert complaints(nb) == ""  # the stub is still behind it
    nb = changed(
        "test-ex2-total", "assert", "try:\n    total([1])\nexcept Exception as e:\n    raise KeyError from None\nassert"
    )
    assert complaints(nb) == ""  # even so: the context is kept


def test_a_reference_that_fails_its_test(tmp_path):
    nb = changed("ex1-double", "2 * x", "3 * x")
    assert checked(tmp_path, whole(nb))[0].startswith("cell 4: AssertionError: not the double")


def test_wrong_answers_that_are_missing():
    assert exercises.wrong_answers("none") == {}
    found = complaints(wrong={})
    assert found.count("0 wrong answers in tests/wrong_answers/01_toy.py; 2 are needed") == 2
    assert "1 wrong answers" in complaints(wrong={**WRONG, "ex1-double": WRONG["ex1-double"][:1]})
    assert "wrong answers to 'ex7', which is no exercise here" in complaints(wrong={**WRONG, "ex7": []})


def test_the_command_reads_the_wrong_answers_and_says_how_each_notebook_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    for folder in ("notebooks", "tests/wrong_answers"):
        (tmp_path / folder).mkdir(parents=True)
    good, bad = toy(), changed("test-ex2-total", "assert total(numbers) == 2 * sum(numbers)", "assert True")
    for name, nb in (("01_toy", good), ("02_toy", bad)):
        nbformat.write(whole(nb), tmp_path / "notebooks" / f"{name}.ipynb")
        (tmp_path / "tests/wrong_answers" / f"{name}.py").write_text(f"WRONG = {WRONG!r}\n")
    assert exercises.wrong_answers("01_toy") == WRONG
    assert cli.main(["course", "check", "01"]) == 0
    assert "01_toy: 2 exercises, 4 wrong answers, as they should be (" in capsys.readouterr().out
    assert cli.main(["course", "check"]) == 1
    told = capsys.readouterr().out
    assert "02_toy: 2 exercises, 4 wrong answers, 3 complaints (" in told
    assert "  ex2-total: the wrong answer 'not doubled' passes the test" in told
    assert cli.main(["course", "check", "03"]) == 2


def test_an_exercise_without_a_test_cell():
    nb = toy()
    del nb.cells[11]
    assert "ex2-total: no test cell follows" in complaints(nb)


def test_an_exercise_without_markers():
    nb = changed("ex2-total", "    ### BEGIN SOLUTION\n", "")
    assert "one `### BEGIN SOLUTION`" in complaints(nb)


def test_a_trial_leaves_nothing_behind(tmp_path):
    """No name, no draw from any random generator, and no figure; that no cell was counted is what the runner checks."""
    nb = whole(toy())
    nb.cells[4].source += """
import matplotlib.pyplot as plt
import numpy as np
import torch

torch.manual_seed(0)
np.random.seed(0)
own = [random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)]
one, two, three = own


def draw():
    plt.plot([1, 2])
    return (random.random(), np.random.random(), torch.rand(1).item(), one.random(), two.random(),
            torch.rand(1, generator=three).item())"""
    nb.cells[7].source = "left, drawn = 1, draw()\nplt.close()\n" + nb.cells[7].source
    stain = "globals()['stain'] = draw()\nglobals()['random'] = None\nprint('x')\nreturn [sum(numbers)]"
    wrong = {**WRONG, "ex1-double": [("stains", "sum", stain), WRONG["ex1-double"][1]]}
    fresh = {}
    exec(f"seed, n, profile, device = 0, 4, '', ''\n{nb.cells[4].source}\ndrawn = draw()\nplt.close()", fresh)
    same = f"'stain' not in globals() and left == 1 and drawn == {fresh['drawn']!r}"
    nb.cells[8].source = f"assert {same} and not plt.get_fignums(), drawn"
    assert checked(tmp_path, nb, wrong) == []


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
