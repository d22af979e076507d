"""The nbgrader course that is made of the notebooks."""

import sqlite3

import nbformat
import pytest

from mmfm_utils import UsageError, cli, course, runner
from mmfm_utils.course.exercises import assignment
from tests.notebook_contract import NOTEBOOKS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "new"
    return folder, course.build(folder, ["00_tour", "05_task_vectors"])


@pytest.mark.parametrize("name", ["00_tour", "05_task_vectors"])
def test_students_get_the_assignment_face_and_nothing_of_the_solutions(built, name):
    folder, _ = built
    original = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    released = nbformat.read(folder / "release" / name / f"{name}.ipynb", 4)
    given, wanted = ([cell.source for cell in runner.code_cells(nb)] for nb in (released, assignment(original)))
    assert given == wanted
    solutions = [cell for cell in original.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    assert sum(course.STUB in source for source in given) == len(solutions) > 1
    assert not any(marker in source for source in given for marker in ("BEGIN SOLUTION", "BEGIN HIDDEN"))
    assert not any(cell.outputs for cell in released.cells if cell.cell_type == "code")
    assert (folder / "source" / name / f"{name}.ipynb").read_bytes() == (NOTEBOOKS / f"{name}.ipynb").read_bytes()


def test_the_gradebook_knows_the_points(built):
    folder, _ = built
    with sqlite3.connect(folder / "gradebook.db") as book:
        known = dict(book.execute("select base_cell.name, max_score from grade_cells join base_cell using (id)"))
    for name in ("00_tour", "05_task_vectors"):
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
        tests = [each for cell in cells if (each := cell.metadata.get("nbgrader", {})).get("grade")]
        assert tests and all(known[each["grade_id"]] == each["points"] for each in tests)


def test_building_again_leaves_what_was_handed_in_and_set_alone(built):
    folder, paths = built
    handed_in = folder / "submitted" / "ada" / "00_tour" / "00_tour.ipynb"
    handed_in.parent.mkdir(parents=True)
    handed_in.write_text("hers")
    (folder / course.MADE).write_text('{"CourseDirectory": {"course_id": "spring"}}')
    paths[0].write_text("spoilt")
    assert course.build(folder, ["00"]) == paths[:1]
    assert handed_in.read_text() == "hers" and nbformat.read(paths[0], 4)
    assert "spring" in (folder / course.MADE).read_text()


def test_requests_that_cannot_be_met(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else than a course: name a new folder"):
        course.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert cli.main(["course", "build", str(tmp_path / "new"), "00_tuor"]) == 2
    assert "nearest: 00_tour" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert cli.main(["course"]) == 2
    twice = nbformat.read(NOTEBOOKS / "00_tour.ipynb", 4)
    again = next(cell for cell in twice.cells if cell.metadata.get("nbgrader", {}).get("grade"))
    twice.cells.append(nbformat.v4.new_code_cell(again.source, metadata=again.metadata))
    nbformat.write(twice, tmp_path / "twice.ipynb")
    with pytest.raises(UsageError, match=r"nbgrader refuses twice\.ipynb: Notebook failed to validate"):
        course.build(tmp_path / "new", [str(tmp_path / "twice.ipynb")])


def test_the_command(tmp_path, capsys):
    assert cli.main(["course", "build", str(tmp_path / "new"), "00"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/new/release/00_tour/00_tour.ipynb" in out and "course took" in out
