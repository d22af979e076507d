"""Execute notebooks, each in a kernel of its own, and make sure that something was tested: `run`."""

import json
import math
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path

from .. import UsageError, findings, say, write_atomic
from .execution import RUNNING, blank, execute, how
from .executors import make_executor
from .kernel import LOG, Client, Kernel, cores, environment, resume_kernels, stop_kernels, usual_jobs
from .notebook import check_source, code_cells, defaults, first_line, read
from .outputs import commit, readme_pictures
from .progress import Progress, last_seconds
from .report import LEDGER, changes, show, stored
from .stamps import stale, stamp, versions, weights_hash
from .tasks import (
    check_models,
    cuda_available,
    make_task,
    missing,
    parse_parameter,
    results_folder,
    select,
)

__all__ = [
    "LEDGER", "LOG", "Client", "Kernel", "blank", "changes", "check_source", "code_cells", "cores", "defaults",
    "environment", "execute", "first_line", "how", "make_task", "missing", "parse_parameter", "read",
    "readme_pictures", "run", "say", "select", "show", "stale", "stamp", "stored", "usual_jobs", "versions",
    "weights_hash",
]  # fmt: skip


def run(
    names=(),
    parameters=(),
    profile: str = "tiny",
    device: str = "auto",
    jobs: int = 1,
    executor: str | Executor = "local",
    resume: bool = False,
    results=None,
    cell_timeout: int = 1800,
    write: bool = False,
    exercises=None,
) -> int:
    """Run notebooks and say what came of it: 0 if all ran and agreed, 1 if not, 130 after an interrupt.

    With `exercises.of` their exercises are tried too, each in the kernel of its notebook.
    """
    begun = time.perf_counter()
    if jobs < 1 or cell_timeout < 1:
        raise UsageError(f"--jobs {jobs} --cell-timeout {cell_timeout}: both must be above 0")
    if write and (profile != "tiny" or parameters or device == "cuda"):
        raise UsageError("--write commits the reference run: use --profile tiny, no -p and no --device cuda")
    if device == "cuda" and executor == "local" and not cuda_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    findings.expected(profile)  # and the registry: an error in either belongs here, not after the first notebook
    tasks = [make_task(path, parameters, profile, device, jobs, cell_timeout, exercises) for path in select(names)]
    unfit = [task for task in tasks if profile not in task["profiles"]]
    if unfit and names:
        raise UsageError(f"{unfit[0]['name']} runs under {', '.join(unfit[0]['profiles'])}, not under {profile}")
    folder = results_folder(results, profile)
    pool = make_executor(executor, jobs) if isinstance(executor, str) else executor
    try:
        check_models([task for task in tasks if task not in unfit])
    except UsageError:
        pool.shutdown()
        raise
    tasks = [task for task in tasks if task not in unfit]
    where = getattr(pool, "where", f"on {executor}")
    say(f"Running {len(tasks)} notebooks, profile {profile}, device {device}, {where}; writing to {folder}")
    for task in unfit:
        say(f"{task['name']}: skipped, it does not run under {profile}")
    resume_kernels()
    counts, waiting = Counter(), {}
    usual = {task["name"]: last_seconds(task, folder) for task in tasks}
    progress = Progress(usual, jobs)
    if jobs > 1:  # the longest first, so that none runs alone at the end
        tasks.sort(key=lambda task: -(usual[task["name"]] or math.inf))
    try:
        for task in tasks:
            if old := resume and kept(folder, task):
                counts[finish(folder, task, old, write, "kept, ")] += 1
            else:
                waiting[pool.submit(execute, task)] = task
        while waiting:
            for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                task = waiting.pop(future)
                counts[finish(folder, task, outcome(future, task), write)] += 1
            progress.tell(dict(RUNNING), {task["name"] for task in waiting.values()})
    except KeyboardInterrupt:
        for future in waiting:
            future.cancel()
        stop_kernels()
        pool.stop() if isinstance(executor, str) else pool.shutdown(wait=False)
        show(folder)
        say(f"Interrupted after {counts.total()} of {len(tasks)} notebooks; with the same arguments, "
            "`mmfm run --resume` goes on from there")  # fmt: skip
        return 130
    if isinstance(executor, str):
        pool.shutdown()
    page = show(folder)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{counts.total()} notebooks in {time.perf_counter() - begun:.0f} s: {told}")
    say(f"report: {page}" if page else "no report")
    return 0 if page and set(counts) <= {"ok"} else 1


def kept(folder: Path, task: dict) -> dict | None:
    """The stored result of a task, if it was a success and nothing has changed since."""
    try:
        old = json.loads((folder / f"{task['name']}.json").read_text(encoding="utf-8"))
        old["executed"] = (folder / f"{task['name']}.ipynb").read_text(encoding="utf-8")
        return old if old["key"] == task["key"] and settle(old, task)["status"] == "ok" else None
    except (OSError, ValueError, KeyError):
        return None


def outcome(future: Future, task: dict) -> dict:
    try:
        return future.result()
    except Exception as error:  # a lost worker, a full temporary folder
        return blank(task, f"{type(error).__name__}: {first_line(error)}")


def settle(result: dict, task: dict) -> dict:
    """Add status and reason: failed (nothing to trust), disagrees (with what is committed), or ok."""
    known, problems, wrong = findings.registry(), list(result["problems"]), []
    owed = [f.id for f in known.values() if f.notebook == task["name"] and not f.not_done]
    if not problems:
        times = {row["id"]: row["times"] for row in result["rows"]}
        problems += [f"{id} was not judged" for id in owed if id not in times]
        problems += [f"{id} was judged {times[id]} times" for id in times if times[id] > 1]
        problems += [] if owed or result["metrics"] else ["it recorded no finding and no metric: nothing was tested"]
    committed = findings.expected(task["profile"], known, task["name"])
    if not problems and task["compared"] and (committed or task["profile"] == "tiny"):
        wrong = findings.compare(result["rows"], committed)
    status = "failed" if problems else "disagrees" if wrong else "ok"
    return result | {"status": status, "reason": "; ".join(problems or wrong)}


def finish(folder: Path, task: dict, result: dict, write: bool, note: str = "") -> str:
    """Settle a result, store it, print its line, and return its status."""
    result = settle(result, task)
    try:
        if write and result["status"] != "failed":
            result["problems"] = commit(task, result)
            result = settle(result, task)
        executed = result.pop("executed")
        if executed and not note:
            write_atomic(folder / f"{task['name']}.ipynb", executed)
        write_atomic(folder / f"{task['name']}.json", json.dumps(result, indent=1))
    except OSError as error:
        reason = (
            f"cannot write into {folder} ({error.strerror}): make room, then `mmfm run --resume`; the rest is intact"
        )
        result |= {"status": "failed", "reason": reason}
    verdicts = Counter(row["verdict"] for row in result["rows"])
    told = ", ".join(f"{verdicts[v]} {v}" for v in findings.VERDICTS if verdicts[v]) or "ran, nothing to judge"
    told = told if result["status"] == "ok" else f"{result['status'].upper()} {result['reason']}"
    told += "" if task["compared"] else "; not compared, because of -p"
    say(f"{task['name']}: {note}{told}  ({result['seconds']:.1f} s, {result['peak_mb']:.0f} MB)")
    return result["status"]
