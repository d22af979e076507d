"""Grading: hostile submissions harm themselves alone, behind the wall and without it; nothing that counts is lost."""

import copy
import csv
import os
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from mmfm_utils import UsageError, cli, course, grading
from mmfm_utils import root as project
from tests.toy_notebook import toy

NAME = "01_toy"
RIGHT = {"ex1-double": "return [2 * x for x in numbers]", "ex2-total": "return sum(double(numbers))"}
LIMITS = grading.Limits(cell_timeout=3, timeout=60, memory_mb=500)
DELETES = "import shutil; [shutil.rmtree(d, ignore_errors=True) for d in {folders!r}]"
STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
LAST = "zoe"  # who is graded after all others and does no harm
LEAVES = "import subprocess; subprocess.Popen(['sleep', '{marker}'])"


def wall_stands():
    try:
        grading.check_wall()
        return True
    except UsageError:
        return False


WALL = pytest.mark.skipif(not wall_stands(), reason="needs bubblewrap (apt install bubblewrap)")
BOTH = [pytest.param(True, marks=WALL, id="wall"), pytest.param(False, id="no wall")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A course with one assignment, to be copied."""
    base = tmp_path_factory.mktemp("built")
    nbformat.write(toy(), base / f"{NAME}.ipynb")
    course.build(base / "course", [str(base / f"{NAME}.ipynb")])
    return base / "course"


class Course:
    """A copy of a course, and a folder beside it in which work is handed in."""

    def __init__(self, base, built):
        self.base, self.folder, self.submissions = base, base / "course", base / "handed in"
        shutil.copytree(built, self.folder)
        self.released = self.folder / "release" / NAME / f"{NAME}.ipynb"

    def hand_in(self, student, ex1="", ex2="", change=lambda nb: None):
        """What a student wrote for the two exercises, before the right answer; `change` may spoil the notebook."""
        nb = nbformat.read(self.released, 4)
        for cell in nb.cells:
            id = cell.metadata.get("nbgrader", {}).get("grade_id")
            if id in RIGHT:
                lines = f"{ex1 if id == 'ex1-double' else ex2}\n{RIGHT[id]}".strip().splitlines()
                cell.source = cell.source.split("    raise")[0] + "\n".join("    " + line for line in lines)
        change(nb)
        path = self.submissions / student / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
        return path

    def grade(self, sandbox=False, **options):
        """The exit code, and {student: row of the table}."""
        code = grading.grade(self.submissions, folder=self.folder, limits=LIMITS, sandbox=sandbox, **options)
        return code, self.rows()

    def rows(self):
        with (self.folder / grading.TABLE).open(newline="") as file:
            return {row["student"]: row for row in csv.DictReader(file)}

    def points(self, *ids):
        """Of a student, in the gradebook, for each test."""
        with sqlite3.connect(self.folder / "gradebook.db") as book:
            return dict(
                book.execute(
                    "select base_cell.name, grade.auto_score from grade join base_cell on base_cell.id = grade.cell_id "
                    "join submitted_notebook on submitted_notebook.id = grade.notebook_id join submitted_assignment "
                    "on submitted_assignment.id = submitted_notebook.assignment_id where student_id = ?",
                    ids,
                )
            )

    def page(self, student):
        return (self.folder / "feedback" / student / NAME / f"{NAME}.html").read_text()


@pytest.fixture
def toys(tmp_path, built):
    return Course(tmp_path, built)


def of_tests(nb):
    return [cell for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("grade")]


def emptied(nb):
    for cell in of_tests(nb):
        cell.source = "pass"


def disguised(nb):
    for cell in of_tests(nb):
        cell.metadata["nbgrader"].update(grade=False, solution=True, locked=False, points=100)
        cell.source = "pass"


def deleted(nb):
    nb.cells = [cell for cell in nb.cells if not cell.metadata.get("nbgrader")]


def as_text(nb):
    for cell in of_tests(nb):
        nb.cells[nb.cells.index(cell)] = nbformat.v4.new_markdown_cell(cell.source, metadata=cell.metadata)


def duplicated(nb):
    nb.cells += copy.deepcopy(of_tests(nb))


@pytest.fixture(scope="module", params=BOTH)
def hostile(request, built, tmp_path_factory):
    """Work that does harm, and after all of it some that does none."""
    toys = Course(tmp_path_factory.mktemp("hostile"), built)
    folders = [str(toys.folder), str(toys.submissions)]
    marker = f"{os.getpid()}{int(request.param)}"
    pieces = {
        "loops": {"ex2": "while True: pass"},
        "loops_on": {"ex2": STUBBORN},
        "eats": {"ex2": "hoard = []\nwhile True: hoard.append(bytearray(10**7))"},
        "exits": {"ex2": "import os; os._exit(0)"},
        "leaves": {"ex2": "exit()"},
        "prints": {"ex2": "print('x' * 10**9)"},
        "babbles": {"ex2": "import time\nwhile True: print('y' * 10**6); time.sleep(0.05)"},
        "forks": {"ex2": f"for _ in range(200): {LEAVES.format(marker=marker)}\nimport time; time.sleep(2)"},
        "fails": {"ex2": "import sys; sys.exit(0)"},
        "deletes": {"ex2": DELETES.format(folders=folders)},
        "emptied": {"ex2": "return 0", "change": emptied},
        "disguised": {"ex2": "return 0", "change": disguised},
        "deleted": {"ex2": "return 0", "change": deleted},
        "as_text": {"ex2": "return 0", "change": as_text},
        "duplicated": {"ex2": "return 0", "change": duplicated},
    }
    for name, piece in pieces.items():
        toys.hand_in(name, **piece)
    toys.hand_in(LAST, "pass")
    for name, content in {
        "picture": b"\x89PNG\r\n",
        "list": b"[1, 2]",
        "deep": b"[" * 100_000,
        "old": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
    }.items():
        (toys.submissions / name).mkdir()
        (toys.submissions / name / f"{NAME}.ipynb").write_bytes(content)
    (toys.submissions / "essay").mkdir()
    (toys.submissions / "essay" / "essay.txt").write_text("On doubling")
    (toys.submissions / "link").mkdir()
    (toys.submissions / "link" / f"{NAME}.ipynb").symlink_to(toys.submissions / LAST / f"{NAME}.ipynb")
    before = {path: path.read_bytes() for path in toys.base.rglob("*.ipynb")}
    toys.code, toys.table = toys.grade(request.param)
    toys.pieces, toys.before, toys.wall, toys.marker = pieces, before, request.param, marker
    return toys


def test_a_neighbour_is_graded_and_nothing_of_theirs_is_lost(hostile):
    row = hostile.table[LAST]
    assert (row["status"], row["points"], row["of"], row["notes"]) == ("graded", "4", "4", ""), row
    assert "(Score: 2.0 / 2.0)" in hostile.page(LAST) and max(hostile.table) == LAST  # the last to be graded
    assert all("(Score: " in hostile.page(name) for name in hostile.pieces)  # also of those before `deletes`
    assert all(path.read_bytes() == content for path, content in hostile.before.items())
    handed_in = hostile.folder / "submitted"
    assert all((handed_in / name / NAME / f"{NAME}.ipynb").exists() for name in hostile.pieces)
    assert hostile.code == 1 and len(hostile.table) == len(hostile.pieces) + 1 + 6


@pytest.mark.parametrize(
    ("name", "status", "notes"),
    [
        ("loops", "graded", "1 cells ran longer than 3 s"),
        ("loops_on", "stopped", "did not end when it was interrupted"),
        ("eats", "stopped", "used more than 500 MB of memory"),
        ("exits", "stopped", "ended the kernel (exit code 0)"),
        ("babbles", "stopped", "printed more than 10 MB"),
        ("fails", "graded", ""),
    ],
)
def test_what_comes_of_it_is_told_and_points_earned_before_it_stay(hostile, name, status, notes):
    row = hostile.table[name]
    assert (row["status"], row["points"]) == (status, "2") and notes in row["notes"], row
    assert hostile.points(name) == {"test-ex1-double": 2, "test-ex2-total": 0}
    assert row["lost"].startswith("test-ex2-total: ") and "ex1" not in row["lost"]
    assert "(Score: 2.0 / 4.0)" in hostile.page(name)


def test_a_gigabyte_in_one_go_is_stopped(hostile):
    row = hostile.table["prints"]
    assert (row["status"], row["points"]) == ("stopped", "2")
    assert any(what in row["notes"] for what in ("memory", "printed"))
    assert len(hostile.page("prints")) < 5_000_000


def test_work_that_takes_too_long_in_all_or_fills_the_disk_is_stopped(toys, monkeypatch):
    toys.hand_in("ada", ex2="while True: pass")
    limits = grading.Limits(cell_timeout=60, timeout=3, memory_mb=500)
    assert grading.grade(toys.submissions, folder=toys.folder, limits=limits, sandbox=False) == 1
    assert (row := toys.rows()["ada"])["points"] == "2" and row["notes"] == "ran longer than 3 s in all"
    free = iter([100, *[49] * 10_000])
    monkeypatch.setattr(grading.kernel.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    row = toys.grade(again=True)[1]["ada"]
    assert row["status"] == "stopped" and row["notes"] == "filled half of what was free on the disk"


def test_a_message_that_is_too_large_never_gets_into_the_grader(toys, monkeypatch):
    seen, take = [], grading.kernel.Client.process_message

    def process_message(self, msg, *more):
        seen.append(len(str(msg)))
        return take(self, msg, *more)

    monkeypatch.setattr(grading.kernel, "OUTPUT", 100_000)
    monkeypatch.setattr(grading.kernel.Client, "process_message", process_message)
    toys.hand_in("ada", ex2="print('x' * 10**7)")
    row = toys.grade()[1]["ada"]
    assert (row["status"], row["points"]) == ("stopped", "2") and "printed too much at once" in row["notes"]
    assert 0 < max(seen) < 200_000


def test_processes_end_with_the_kernel(hostile):
    row = hostile.table["forks"]
    assert row["status"] == "stopped" and "started more than 100 processes" in row["notes"]
    running = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", hostile.marker] not in running


def test_deleting_is_in_vain(hostile):
    """Behind the wall there is nothing to delete; without it what was deleted is put back, and told."""
    row = hostile.table["deletes"]
    assert (row["status"], row["points"]) == ("graded", "4")
    assert bool(row["notes"]) != hostile.wall
    assert hostile.wall or "files of the course were deleted or changed, and put back" in row["notes"]


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("emptied", "test-ex1-double was changed; test-ex2-total was changed"),
        ("disguised", "test-ex1-double was changed; test-ex2-total was changed"),
        ("deleted", "ex1-double was deleted; test-ex1-double was deleted; ex2-total was deleted; test-ex2-total was"),
        ("as_text", "test-ex1-double was changed; test-ex2-total was changed"),
        ("duplicated", ""),
    ],
)
def test_locked_tests_come_back(hostile, name, notes):
    row = hostile.table[name]
    assert row["status"] == "graded" and notes in row["notes"] and bool(notes) == bool(row["notes"])
    assert row["points"] == ("0" if name == "deleted" else "2")


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("picture", "is not a notebook: "),
        ("list", "is not a notebook: "),
        ("deep", "is not a notebook: "),
        ("old", "is not a notebook: "),
        ("essay", "nothing in it is named like an assignment (01_toy)"),
        ("link", "is not a file of its own, but a link"),
    ],
)
def test_what_is_no_notebook_is_told(hostile, name, notes):
    row = hostile.table[name]
    assert (row["status"], row["points"]) == ("not graded", "0") and row["notes"].startswith(notes)


@WALL
def test_behind_the_wall_nothing_can_be_seen_or_reached(toys, monkeypatch):
    """The spy raises at the first thing that it can do."""
    monkeypatch.setenv("SECRET_OF_THE_TEACHER", "1")
    root = project()
    spy = f"""
import os, signal, socket
from pathlib import Path
for folder in {[str(toys.folder), str(toys.submissions), str(root / "notebooks"), str(root / "tests")]}:
    assert not Path(folder).exists() or not os.listdir(folder), folder
assert not [path for path in Path({os.path.expanduser("~")!r}).iterdir() if path.is_file()]
assert "SECRET_OF_THE_TEACHER" not in os.environ
assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 100]
for folder in ("/tmp", "/run", {str(root)!r}, {sys.prefix!r}, "/usr/bin", "/etc"):
    try:
        Path(folder, "mark").write_text("here")
    except OSError:
        continue
    raise AssertionError(folder)
try:
    socket.create_connection(("127.0.0.1", {{port}}), 1)
except OSError:
    pass
else:
    raise AssertionError("network")
import mmfm_utils.scenes
Path("mine").write_text("a folder of its own")
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        toys.hand_in("spy", spy.format(port=server.getsockname()[1]))
        code, rows = toys.grade(True)
    assert (code, rows["spy"]["points"]) == (0, "4"), rows["spy"]["lost"]


def test_without_a_wall_the_spy_sees_something(toys):
    """The control of the test before."""
    toys.hand_in("spy", f"import os\nassert not os.listdir({str(toys.folder)!r}), 'seen'")
    assert "AssertionError: seen" in toys.grade(False)[1]["spy"]["lost"]


def test_an_interrupted_grading_goes_on(toys, monkeypatch, capsys):
    for student in ("ada", "bob", "cyd"):
        toys.hand_in(student)
    execute, asked = grading.execute, []

    def interrupted(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return execute(*arguments)

    monkeypatch.setattr(grading, "execute", interrupted)
    command = ["course", "grade", str(toys.submissions), "--course", str(toys.folder), "--no-sandbox"]
    assert cli.main(command) == 130
    assert list(toys.rows()) == ["ada"]
    capsys.readouterr()
    assert cli.main(command) == 0 and len(asked) == 4
    told = capsys.readouterr().out
    assert "ada 01_toy: graded before, 4 of 4" in told and "bob 01_toy: graded, 4 of 4" in told
    assert list(toys.rows()) == ["ada", "bob", "cyd"]


def test_what_is_handed_in_anew_is_graded_anew_and_points_given_by_hand_count(toys):
    toys.hand_in("ada", ex2="return 0")
    toys.hand_in("bob")
    assert [row["points"] for row in toys.grade()[1].values()] == ["2", "4"]
    with sqlite3.connect(toys.folder / "gradebook.db") as book:
        book.execute("update grade set extra_credit = 1 where auto_score = 0")
    toys.hand_in("bob", ex1="return []")
    assert [row["points"] for row in toys.grade()[1].values()] == ["3", "0"]


def test_warnings_cost_nothing_and_helpers_in_cells_of_their_own_are_kept(toys):
    def helper(nb):
        nb.cells.insert(3, nbformat.v4.new_code_cell("import warnings\n\n\ndef twice(x):\n    return 2 * x"))

    toys.hand_in("ada", "warnings.warn('slow')\nreturn [twice(x) for x in numbers]", change=helper)
    code, rows = toys.grade()
    assert (code, rows["ada"]["points"], rows["ada"]["lost"]) == (0, "4", "")


def test_neither_page_nor_table_runs_what_a_student_wrote(toys):
    def scripts(nb):
        given = nbformat.v4.new_markdown_cell("<details><summary>Hint</summary>\n\nNone\n\n</details>")
        text = (
            "<script>alert('M')</script><img src=x onerror=alert('I')> [a](javascript:alert('L'))\n```\n<b>\n````\n<i>"
        )
        display = "from IPython.display import HTML, display\ndisplay(HTML('<script>alert(\"' + 'O' + '\")</script>'))"
        nb.cells[:0] = [given, nbformat.v4.new_markdown_cell(text), nbformat.v4.new_raw_cell(text)]
        nb.cells.insert(3, nbformat.v4.new_code_cell(display))

    released = nbformat.read(toys.released, 4)
    released.cells.insert(0, nbformat.v4.new_markdown_cell("<details><summary>Hint</summary>\n\nNone\n\n</details>"))
    nbformat.write(released, toys.released)
    toys.hand_in("=1+1", change=scripts)
    _, rows = toys.grade()
    assert rows["'=1+1"]["points"] == "4"
    page = toys.page("=1+1")
    assert "<details><summary>Hint</summary>" in page  # what teachers wrote stays
    assert not re.search(r"<script[^>]*>alert|<img[^>]* onerror|href=.javascript|<b>\n|<i>", page)


def test_nbgraders_own_layout_in_the_course_itself(toys):
    path = toys.hand_in("ada")
    place = toys.folder / "submitted" / "ada" / NAME / f"{NAME}.ipynb"
    place.parent.mkdir(parents=True)
    path.rename(place)
    (place.parent / "huge.bin").symlink_to("/dev/zero")  # would never end if it were copied
    assert grading.grade(toys.folder / "submitted", ["01"], limits=LIMITS, sandbox=False) == 0
    assert toys.rows()["ada"]["points"] == "4"


def test_requests_that_cannot_be_met(toys, tmp_path, monkeypatch, capsys):
    def told(*arguments):
        assert cli.main(["course", "grade", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "is no course: make one with `mmfm course build DIR`" in told(tmp_path / "gone")
    there = ["--course", toys.folder, "--no-sandbox"]
    assert "memory_mb=0): each must be above 0" in told(tmp_path / "gone", *there, "--memory", 0)
    assert "no folder" in told(tmp_path / "gone", *there)
    toys.submissions.mkdir()
    assert "nothing is handed in" in told(toys.submissions, *there)
    toys.hand_in("ada")
    assert "no assignment '01_toi'" in (text := told(toys.submissions, "01_toi", *there)) and "nearest: 01_toy" in text
    shutil.copytree(toys.folder / "release" / NAME, toys.folder / "release" / "01_tie")
    (toys.folder / "release" / "01_tie" / f"{NAME}.ipynb").rename(toys.folder / "release" / "01_tie" / "01_tie.ipynb")
    assert "'01_t' fits 01_tie, 01_toy" in told(toys.submissions, "01_t", *there)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = told(toys.submissions, "--course", toys.folder)
    assert "bubblewrap cannot wall off students' code here (it is not installed)" in text and "--no-sandbox" in text
    assert not (toys.folder / grading.TABLE).exists()


def test_a_full_disk_is_told_and_the_old_table_stays(toys, monkeypatch):
    toys.hand_in("ada")
    toys.grade()
    before = toys.rows()
    toys.hand_in("ada", ex1="return []")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grading, "write_atomic", full)
    with pytest.raises(UsageError, match="No space left on device.*: make room; the same command goes on"):
        toys.grade()
    assert toys.rows() == before


# ---- what other editors and systems leave behind


def test_a_notebook_of_another_editor_is_graded_like_any_other(toys):
    """A progress bar in Google Colab leaves a widget's state that nbconvert cannot read."""

    def colab(nb):
        kind = "application/vnd.jupyter.widget-{}+json"
        model = {"model_module": "@jupyter-widgets/controls", "model_name": "HBoxModel", "state": {}}
        nb.metadata |= {
            "widgets": {kind.format("state"): {"0f": model}},
            "colab": {"provenance": []},
            "accelerator": "GPU",
        }
        view = {kind.format("view"): {"model_id": "0f", "version_major": 2, "version_minor": 0}, "text/plain": "0%"}
        bar = nbformat.v4.new_code_cell("pass", metadata={"id": "a", "outputId": "b"})
        bar.outputs = [nbformat.v4.new_output("display_data", view)]
        nb.cells.insert(2, bar)

    def bare(nb):
        nb.metadata = {"widgets": {}, "vscode": {"interpreter": {"hash": "0"}}}

    handed = toys.hand_in("colab", change=colab).read_bytes()
    toys.hand_in("vscode", change=bare)
    code, rows = toys.grade()
    assert code == 0 and {row["points"] for row in rows.values()} == {"4"}
    assert "total" in toys.page("colab") and (toys.submissions / "colab" / f"{NAME}.ipynb").read_bytes() == handed


def test_what_lies_beside_the_submissions_is_passed_over_and_nobody_is_left_out(tmp_path):
    rubbish = [
        "__MACOSX/amy/._01_toy.ipynb",
        "lost+found/x",
        "Thumbs.db",
        ".git/x.ipynb",
        "grades.csv",
        "~old/01_toy.ipynb",
    ]
    rubbish += ["amy/._01_toy.ipynb", "amy/.ipynb_checkpoints/01_toy-checkpoint.ipynb", "amy/__pycache__/a.ipynb"]
    good = ["amy/01_toy.ipynb", "bob/01_toy/01_toy.ipynb", "bob/02_other.ipynb"]
    renamed = [
        "cat/01_toy (1).ipynb",
        "dan/01_toy-2.ipynb",
        "eve/Attempt 2/01_toy.ipynb",
        "fay/01_TOY.ipynb",
        "gus/01_toy copy.ipynb",
    ]
    for name in rubbish + good + renamed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "hal").mkdir()
    found = [str(path.relative_to(tmp_path)) for _, path in grading.handed_in(tmp_path, [])]
    assert found == sorted([*good, *renamed, "hal"])
    found = [str(path.relative_to(tmp_path)) for _, path in grading.handed_in(tmp_path, [NAME])]
    assert found == sorted([*good[:2], *renamed])


@pytest.mark.parametrize("name", [f"{NAME} (1)", f"{NAME}-2", NAME.upper(), f"Attempt 2/{NAME}"])
def test_a_renamed_submission_is_told_by_name_and_not_lost(toys, name):
    path = toys.hand_in("amy")
    (moved := toys.submissions / "amy" / f"{name}.ipynb").parent.mkdir(exist_ok=True)
    path.rename(moved)
    code, rows = toys.grade()
    assert code == 1 and moved.exists() and rows["amy"]["status"] == "not graded"
    assert rows["amy"]["notebook"].removesuffix(".ipynb") == name and f"call it {NAME}.ipynb" in rows["amy"]["notes"]


def test_two_who_grade_at_once_lose_no_row(toys, monkeypatch):
    toys.hand_in("amy"), toys.hand_in("bob")
    own, other = toys.submissions, toys.base / "others"
    toys.submissions = other
    toys.hand_in("cat")
    toys.submissions, plain, begun = own, grading._grade, []

    def meanwhile(folder, student, *more):
        done = plain(folder, student, *more)
        if not begun:
            begun.append(student)
            assert grading.grade(other, folder=toys.folder, limits=LIMITS, sandbox=False) == 0
        return done

    monkeypatch.setattr(grading, "_grade", meanwhile)
    code, rows = toys.grade()
    assert code == 0 and {student: row["points"] for student, row in rows.items()} == {
        "amy": "4",
        "bob": "4",
        "cat": "4",
    }


def test_sockets_fit_where_the_folder_for_temporary_files_is_deep(tmp_path, monkeypatch):
    """A path of more than 107 signs is none for a socket; behind the wall kernels have no other way to be reached."""
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(grading, "wall", lambda *_: [])  # only the sockets are those of the wall
    nb = toy()
    told = grading.execute(nb, grading.Limits(30, 60, 1000), [])
    assert not told["stopped"] and not any(o.output_type == "error" for c in nb.cells for o in c.get("outputs", []))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="set TMPDIR"):
        grading.execute(nb, grading.Limits(30, 60, 1000), [])
