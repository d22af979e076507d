"""The kernel in which a submission runs, and its limits: seconds, memory, processes, output, disk."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import zmq

from .. import root, runner

OUTPUT = 10_000_000  # characters that a submission may print or draw
PROCESSES = 100
KEPT = ("text/plain", "image/png", "image/jpeg")  # of an output: the feedback page runs nothing of a student's


@dataclass
class Limits:
    """What a submission may take: seconds a cell, after which it is interrupted; seconds in all; MB of memory."""

    cell_timeout: int = 300
    timeout: int = 1800
    memory_mb: int = 4000


class Kernel(runner.Kernel):
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


class Client(runner.Client):
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
            cell.outputs.append(error(f"ran longer than {timeout} s and was interrupted"))
        return await super()._async_handle_timeout(timeout, cell)


def error(what: str):
    return nbformat.v4.new_output("error", ename="Stopped", evalue=what, traceback=[f"Stopped: {what}"])


def environment(scratch: Path) -> dict:
    """Nothing of the user's environment, which may hold passwords, but what a program needs to start."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "MMFM_ROOT": str(root())}
    return {name: os.environ[name] for name in kept if name in os.environ} | runner.environment(str(scratch)) | own


def clean(output, of_test: bool):
    """An output without what a browser would run.

    Of a test nbgrader would take a warning for a failure, and a value that is shown for the points: both are only text.
    """
    if output.output_type == "stream":
        return nbformat.v4.new_output("stream", name="stdout" if of_test else output.name, text=output.text)
    if "data" in output:
        return nbformat.v4.new_output("display_data", {k: v for k, v in output.data.items() if k in KEPT})
    return output
