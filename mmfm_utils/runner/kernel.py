"""A kernel of one's own for each notebook, watched while it lives."""

import ast
import contextlib
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path

import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient

from .. import findings
from ..machine import cores
from .notebook import errors, first_line

LOG = logging.getLogger("mmfm.kernel")  # what nbclient says is said again, shorter, in the line of the notebook
LOG.propagate = False
LOG.addHandler(logging.NullHandler())
logging.getLogger("asyncio").addFilter(lambda record: "Task was destroyed" not in record.getMessage())  # by a timeout
_stop, _kernels = threading.Event(), set()  # what an interrupt has to reach


class Kernel(AsyncKernelManager):
    """A kernel of the Python that runs this, whatever kernelspecs the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, language="python", display_name="Python 3 (ipykernel)")


class Client(PapermillNotebookClient):
    """papermill's client; while the kernel lives it watches its memory, and in the end it asks what was left open.

    Before an exercise the kernel tries what must fail there: `trials` maps grade_ids to what `trials.check` takes.
    """

    peak_mb, at, exit_code, stopped, group, children = 0.0, 0, None, "", None, frozenset()
    trials, complaints, numbers, cell = {}, (), {}, 0

    @property
    def cells(self) -> int:
        return len(self.numbers)

    def too_much(self, memory_mb: float, processes: int) -> str:
        """What the notebook takes beyond its due, for which it is stopped; nothing here, for those who limit it."""
        return ""

    def execute(self, **options):
        try:
            return super().execute(**options)
        finally:
            for process in self.children:
                _kill(process)
            if self.group and hasattr(os, "killpg"):  # a kernel leads a group, which outlives it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.group, signal.SIGKILL)

    def execute_cell(self, cell, index, **more):
        self.at, self.cell = index, self.numbers.get(id(cell), self.cell)
        if trial := self.trials and self.trials.get(cell.metadata.get("nbgrader", {}).get("grade_id")):
            self.complaints += self._try_out(cell, trial)
        return super().execute_cell(cell, index, **more)

    def _try_out(self, cell, trial: dict) -> tuple[str, ...]:
        """What is wrong with an exercise; the kernel is as it was before, and has counted no cell."""
        call = f"__import__('mmfm_utils.trials').trials.check(get_ipython().user_ns, **{trial!r})"
        asked = self.kc.execute("", silent=True, user_expressions={"found": call})
        found = self.wait_for_reply(asked, cell)["content"]["user_expressions"]["found"]
        if found["status"] != "ok":
            return (f"{trial['grade_id']}: could not be tried: {found['ename']}: {first_line(found['evalue'])}",)
        return tuple(ast.literal_eval(found["data"]["text/plain"]))

    def papermill_execute_cells(self):
        kernel, done = psutil.Process(self.km.provisioner.pid), threading.Event()
        self.group = kernel.pid if self.km.provisioner.pgid == kernel.pid else None
        watch = threading.Thread(target=self._watch, args=(kernel, done), daemon=True)
        _kernels.add(kernel)
        watch.start()
        try:
            if _stop.is_set():
                raise DeadKernelError("interrupted")
            super().papermill_execute_cells()
            if not errors(self.nb):
                close = "__import__('mmfm_utils.findings').findings.close()"
                self.wait_for_reply(self.kc.execute(close, silent=True), *self.nb.cells[-1:])
        except DeadKernelError:
            self.exit_code = self.km.provisioner.process.poll()
            raise
        finally:
            done.set()
            watch.join()
            _kernels.discard(kernel)

    def _watch(self, kernel: psutil.Process, done: threading.Event) -> None:
        while not done.wait(0.1):
            try:
                children = kernel.children(recursive=True)
                self.children |= set(children)
                now = sum(process.memory_info().rss for process in (kernel, *children)) / 2**20
                self.peak_mb = max(self.peak_mb, now, findings.peak_mb(kernel.pid))
            except psutil.Error:
                continue
            if stopped := self.too_much(now, len(children)):
                self.stopped = stopped
                for process in (kernel, *children):
                    _kill(process)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        pass


def resume_kernels() -> None:
    """Let kernels start again on this machine, after `stop_kernels`."""
    _stop.clear()


def stop_kernels() -> None:
    """End the kernels of this process, and let no other start."""
    _stop.set()
    for kernel in list(_kernels):
        _kill(kernel)


def usual_jobs(profile: str, write: bool) -> int:
    """How many notebooks run at once unless told otherwise: one a core where models are tiny, as far as memory goes
    (3 GB each), but four at most; one where models are large, and where times are to be committed."""
    if profile != "tiny" or write:
        return 1
    return max(1, min(4, cores(), int(psutil.virtual_memory().available / 3e9)))


def environment(folder: str, profile: str = "tiny", jobs: int = 1) -> dict:
    """What is set for every kernel: how many threads it may have, where its records go, nothing of the user's own."""
    share = 1 if profile == "tiny" else cores() // jobs  # more threads slow tiny models down
    wanted = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # of a list the first, as OpenMP reads it
    threads = max(1, min(share, int(wanted[1]) if wanted else share))
    pools = dict.fromkeys((f"{pool}_NUM_THREADS" for pool in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")), str(threads))
    path = filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    fixed = {
        "MMFM_RESULTS_FILE": f"{folder}/records.json",
        "PYTHONPATH": os.pathsep.join(path),
        "IPYTHONDIR": folder,  # no start-up files of the user
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    return pools | fixed | ({} if profile == "hub" else {"HF_HUB_OFFLINE": "1"})
