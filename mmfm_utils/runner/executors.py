"""Who executes notebooks: threads here, each with a kernel process, or the workers of a running Dask cluster."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor

from .. import UsageError
from .execution import blank
from .kernel import resume_kernels, stop_kernels
from .notebook import first_line
from .stamps import project_hash


class Threads(ThreadPoolExecutor):
    """So many notebooks at once on this machine."""

    def __init__(self, jobs: int):
        super().__init__(jobs)
        self.where = f"{jobs} at once"

    def stop(self) -> None:
        """Wait for the kernels, which are ended elsewhere, and start none of those that wait."""
        self.shutdown(cancel_futures=True)


class Dask(Executor):
    """The workers of a cluster, one notebook for each of a worker's threads.

    Raises UsageError where no scheduler answers, no worker is there, or one has another version of the project.
    """

    def __init__(self, name: str):
        try:
            from distributed import Client
        except ImportError:
            raise UsageError(f"{name} needs a package that is not installed: pip install distributed") from None
        try:
            self.client = Client("tcp://" + name.removeprefix("dask://"), timeout=10)
        except (OSError, ValueError) as error:
            raise UsageError(f"no Dask scheduler answers at {name}: start one there ({first_line(error)})") from None
        self.where = f"on {name}"
        try:
            self._check(name)
        except BaseException:
            self.client.close()
            raise

    def _check(self, name: str) -> None:
        versions = self.client.run(project_hash, on_error="return")
        if not versions:
            raise UsageError(f"{name} has no workers: start some with `dask worker {name.removeprefix('dask://')}`")
        other = [address for address, found in versions.items() if found != project_hash()]
        if other:
            raise UsageError(
                f"{len(other)} of {len(versions)} workers have another version of this project, or none ({other[0]}): "
                "check out the same commit there, and start them again"
            )
        self.client.run(resume_kernels)

    def submit(self, fn, task: dict) -> Future:
        """As of any executor, for `execute`: a notebook whose worker was killed is not tried on the next one."""
        return self.client.get_executor(pure=False, retries=0).submit(_once, fn, task, f"{task['name']} {id(self)}")

    def stop(self) -> None:
        """End the kernels on all workers, and start none of those that wait."""
        self.client.run(stop_kernels, on_error="ignore")
        self.client.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.client.close()


def _once(fn, task: dict, label: str) -> dict:
    """What `fn` makes of a task, but not twice: a notebook that took one worker's memory would take the next one's."""
    from distributed import Event

    begun = Event(label)
    if begun.is_set():
        return blank(task, "its worker was killed: out of memory?")
    begun.set()
    return fn(task)


def make_executor(name: str, jobs: int) -> Threads | Dask:
    """The executor that a name stands for: "local" or "dask://HOST:PORT"."""
    if name == "local":
        return Threads(jobs)
    if not name.startswith("dask://") or name == "dask://":
        raise UsageError(f"--executor {name}: write local, or dask://HOST:PORT")
    return Dask(name)
