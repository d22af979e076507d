"""Grade what students hand in, so that no submission harms another: `grade`.

nbgrader grades; what is added here stands around the kernel in which a submission runs.

- The wall (bubblewrap, on Linux): the kernel can write into one folder of its own, which is thrown away. It sees no
  home folder, nothing of the course, no solutions, no other process, and no network; every other folder it can read.
- The limits, with the wall or without: see kernel.py.
- The course is copied into a file without a name before each kernel starts, and what is missing or changed after it is
  put back. With the wall nothing is; without it, this guards the course and what was handed in, and nothing else.

What is not isolated: a submission shares the kernel with the tests that judge it, so one that sets out to fool them
can, as everywhere in nbgrader; read what looks odd. It may use the processor as it likes until its time is over.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellTimeoutError, DeadKernelError
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
from papermill.engines import NotebookExecutionManager

from .. import UsageError, course, nearest, root, runner, say, write_atomic
from ..course.exercises import is_test
from .kernel import Client, Kernel, Limits, clean, environment, error
from .submissions import Kept, called, handed_in, restore, taken
from .table import HEAD, TABLE, add, plain, points, read

__all__ = ["TABLE", "Limits", "check_wall", "execute", "grade", "handed_in"]
OPEN = (
    "students' code runs as you: it can read, change and delete what you can. Only its time, memory and output are "
    "limited, and only the course and what was handed in are put back"
)


def wall(scratch: Path, hidden: list[Path]) -> list[str]:
    """The words of a command line that run what follows them behind the wall, with one folder of its own."""
    project, home = root().resolve(), Path.home().resolve()
    solutions = [project / name for name in ("notebooks", "tests", "results", ".git")]
    empty = {path.resolve() for path in (Path("/tmp"), Path("/run"), home, *hidden, *solutions) if path.is_dir()}
    seen = {
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(__file__).resolve().parents[2],
        project,
    }  # perhaps in the home
    (scratch / "shm").mkdir(exist_ok=True)
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", scratch / "shm", "/dev/shm"]
    for path in sorted((empty | seen) - {Path("/")}):  # a folder before what lies in it
        words += ["--tmpfs", path] if path in empty else ["--ro-bind", path, path]
    words += ["--bind", scratch, scratch]
    for path in empty - {Path("/")}:  # a tmpfs is memory, which a submission could fill
        words += ["--remount-ro", path]
    return [*map(str, words), "--"]


def check_wall() -> None:
    """Raise UsageError where students' code cannot be walled off."""
    with tempfile.TemporaryDirectory(prefix="mmfm-") as scratch:
        try:
            done = subprocess.run([*wall(Path(scratch), []), "true"], capture_output=True, text=True)
            why = done.returncode and runner.first_line(done.stderr)
        except OSError:
            why = "it is not installed"
    if why:
        raise UsageError(
            f"bubblewrap cannot wall off students' code here ({why}): on Linux install it (apt install bubblewrap), or "
            f"grade on a machine that has nothing to lose and say --no-sandbox; then {OPEN}"
        )


def execute(nb, limits: Limits, hidden: list[Path] | None) -> dict:
    """Run the cells of a submission up to its last test, and say what came of it; `nb` gets the outputs.

    Behind the wall unless `hidden` is None; these folders cannot be seen there. A cell that fails stops nothing. What
    ends the kernel fails the test at which that happened and those after it; tests passed before count.
    """
    begun, last = time.monotonic(), max((i for i, cell in enumerate(nb.cells) if is_test(cell)), default=-1)
    part = nbformat.from_dict({**nb, "cells": []})
    part.cells = nb.cells[: last + 1]
    part.metadata["papermill"] = {}
    for cell in part.cells:
        cell.metadata.setdefault("tags", [])  # papermill takes for granted what its own reader adds
    with tempfile.TemporaryDirectory(prefix="mmfm-", dir=_near(), ignore_cleanup_errors=True) as folder:
        scratch = Path(folder).resolve()
        kernel = Kernel(connection_file=f"{scratch}/connection.json")
        if hidden is not None:  # no network: sockets are files
            kernel.wall, kernel.transport, kernel.ip = wall(scratch, hidden), "ipc", f"{scratch}/socket"
        manager = NotebookExecutionManager(part, progress_bar=False)
        manager.notebook_start()
        client = Client(
            manager,
            km=kernel,
            log=runner.LOG,
            timeout=limits.cell_timeout,
            startup_timeout=120,
            iopub_timeout=10,
            interrupt_on_timeout=True,
            error_on_timeout={"ename": "Stopped", "evalue": "interrupted", "traceback": []},
            allow_errors=True,
            shutdown_kernel="immediate",
            store_widget_state=False,
        )
        client.limit(limits, scratch)
        with (scratch / "kernel.log").open("wb") as stderr:
            stopped = _run(client, env=environment(scratch), cwd=str(scratch), stderr=stderr)
    for i, cell in enumerate(part.cells):
        if stopped and i >= client.at and cell.cell_type == "code":
            cell.outputs = [*cell.outputs, error(stopped)] if i == client.at else [error("did not run")]
    for cell in part.cells:
        if cell.cell_type == "code":
            cell.outputs = [clean(output, is_test(cell)) for output in cell.outputs]
    late = [f"{client.late} cells ran longer than {limits.cell_timeout} s"] if client.late else []
    notes = [*late, stopped] if stopped else late
    return {"stopped": bool(stopped), "notes": notes, "seconds": time.monotonic() - begun, "peak_mb": client.peak_mb}


def _near() -> str | None:
    """Where scratch folders go: None, the usual place, unless its path is too long for a socket in it (107 signs)."""
    if len(tempfile.gettempdir()) < 70:
        return None
    for folder in ("/tmp", "/var/tmp"):
        if os.access(folder, os.W_OK):
            return folder
    raise UsageError(f"the path of {tempfile.gettempdir()} is too long for a socket: set TMPDIR to a shorter one")


def _run(client: Client, **options) -> str:
    """Why the kernel ended before the last cell did, or nothing."""
    try:
        client.execute(cleanup_kc=True, **options)
        return client.stopped
    except CellTimeoutError as error:
        if client.stopped or "IOPub" not in str(error):
            return client.stopped or runner.first_line(error)
        return "did not end when it was interrupted, or printed too much at once"
    except DeadKernelError:
        return client.stopped or f"ended the kernel ({runner.how(client.exit_code)})"
    except Exception as error:
        if client.stopped:
            return client.stopped
        log = runner.first_line(
            *(client.scratch / "kernel.log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        )
        raise UsageError(f"its kernel failed: {type(error).__name__}: {runner.first_line(error)} {log}") from None


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
    rows = {(row["student"], row["notebook"]): row for row in read(folder / TABLE)}
    for student, path in todo:
        name = "" if path.is_dir() else called(path, submissions / student)
        key = plain(student), plain(name)
        old, row = rows.get(key, {}), dict.fromkeys(HEAD, "") | dict(zip(HEAD, key))
        try:
            row |= points(folder, student, name) if name in known else {}
            content, row["hash"] = taken(path, submissions, folder, known)
            same = not again and row["points"] and row["hash"] == old.get("hash")
            if same:
                row = old | {"points": row["points"]}
            else:
                row |= _grade(folder, student, name, content, limits, hidden, kept)
                row |= points(folder, student, name)
        except UsageError as error:
            same, row = False, row | {"status": "not graded", "notes": plain(str(error)), "hash": "", "points": "0"}
        except OSError as error:
            why = f"{error.strerror or error}"
            raise UsageError(f"cannot write into {folder} ({why}): make room; the same command goes on") from None
        table.append(row)
        add(folder / TABLE, row)
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
            nb.metadata.pop("widgets", None)  # of other editors' widgets nbconvert may want what is not there
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
        "notes": plain("; ".join(notes)),
        "lost": plain("; ".join(runner.first_line(line) for line in lost)),
        "seconds": f"{told['seconds']:.0f}",
        "peak_mb": f"{told['peak_mb']:.0f}",
        "feedback": f"feedback/{student}/{name}/{name}.html",
    }
