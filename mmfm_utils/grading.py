"""Grade what students hand in, so that no submission harms another: `grade`.

nbgrader grades; what is added here stands around the kernel in which a submission runs.

- The wall (bubblewrap, on Linux): the kernel can write into one folder of its own, which is thrown away. It sees no
  home folder, nothing of the course, no solutions, no other process, and no network; every other folder it can read.
- The limits, with the wall or without: seconds a cell and in all, memory, processes, output, a disk that must not fill.
- The course is copied into a file without a name before each kernel starts, and what is missing or changed after it is
  put back. With the wall nothing is; without it, this guards the course and what was handed in, and nothing else.

What is not isolated: a submission shares the kernel with the tests that judge it, so one that sets out to fool them
can, as everywhere in nbgrader; read what looks odd. It may use the processor as it likes until its time is over.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
import zmq
from nbclient.exceptions import CellTimeoutError, DeadKernelError
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
from papermill.engines import NotebookExecutionManager

from . import UsageError, course, findings, runner
from .exercises import is_solution, is_test
from .findings import nearest, write_atomic
from .runner import say

TABLE = "grades.csv"
HEAD = ("student", "notebook", "points", "of", "status", "notes", "lost", "seconds", "peak_mb", "feedback", "hash")
LARGEST = 50_000_000  # bytes of a notebook that is read at all
OUTPUT = 10_000_000  # characters that a submission may print or draw
PROCESSES = 100
KEPT = ("text/plain", "image/png", "image/jpeg")  # of an output: the feedback page runs nothing of a student's
OPEN = (
    "students' code runs as you: it can read, change and delete what you can. Only its time, memory and output are "
    "limited, and only the course and what was handed in are put back"
)


@dataclass
class Limits:
    """What a submission may take: seconds a cell, after which it is interrupted; seconds in all; MB of memory."""

    cell_timeout: int = 300
    timeout: int = 1800
    memory_mb: int = 4000


# ---------------------------------------------------------------------------------------------------------- the kernel
def wall(scratch: Path, hidden: list[Path]) -> list[str]:
    """The words of a command line that run what follows them behind the wall, with one folder of its own."""
    root, home = findings.root().resolve(), Path.home().resolve()
    solutions = [root / name for name in ("notebooks", "tests", "results", ".git")]
    empty = {path.resolve() for path in (Path("/tmp"), Path("/run"), home, *hidden, *solutions) if path.is_dir()}
    seen = {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[1], root}  # perhaps in the home
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


class _Kernel(runner.Kernel):
    """A kernel behind a wall. It is interrupted by a message, because a signal would reach the wall alone."""

    wall = ()

    @property
    def kernel_spec(self):
        spec = super().kernel_spec
        orphan = ["--IPKernelApp.parent_handle=1"] * bool(self.wall)  # behind the wall its parent cannot be seen
        spec.argv, spec.interrupt_mode = [*self.wall, *spec.argv, *orphan], "message"
        return spec

    def client(self, **options):
        made = super().client(**options)
        made.context.setsockopt(zmq.MAXMSGSIZE, 2 * OUTPUT)  # a gigabyte in one message never gets into this process
        return made


class _Client(runner.Client):
    """The runner's client, with limits."""

    def limit(self, limits: Limits, scratch: Path) -> None:
        self.limits, self.scratch, self.printed, self.late = limits, scratch, 0, 0
        self.end, self.free = time.monotonic() + limits.timeout, shutil.disk_usage(scratch).free

    def too_much(self, memory_mb: float, processes: int) -> str:
        reasons = {
            f"used more than {self.limits.memory_mb} MB of memory": memory_mb > self.limits.memory_mb,
            f"ran longer than {self.limits.timeout} s in all": time.monotonic() > self.end,
            f"printed more than {OUTPUT / 1e6:.0f} MB": self.printed > OUTPUT,
            f"started more than {PROCESSES} processes": processes > PROCESSES,
            "filled half of what was free on the disk": shutil.disk_usage(self.scratch).free < self.free / 2,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] != "status":
            self.printed += len(str(msg["content"]))
            if self.printed > OUTPUT:
                return None
        return super().process_message(msg, cell, cell_index)

    async def _async_handle_timeout(self, timeout, cell=None):
        if cell is not None:  # also where the interrupt is caught and the cell ends well
            self.late += 1
            cell.outputs.append(_error(f"ran longer than {timeout} s and was interrupted"))
        return await super()._async_handle_timeout(timeout, cell)


def _error(what: str):
    return nbformat.v4.new_output("error", ename="Stopped", evalue=what, traceback=[f"Stopped: {what}"])


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
    with tempfile.TemporaryDirectory(prefix="mmfm-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder).resolve()
        kernel = _Kernel(connection_file=f"{scratch}/connection.json")
        if hidden is not None:  # no network: sockets are files
            kernel.wall, kernel.transport, kernel.ip = wall(scratch, hidden), "ipc", f"{scratch}/socket"
        manager = NotebookExecutionManager(part, progress_bar=False)
        manager.notebook_start()
        client = _Client(
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
            stopped = _run(client, env=_environment(scratch), cwd=str(scratch), stderr=stderr)
    for i, cell in enumerate(part.cells):
        if stopped and i >= client.at and cell.cell_type == "code":
            cell.outputs = [*cell.outputs, _error(stopped)] if i == client.at else [_error("did not run")]
    for cell in part.cells:
        if cell.cell_type == "code":
            cell.outputs = [_clean(output, is_test(cell)) for output in cell.outputs]
    late = [f"{client.late} cells ran longer than {limits.cell_timeout} s"] if client.late else []
    notes = [*late, stopped] if stopped else late
    return {"stopped": bool(stopped), "notes": notes, "seconds": time.monotonic() - begun, "peak_mb": client.peak_mb}


def _run(client: _Client, **options) -> str:
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
        log = runner.first_line(*(client.scratch / "kernel.log").read_text(errors="replace").splitlines()[-1:])
        raise UsageError(f"its kernel failed: {type(error).__name__}: {runner.first_line(error)} {log}") from None


def _environment(scratch: Path) -> dict:
    """Nothing of the user's environment, which may hold passwords, but what a program needs to start."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "MMFM_ROOT": str(findings.root())}
    return {name: os.environ[name] for name in kept if name in os.environ} | runner.environment(str(scratch)) | own


def _clean(output, of_test: bool):
    """An output without what a browser would run.

    Of a test nbgrader would take a warning for a failure, and a value that is shown for the points: both are only text.
    """
    if output.output_type == "stream":
        return nbformat.v4.new_output("stream", name="stdout" if of_test else output.name, text=output.text)
    if "data" in output:
        return nbformat.v4.new_output("display_data", {k: v for k, v in output.data.items() if k in KEPT})
    return output


# ------------------------------------------------------------------------------------------------- what was handed in
def restore(nb, released) -> list[str]:
    """Put the tests of the released notebook back into a submission, and say which were not as they should be.

    Exercises that were deleted come back empty; other cells, and what stands in the exercises, stay as they are. But
    text that students wrote is shown as it was typed: as Markdown it could run scripts in a teacher's browser.
    """
    given = {cell.source for cell in released.cells if cell.cell_type == "markdown"}
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" and cell.source not in given:
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", cell.source)), default=0))
            nb.cells[i] = nbformat.v4.new_markdown_cell(f"{fence}text\n{cell.source}\n{fence}", metadata=cell.metadata)
    theirs, notes, at = {}, [], 0
    for cell in nb.cells:
        mark = cell.metadata.pop("nbgrader", None)
        id = mark.get("grade_id") if isinstance(mark, dict) else None
        if isinstance(id, str):
            theirs.setdefault(id, cell)
    for cell in released.cells:
        if not (is_solution(cell) or is_test(cell)):
            continue
        id, new = cell.metadata["nbgrader"]["grade_id"], deepcopy(cell)
        mine = theirs.get(id)
        if mine is None:
            notes.append(f"{id} was deleted")
            nb.cells.insert(at, new)
        else:
            at = next(i for i, other in enumerate(nb.cells) if other is mine)
            if is_solution(cell):
                new.source = mine.source
            elif (mine.cell_type, mine.source) != (cell.cell_type, cell.source):
                notes.append(f"{id} was changed")
            new.id = mine.get("id", new.id)
            nb.cells[at] = new
        at += 1
    return notes


class _Kept:
    """Copies of all files in some folders, in a file without a name, which nobody can delete."""

    def __init__(self, *folders: Path):
        self.folders, self.file, self.known = folders, tempfile.TemporaryFile(), {}

    @staticmethod
    def _state(path: Path) -> tuple:
        """What changes when a file is written to, moved or replaced, whatever is done to hide it."""
        found = path.lstat()
        return found.st_ino, found.st_size, found.st_ctime_ns, found.st_mode

    def keep(self) -> None:
        """Copy what is new or changed, and forget what is gone."""
        before, self.known = self.known, {}
        for path in (path for folder in self.folders for path in folder.rglob("*")):
            state = self._state(path)
            if path in before and before[path][0] == state:
                self.known[path] = before[path]
            elif stat.S_ISLNK(state[3]):
                self.known[path] = state, os.readlink(path), 0
            elif stat.S_ISREG(state[3]):
                at = self.file.seek(0, os.SEEK_END)
                self.known[path] = state, at, self.file.write(path.read_bytes())

    def put_back(self) -> int:
        """Put back what is missing or changed since `keep`; how many files were."""
        count = 0
        for path, (state, kept, size) in list(self.known.items()):
            with contextlib.suppress(OSError):
                if self._state(path) == state:
                    continue
            for above in path.parents:
                inside = any(above.is_relative_to(folder) for folder in self.folders)
                if inside and (above.is_symlink() or (above.exists() and not above.is_dir())):
                    above.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if stat.S_ISLNK(state[3]):
                path.symlink_to(kept)
            else:
                self.file.seek(kept)
                path.write_bytes(self.file.read(size))
                path.chmod(stat.S_IMODE(state[3]))
            self.known[path] = self._state(path), kept, size
            count += 1
        return count


def handed_in(submissions: Path, names: list[str]) -> list[tuple[str, Path]]:
    """[(student, file)] in a folder that holds STUDENT/NAME/NAME.ipynb, as nbgrader has it, or STUDENT/NAME.ipynb.

    The folder of a student in which there is neither stands for itself.
    """
    if not submissions.is_dir():
        raise UsageError(f"no folder {submissions}: give the one that holds STUDENT/NAME.ipynb")
    found = []
    for student in sorted(submissions.iterdir()):
        if student.is_dir() and not student.name.startswith("."):
            paths = {path.stem: path for path in student.glob("*.ipynb")}
            paths |= {path.stem: path for path in student.glob("*/*.ipynb") if path.stem == path.parent.name}
            paths = {name: path for name, path in paths.items() if name in names} if names else paths or {"": student}
            found += [(student.name, paths[name]) for name in sorted(paths)]
    if not found:
        raise UsageError(f"nothing is handed in at {submissions}: it should hold STUDENT/NAME.ipynb")
    return found


# ------------------------------------------------------------------------------------------------------------ grading
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
    kept = None if sandbox else _Kept(folder.resolve(), submissions.resolve())
    rows = {(row["student"], row["notebook"]): row for row in _read(folder / TABLE)}
    for student, path in todo:
        name = "" if path.is_dir() else path.stem
        key = _plain(student), _plain(name)
        old, row = rows.get(key, {}), dict.fromkeys(HEAD, "") | dict(zip(HEAD, key))
        try:
            row |= _points(folder, student, name) if name in known else {}
            content, row["hash"] = _take(path, submissions, folder, known)
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


def _take(path: Path, submissions: Path, folder: Path, known: list[str]) -> tuple[str, str]:
    """The text of a submission, and a hash of it and of its tests; UsageError for what is no notebook of the course."""
    if path.is_dir():
        raise UsageError(f"nothing in it is named like an assignment ({', '.join(known)})")
    if path.stem not in known:
        raise UsageError(f"no assignment {path.stem!r} in the course{nearest(path.stem, known)}")
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or path.resolve() != submissions.resolve() / path.relative_to(submissions):
            raise UsageError("is not a file of its own, but a link or something else")
        if about.st_size > LARGEST:
            raise UsageError(f"has {about.st_size / 1e6:.0f} MB; {LARGEST / 1e6:.0f} are read at most")
        content = path.read_text(encoding="utf-8")
        nb = nbformat.v4.upgrade(nbformat.reads(content, as_version=4))
        nbformat.validate(nb)
    except UsageError:
        raise
    except Exception as error:  # whatever it is, it is this student's alone
        raise UsageError(f"is not a notebook: {runner.first_line(error)[:100]}") from None
    source = folder / "source" / path.stem / path.name
    judged = source.read_bytes() if source.is_file() else b""
    return content, hashlib.sha256(content.encode() + judged).hexdigest()[:16]


def _grade(folder: Path, student: str, name: str, content: str, limits: Limits, hidden, kept: _Kept | None) -> dict:
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


# ----------------------------------------------------------------------------------------------------------- the table
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
