"""The wall and the limits around the kernel in which a submission runs.

- The wall (bubblewrap, on Linux): the kernel can write into one folder of its own, which is thrown away. It sees no
  home folder, nothing of the course, no solutions, no other process, and no network; every other folder it can read.
- The limits, with the wall or without: seconds a cell and in all, memory, processes, output, a disk that must not fill.

What is not isolated: a submission shares the kernel with the tests that judge it, so one that sets out to fool them
can, as everywhere in nbgrader; read what looks odd. It may use the processor as it likes until its time is over.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import zmq
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.engines import NotebookExecutionManager

from .. import UsageError, root, runner
from ..course.exercises import is_test

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
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "MMFM_ROOT": str(root())}
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
