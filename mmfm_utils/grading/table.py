"""The table of grades, and the points in nbgrader's gradebook."""

import contextlib
import csv
import io
from pathlib import Path

from filelock import FileLock
from nbgrader.api import Gradebook, MissingEntry

from .. import UsageError, course, write_atomic

TABLE = "grades.csv"
HEAD = ("student", "notebook", "points", "of", "status", "notes", "lost", "seconds", "peak_mb", "feedback", "hash")


def points(folder: Path, student: str, name: str) -> dict:
    """What the gradebook says, where points given by hand count too; no points where it knows no submission."""
    with course.nbgrader(folder) as api, Gradebook(api.coursedir.db_url, api.coursedir.course_id) as book:
        points = of = ""
        with contextlib.suppress(MissingEntry):
            of = f"{book.find_notebook(name, name).max_score:g}"
            found = book.find_submission_notebook(name, name, student)
            points = f"{found.score - (found.late_submission_penalty or 0):g}"
        return {"points": points, "of": of}


def plain(text: str) -> str:
    """A text that a spreadsheet takes for a text, whatever a student wrote."""
    text = " ".join(text.split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def read(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [dict.fromkeys(HEAD, "") | row for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error, TypeError):
        return []


def add(path: Path, row: dict) -> None:
    """Put a row into the table, in place of an older one, or leave the table as it was.

    Somebody else may grade the same course at the same time: the table is read again under a lock.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        others = [old for old in read(path) if (old["student"], old["notebook"]) != (row["student"], row["notebook"])]
        _write(path, [*others, row])


def _write(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, HEAD, extrasaction="ignore")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["student"], row["notebook"])))
    try:
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): make room; the same command goes on") from None
