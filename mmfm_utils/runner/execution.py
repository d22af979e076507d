"""Execute one notebook and say what went wrong.

papermill counts a notebook as a success when `sys.exit(0)` stood in its middle, when a parameter does not exist, and
when `!command` failed. So the source is checked before, and the cells, the kernel and the records after.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.engines import NotebookExecutionManager
from papermill.parameterize import parameterize_notebook

from .kernel import LOG, Client, Kernel, environment
from .notebook import code_cells, errors, first_line
from .stamps import versions

RUNNING = {}  # {name: client}, of the notebooks that run here


def blank(task: dict, *problems: str) -> dict:
    """A result in which nothing has happened yet."""
    same = {key: task[key] for key in ("name", "profile", "parameters", "key")}
    empty = {"rows": [], "metrics": [], "loaded": [], "seconds": 0.0, "peak_mb": 0.0, "device": "", "versions": {}}
    return same | empty | {"executed": "", "problems": list(problems)}


def execute(task: dict) -> dict:
    """Execute one notebook and say what went wrong. A function of plain data, so that any executor can run it.

    The task holds name, notebook (its JSON text), problems (of its source), trials (of its exercises), folder,
    parameters, profile, key, jobs and cell_timeout; the result holds what `blank` lists, with the executed notebook as
    JSON text, "" if nothing ran.
    """
    begun, nb = time.perf_counter(), nbformat.reads(task["notebook"], as_version=4)
    result = blank(task, *task["problems"]) | {"versions": versions()}
    if not result["problems"]:
        with tempfile.TemporaryDirectory(prefix="mmfm-") as folder:
            result |= _execute(nb, task, folder)
    return result | {"seconds": round(time.perf_counter() - begun, 1)}


def _execute(nb, task: dict, folder: str) -> dict:
    nb.metadata["papermill"] = {}
    for cell in nb.cells:  # papermill takes for granted what its own reader adds
        cell.metadata.setdefault("tags", [])
    nb = parameterize_notebook(nb, task["parameters"], kernel_name="python3", language="python")
    manager = NotebookExecutionManager(nb, progress_bar=False)
    manager.notebook_start()
    client = Client(
        manager,
        kernel_name="python3",
        kernel_manager_class=Kernel,
        log=LOG,
        timeout=task["cell_timeout"],
        startup_timeout=120,
        iopub_timeout=60,
        shutdown_kernel="immediate",
        force_raise_errors=True,  # also where a cell is tagged `raises-exception`
        store_widget_state=False,
    )
    client.trials, client.begun = task["trials"], time.monotonic()
    client.numbers = {id(cell): n for n, cell in enumerate(code_cells(nb), 1)}
    RUNNING[task["name"]] = client
    stopped, log = "", Path(folder) / "kernel.log"
    env = os.environ | environment(folder, task["profile"], task["jobs"])
    try:
        with log.open("wb") as stderr:
            cwd = task["folder"] if Path(task["folder"]).is_dir() else folder
            client.execute(env=env, cwd=cwd, stderr=stderr)
    except CellTimeoutError as error:
        stopped = f"ran longer than {task['cell_timeout']} s: make it smaller, or raise --cell-timeout"
        stopped = "its output did not arrive: run it again" if "IOPub" in str(error) else stopped
    except DeadKernelError:
        stopped = f"the kernel died ({how(client.exit_code)})"
    except Exception as error:  # the kernel did not start, or papermill itself failed
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        stopped = f"{type(error).__name__}: {first_line(error)} {first_line(*last)}".strip()
    finally:
        del RUNNING[task["name"]]
    records = Path(folder) / "records.json"
    records = json.loads(records.read_text(encoding="utf-8")) if records.exists() else {}
    problems = [*client.complaints, *_check_run(nb, client.at, stopped, records, task)]
    nb.metadata.papermill = {"parameters": task["parameters"]}
    kept = {key: records[key] for key in ("rows", "metrics", "loaded", "device") if key in records}
    return kept | {"problems": problems, "peak_mb": round(client.peak_mb, 1), "executed": nbformat.writes(nb)}


def how(code: int | None) -> str:
    """How a kernel ended, from its exit code."""
    told = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
    return told + (": out of memory?" if code == -9 else "")


def _check_run(nb, at: int, stopped: str, records: dict, task: dict) -> list[str]:
    """What went wrong while the cells ran, or in the end."""
    number = {id(cell): n for n, cell in enumerate(code_cells(nb), 1)}
    if stopped:
        cell = nb.cells[at]
        stopped = f"cell {number[id(cell)]}: {stopped}" if id(cell) in number else stopped
        if cell.cell_type == "code":
            cell.outputs.append(nbformat.v4.new_output("error", ename="Stopped", evalue=stopped, traceback=[stopped]))
        return [stopped]
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if problems := errors(nb):
        skipped = sum(cell.execution_count is None for cell in code)
        return problems + ([f"{skipped} cells after it did not run"] if skipped else [])
    for place, cell in enumerate(code, 1):
        if cell.execution_count != place:
            return [f"cell {number.get(id(cell), 'of the parameters')} did not run in its turn"]
    problems = [f"a hook is still open at the end: {hook}" for hook in records.get("open_hooks", [])]
    problems += records.get("widgets", [])
    problems += [] if records.get("closed") else ["the check after the last cell did not run: was the kernel left?"]
    for key, want in (("notebook", task["name"]), ("profile", task["profile"])):
        if records.get(key, want) != want:
            problems.append(f"findings.begin says {key}={records[key]!r}, but it is {want!r}")
    return problems
