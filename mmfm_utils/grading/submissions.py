"""What was handed in: which files, whether they are notebooks of the course, their tests put back; and copies of the
course and of all submissions, for where no wall guards them."""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from copy import deepcopy
from pathlib import Path

import nbformat

from .. import UsageError, nearest, runner
from ..course.exercises import is_solution, is_test

LARGEST = 50_000_000  # bytes of a notebook that is read at all


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


class Kept:
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


def _rubbish(name: str) -> bool:
    """What systems and editors leave behind: hidden files and folders, macOS's archives, caches."""
    return name.startswith((".", "__", "~")) or name == "lost+found"


def _alike(name: str) -> str:
    """A name without what browsers and course systems add to it: "01_Toy (1)" and "01_toy-2" are alike."""
    return re.sub(r"([ _-]*(\(\d+\)|copy|\d+))+$", "", name.casefold()[2:]) + name[:2]


def handed_in(submissions: Path, names: list[str]) -> list[tuple[str, Path]]:
    """[(student, file)] in a folder that holds STUDENT/NAME/NAME.ipynb, as nbgrader has it, or STUDENT/NAME.ipynb.

    A file in another place, or of another name, is taken where a student has no better one, so that it can be told; of
    those who have none at all the folder stands for itself. What systems and editors leave behind is passed over.
    """
    if not submissions.is_dir():
        raise UsageError(f"no folder {submissions}: give the one that holds STUDENT/NAME.ipynb")
    found = []
    for student in sorted(path for path in submissions.iterdir() if path.is_dir() and not _rubbish(path.name)):
        inside = {path: path.relative_to(student).parts for path in sorted(student.rglob("*.ipynb"))}
        inside = {path: parts for path, parts in inside.items() if not any(map(_rubbish, parts))}
        good = {path.stem: path for path, parts in inside.items() if len(parts) == 1}
        good |= {path.stem: path for path, parts in inside.items() if len(parts) == 2 and parts[0] == path.stem}
        others = [path for path in inside if path not in good.values()]
        if names:
            lacking = {_alike(name) for name in names if name not in good}
            others = [path for path in (*good.values(), *others) if _alike(path.stem) in lacking]
            mine = [good[name] for name in names if name in good] + others
        else:
            mine = [*good.values(), *(others if not good else [])] or [student]
        found += [(student.name, path) for path in sorted(mine)]
    if not found:
        raise UsageError(f"nothing is handed in at {submissions}: it should hold STUDENT/NAME.ipynb")
    return found


def called(path: Path, student: Path) -> str:
    """The assignment that a file is called, or its path in its student's folder where it does not lie as it should."""
    parts = path.relative_to(student).parts
    return path.stem if parts in ((path.name,), (path.stem, path.name)) else str(path.relative_to(student))


def taken(path: Path, submissions: Path, folder: Path, known: list[str]) -> tuple[str, str]:
    """The text of a submission, and a hash of it and of its tests; UsageError for what is no notebook of the course."""
    if path.is_dir():
        raise UsageError(f"nothing in it is named like an assignment ({', '.join(known)})")
    if (name := called(path, submissions / path.relative_to(submissions).parts[0])) not in known:
        near = [each for each in known if _alike(each) == _alike(path.stem)]
        told = f": if it is {near[0]}, call it {near[0]}.ipynb" if near else nearest(name, known)
        raise UsageError(f"no assignment {name!r} in the course{told}")
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
