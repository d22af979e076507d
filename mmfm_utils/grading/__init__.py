"""Grade what students hand in, so that no submission harms another: `grade`.

nbgrader grades; what is added here stands around the kernel in which a submission runs (sandbox.py). The course is
copied into a file without a name before each kernel starts, and what is missing or changed after it is put back. With
the wall nothing is; without it, this guards the course and what was handed in, and nothing else.
"""

import contextlib
import csv
import io
import re
from pathlib import Path

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearOutput,
    LimitOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

from .. import UsageError, course, nearest, runner, say, write_atomic
from ..course.exercises import is_test
from .sandbox import OPEN, Limits, check_wall, execute
from .submissions import Kept, handed_in, restore, taken

__all__ = ["TABLE", "Limits", "check_wall", "execute", "grade", "handed_in"]
TABLE = "grades.csv"
HEAD = ("student", "notebook", "points", "of", "status", "notes", "lost", "seconds", "peak_mb", "feedback", "hash")


def grade(submissions, names=(), folder=None, limits: Limits | None = None, sandbox: bool = True, again: bool = False):
    """Grade submissions in the course around them, or in `folder`; 0 if all could be graded, 1 if not.

    Writes TABLE and nbgrader's feedback pages into the course, and points into its gradebook, which its formgrader
    shows. A submission that was graded before and is the same is left as it is, unless `again`; so an interrupted
    grading goes on. Raises UsageError for a folder that is no course or holds no submissions, and where the wall cannot
    be had.
    """
    submissions, limits = Path(submissions), limits or Limits()
    if min(limits.cell_timeout, limits.timeout, limits.memory_mb) < 1:
        raise UsageError(f"{limits}: each must be above 0")
    folder = Path(folder) if folder else submissions.parent
    if not (folder / course.MADE).exists():
        raise UsageError(f"{folder} is no course: make one with `mmfm course build DIR`, and say --course DIR")
    known = sorted(path.name for path in (folder / "release").glob("*") if (path / f"{path.name}.ipynb").is_file())
    todo = handed_in(submissions, [_named(name, known) for name in names])
    if sandbox:
        check_wall()
    say("Students' code runs behind a wall (bubblewrap)" if sandbox else f"No wall: {OPEN}")
    table, hidden = [], [folder, submissions] if sandbox else None
    kept = None if sandbox else Kept(folder.resolve(), submissions.resolve())
    rows = {(row["student"], row["notebook"]): row for row in _read(folder / TABLE)}
    for student, path in todo:
        name = "" if path.is_dir() else path.stem
        key = _plain(student), _plain(name)
        old, row = rows.get(key, {}), dict.fromkeys(HEAD, "") | dict(zip(HEAD, key))
        try:
            row |= _points(folder, student, name) if name in known else {}
            content, row["hash"] = taken(path, submissions, folder, known)
            same = not again and row["points"] and row["hash"] == old.get("hash")
            if same:
                row = old | {"points": row["points"]}
            else:
                row |= _grade(folder, student, name, content, limits, hidden, kept)
                row |= _points(folder, student, name)
        except UsageError as error:
            same, row = False, row | {"status": "not graded", "notes": _plain(str(error)), "hash": "", "points": "0"}
        except OSError as error:
            why = f"{error.strerror or error}"
            raise UsageError(f"cannot write into {folder} ({why}): make room; the same command goes on") from None
        rows[key] = row
        table.append(row)
        _write(folder / TABLE, rows.values())
        what = f"{row['status']} before" if same else row["status"]
        told = f": {row['notes']}" if row["notes"] else ""
        say(f"{student} {name}: {what}, {row['points']} of {row['of'] or '?'}{told}")
    bad = [row for row in table if row["status"] != "graded"]
    say(f"{len(table)} submissions, {len(bad)} of them with trouble")
    say(f"points: {folder / TABLE}; pages for students: {folder / 'feedback'}")
    return 1 if bad else 0


def _named(name: str, known: list[str]) -> str:
    """The assignment that a name, or the start of one, stands for."""
    fits = [each for each in known if each == name] or [each for each in known if each.startswith(name)]
    if len(fits) != 1:
        told = f"{name!r} fits {', '.join(fits)}" if fits else f"no assignment {name!r} in the course"
        raise UsageError(told + nearest(name, known) * (not fits))
    return fits[0]


def _grade(folder: Path, student: str, name: str, content: str, limits: Limits, hidden, kept: Kept | None) -> dict:
    """Let nbgrader grade one submission and write its feedback page: what the table says of it, without the points."""
    released = runner.read(folder / "release" / name / f"{name}.ipynb")
    place = folder / "submitted" / student / name / f"{name}.ipynb"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists() or place.read_text(encoding="utf-8") != content:
        write_atomic(place, content)
    told, notes, lost = {}, [], []

    class Restore(NbGraderPreprocessor):
        def preprocess(self, nb, resources):
            notes.extend(restore(nb, released))
            return nb, resources

    class Execute(NbGraderPreprocessor):
        def preprocess(self, nb, resources):
            if kept:
                kept.keep()
            try:
                told.update(execute(nb, limits, hidden))
                notes.extend(told["notes"])
            finally:
                if kept and (count := kept.put_back()):
                    notes.append(f"{count} files of the course were deleted or changed, and put back")
            for cell in filter(is_test, nb.cells):
                wrong = [output for output in cell.outputs if output.output_type == "error"][:1]
                lost.extend(f"{cell.metadata.nbgrader.grade_id}: {o.ename}: {o.evalue}" for o in wrong)
            return nb, resources

    steps = {
        "sanitize_preprocessors": [ClearOutput, Restore, OverwriteKernelspec, OverwriteCells, CheckCellMetadata],
        "autograde_preprocessors": [Execute, LimitOutput, SaveAutoGrades, AssignLatePenalties, CheckCellMetadata],
    }
    alone = {"ignore": ["*"]}  # only the notebook is taken, whatever lies beside it
    with course.nbgrader(folder, Autograde=steps, CourseDirectory=alone) as api:
        for step in (api.autograde, api.generate_feedback):
            done = step(name, student, force=True)
            if (
                done.get("error", "").rstrip().rsplit("\n", 1)[-1].startswith("KeyboardInterrupt")
            ):  # nbgrader catches it
                raise KeyboardInterrupt
            if not done["success"]:
                why = re.findall(r"^\s*([\w.]+: .+)$", done.get("log", "") + done["error"], re.M)
                raise UsageError(f"nbgrader cannot grade it: {runner.first_line([*why, done['error']][0])}")
    return {
        "status": "stopped" if told["stopped"] else "graded",
        "notes": _plain("; ".join(notes)),
        "lost": _plain("; ".join(runner.first_line(line) for line in lost)),
        "seconds": f"{told['seconds']:.0f}",
        "peak_mb": f"{told['peak_mb']:.0f}",
        "feedback": f"feedback/{student}/{name}/{name}.html",
    }


def _points(folder: Path, student: str, name: str) -> dict:
    """What the gradebook says, where points given by hand count too; no points where it knows no submission."""
    with course.nbgrader(folder) as api, Gradebook(api.coursedir.db_url, api.coursedir.course_id) as book:
        points = of = ""
        with contextlib.suppress(MissingEntry):
            of = f"{book.find_notebook(name, name).max_score:g}"
            found = book.find_submission_notebook(name, name, student)
            points = f"{found.score - (found.late_submission_penalty or 0):g}"
        return {"points": points, "of": of}


def _plain(text: str) -> str:
    """A text that a spreadsheet takes for a text, whatever a student wrote."""
    text = " ".join(text.split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _read(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [dict.fromkeys(HEAD, "") | row for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error, TypeError):
        return []


def _write(path: Path, rows) -> None:
    """Write the whole table anew, or leave the old one as it was."""
    text = io.StringIO()
    table = csv.DictWriter(text, HEAD, extrasaction="ignore")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["student"], row["notebook"])))
    try:
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): make room; the same command goes on") from None
