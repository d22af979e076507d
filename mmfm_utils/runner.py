"""Execute notebooks, each in a kernel of its own, and make sure that something was tested.

papermill counts a notebook as a success when `sys.exit(0)` stood in its middle, when a parameter does not exist, and
when `!command` failed. So `execute` also checks the source before, and the cells, the kernel and the records after.
Cells are numbered as in the committed notebook: code cells that hold code, from 1, without the injected one.

Two hashes are kept apart. The *stamp* of a committed notebook covers its own cells and the weights of its families, so
that an edit elsewhere does not outdate its outputs. The *key* of a result covers whatever could change it (that, all
of mmfm_utils and data/, the parameters, the versions): `--resume` keeps a result only while the key is the same.
"""

import ast
import base64
import contextlib
import hashlib
import html
import io
import json
import logging
import os
import platform
import re
import signal
import symtable
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import cache
from importlib import metadata
from pathlib import Path

import nbformat
import psutil
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NotebookExecutionManager
from papermill.parameterize import parameterize_notebook
from PIL import Image

from . import UsageError, findings
from .findings import COLOURS, nearest, shown, write_atomic
from .progress import Progress, last_seconds

MAGICS = ("matplotlib", "config")  # the others hide failures, or reach outside the notebook
SHELLS = ("system", "getoutput", "run_line_magic", "run_cell_magic", "run_cell")  # what IPython turns them into
PACKAGES = "torch torchvision transformers diffusers open_clip_torch captum scikit-learn numpy matplotlib papermill"
MARKS = dict(zip(findings.VERDICTS, "✓≈✗–", strict=True))  # of verdicts, for those who do not tell colours apart
READY = ("intact", "from config", "cached")  # of the states that models.inventory knows
LIMIT_KB = 500  # of a committed notebook
MEASURED = re.compile(r"(<!--measured-->).*?(<!--/measured-->)", re.S)  # `--write` puts seconds and memory between
LEDGER = tuple("id notebook claim value control interval n verdict rule seconds peak_mb why".split())
LOG = logging.getLogger("mmfm.kernel")  # what nbclient says is said again, shorter, in the line of the notebook
LOG.propagate = False
LOG.addHandler(logging.NullHandler())
logging.getLogger("asyncio").addFilter(lambda record: "Task was destroyed" not in record.getMessage())  # by a timeout
_stop, _kernels = threading.Event(), set()  # what an interrupt has to reach
_running = {}  # {name: client}, of the notebooks that run here


def say(line: str) -> None:
    print(line, flush=True)


# ------------------------------------------------------------------------------------------------ reading a notebook
def read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.v4.upgrade(nbformat.reads(Path(path).read_text(encoding="utf-8"), as_version=4))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"{path} is not a notebook: {str(error).splitlines()[0]:.100}") from None


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(nb) -> list:
    """The cells that must run, in order; `In [n]` of the committed notebook is the place in this list."""
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return [cell for cell in code if "injected-parameters" not in tags(cell)]


def defaults(nb) -> dict:
    """The parameters and their defaults: the tagged cell may hold `name = literal` and nothing else."""
    tagged = [cell for cell in code_cells(nb) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise UsageError(f"{len(tagged) or 'no'} cells are tagged `parameters`: tag exactly one")
    found = {}
    for line in ast.parse(tagged[0].source).body:
        try:
            targets = [line.target] if isinstance(line, ast.AnnAssign) else line.targets
            (target,) = targets
            found[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            text = ast.unparse(line)
            raise UsageError(f"the `parameters` cell may hold only `name = literal`, not `{text}`") from None
    return found


def check_source(nb, parameters: dict) -> list[str]:
    """What would let this notebook pass without testing anything, as far as the source shows it."""
    problems, known, later, lines = [], {}, False, []
    try:
        known = defaults(nb)
        unknown = [name for name in parameters if name not in known]
        problems += [f"no parameter `{name}` in the tagged cell{nearest(name, known)}" for name in unknown]
    except (UsageError, SyntaxError) as error:
        problems.append(str(error))
    for number, cell in enumerate(code_cells(nb), 1):
        try:
            tree = ast.parse(TransformerManager().transform_cell(cell.source))
        except SyntaxError as error:
            problems.append(f"cell {number}: SyntaxError: {error.msg}")
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=base, attr=name), args=[_, *_] as args):
                    call, first = f"{ast.unparse(base)}.{name}", getattr(args[0], "value", "")
                    shell = call == "os.system" or (call.startswith("get_ipython().") and name in SHELLS)
                    if shell and not ("magic" in name and first in MAGICS):
                        what = f"%{first}" if "magic" in name else "!"
                        problems.append(f"cell {number}: `{what}` is not allowed, its failure would go unseen")
        lines += tree.body if later else []
        later = later or "parameters" in tags(cell)
    return problems + [problem for name in known if (problem := _unread(name, lines))]


def _unread(name: str, lines: list[ast.stmt]) -> str:
    """Why the value of a parameter cannot matter: it is overwritten before it is read, or never read. Else nothing."""
    for line in lines:
        tables = [symtable.symtable(ast.unparse(line), "cell", "exec")]
        for table in tables:
            tables += table.get_children()
        uses = [(table, table.lookup(name)) for table in tables if name in table.get_identifiers()]
        if any(use.is_referenced() and (table is tables[0] or use.is_global()) for table, use in uses):
            return ""
        if any(use.is_assigned() and table is tables[0] for table, use in uses):
            return f"parameter `{name}` is overwritten before it is read"
    return f"parameter `{name}` is never read after the tagged cell"


# ----------------------------------------------------------------------------------------------------- the kernel
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


def stop_kernels() -> None:
    _stop.set()
    for kernel in list(_kernels):
        _kill(kernel)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_jobs(profile: str, write: bool) -> int:
    """How many notebooks run at once unless told otherwise: one a core where models are tiny, as far as memory goes
    (3 GB each), but four at most; one where models are large, and where times are to be committed."""
    if profile != "tiny" or write:
        return 1
    return max(1, min(4, cores(), int(psutil.virtual_memory().available / 3e9)))


def environment(folder: str, profile: str = "tiny", jobs: int = 1) -> dict:
    """What is set for every kernel: how many threads it may have, where its records go, nothing of the user's own."""
    share = 1 if profile == "tiny" else cores() // jobs  # more threads slow tiny models down
    threads = max(1, min(share, int(os.environ.get("OMP_NUM_THREADS") or share)))
    pools = dict.fromkeys((f"{pool}_NUM_THREADS" for pool in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")), str(threads))
    path = filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    fixed = {
        "MMFM_RESULTS_FILE": f"{folder}/records.json",
        "PYTHONPATH": os.pathsep.join(path),
        "IPYTHONDIR": folder,  # no start-up files of the user
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    return pools | fixed | ({} if profile == "hub" else {"HF_HUB_OFFLINE": "1"})


def errors(nb) -> list[str]:
    """`cell 7: AssertionError: message` for every error in the outputs, also where papermill would forgive it."""
    found = [(n, o) for n, cell in enumerate(code_cells(nb), 1) for o in cell.outputs if o.output_type == "error"]
    return [f"cell {number}: {output.ename}: {first_line(output.evalue)}" for number, output in found]


def first_line(text="") -> str:
    """The first line of a message, without colours."""
    return (re.sub(r"\x1b\[[\d;]*m", "", str(text)).strip().splitlines() or [""])[0][:200]


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
    _running[task["name"]] = client
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
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        stopped = f"{type(error).__name__}: {first_line(error)} {first_line(*last)}".strip()
    finally:
        del _running[task["name"]]
    records = Path(folder) / "records.json"
    records = json.loads(records.read_text()) if records.exists() else {}
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


# ------------------------------------------------------------------------------------------------- hashes and stamps
def versions() -> dict:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


@cache
def _digest(path: str, size: int, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _tree(folder: Path, pattern: str, skip: str = "") -> list:
    """[name, hash] of every file in a folder that fits the pattern."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file() and skip not in path.parts)
    return [[str(p.relative_to(folder)), _digest(str(p), p.stat().st_size, p.stat().st_mtime_ns)] for p in files]


def _hash(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_hash(nb) -> str:
    """Of the code and Markdown that people wrote; what the runner fills in does not count."""
    return _hash([[cell.cell_type, tags(cell), MEASURED.sub(r"\1\2", cell.source)] for cell in nb.cells])


def weights_of(folders) -> dict[str, str]:
    """{folder: hash of its weights} of embedded models."""
    models = findings.root() / "data" / "models"
    return {folder: _hash(_tree(models / folder, "*.safetensors")) for folder in folders}


def weights_hash(nb) -> str:
    """As in stamps that do not say which models were loaded: of all the embedded weights of the notebook's families.

    The families are those of its metadata (`mmfm: {families: [...]}`), or all. A family's further models lie in folders
    beside its own: language, language_half.
    """
    models = findings.root() / "data" / "models"
    families = nb.metadata.get("mmfm", {}).get("families", []) or [""]
    folders = [name for family in families for name in (family, *sorted(p.name for p in models.glob(f"{family}_*")))]
    return _hash([[folder, _tree(models / folder, "*.safetensors")] for folder in folders])


def stamp(nb, loaded=(), profile: str = "tiny") -> dict:
    """What the outputs of a committed notebook were made from; loaded: the folders of the models that it opened."""
    return {"source": source_hash(nb), "weights": weights_of(loaded), "profile": profile, "packages": versions()}


def stale(nb) -> str:
    """Why the outputs of a committed notebook are out of date, or nothing."""
    old = nb.metadata.get("mmfm", {}).get("stamp", {})
    weights = old.get("weights", {})
    new = stamp(nb, weights if isinstance(weights, dict) else ())
    new |= {"weights": weights_hash(nb)} if isinstance(weights, str) else {}
    changed = [name for name in ("source", "weights", "profile") if old.get(name) != new[name]]
    what = f"its {' and '.join(changed)} changed since it ran" if old else "it carries no stamp"
    return f"{what}: make its outputs anew with `mmfm run NAME --write`" if changed else ""


def result_key(nb, parameters: dict, trials: dict) -> str:
    package, data = _tree(Path(__file__).parent, "*.py"), _tree(findings.root() / "data", "*", skip="expected")
    return _hash(source_hash(nb), package, data, parameters, versions(), trials)


# ------------------------------------------------------------------------------------------------------- the request
def select(names) -> list[Path]:
    """The notebooks that names, unique prefixes or paths stand for; all of notebooks/ when there are none."""
    folder, found = findings.root() / "notebooks", {}
    known = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    for name in names or known:
        fits = [stem for stem in known if stem == name] or [stem for stem in known if stem.startswith(name)]
        path = Path(name) if name.endswith(".ipynb") else known[fits[0]] if len(fits) == 1 else None
        if path is None and fits:
            raise UsageError(f"{name!r} fits {', '.join(fits)}: write more of the name")
        if path is None or not path.is_file():
            raise UsageError(f"no notebook {name!r}: give a path, or a name in {folder}{nearest(name, known)}")
        if found.setdefault(path.stem, path).resolve() != path.resolve():
            raise UsageError(f"{found[path.stem]} and {path} would share one result: run them one by one")
    if not found:
        raise UsageError(f"no notebooks in {folder}: give a path, or set MMFM_ROOT to the folder above notebooks/")
    return list(found.values())


def parse_parameter(text: str, known: dict) -> tuple:
    """('name', value) from `name=value`, with the type of the default."""
    name, equals, raw = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"-p {text}: write it as name=value")
    if name in ("profile", "device"):
        raise UsageError(f"-p {text}: use --{name} {raw}")
    if name not in known:
        raise UsageError(f"-p {text}: no such parameter{nearest(name, known)}")
    default = known[name]
    try:
        value = raw if isinstance(default, str) else float(raw) if isinstance(default, float) else yaml.safe_load(raw)
    except (ValueError, yaml.YAMLError):
        value = raw
    wanted = list if isinstance(default, tuple) else type(default)
    if default is not None and type(value) is not wanted:
        raise UsageError(f"-p {text}: {name} must be of type {wanted.__name__}, like its default {default!r}")
    return name, value


def make_task(path: Path, given, profile: str, device: str, jobs: int, cell_timeout: int, exercises=None) -> dict:
    """All that a worker must know, as plain data.

    `exercises(nb, name)` says what is wrong with the exercises as far as the source shows it, and what to try at each.
    """
    nb, parameters = read(path), {"profile": profile, "device": device}
    wrong, trials = exercises(nb, path.stem) if exercises else ([], {})
    try:
        known = defaults(nb)
    except (UsageError, SyntaxError):
        given = []  # the notebook is at fault, and its own line will say so
    try:
        parameters |= dict(parse_parameter(text, known) for text in given)
    except UsageError as error:
        raise UsageError(f"{path.stem}: {error}") from None
    return {
        "name": path.stem,
        "path": str(path),
        "folder": str(path.resolve().parent),
        "notebook": nbformat.writes(nb),
        "profiles": list(nb.metadata.get("mmfm", {}).get("profiles", findings.PROFILES)),
        "profile": profile,
        "parameters": parameters,
        # here, because threads of Python 3.11 cannot parse at the same time
        "problems": [*wrong, *check_source(nb, parameters)],
        "trials": trials,
        "compared": not given,  # with other parameters the committed values say nothing
        "key": result_key(nb, parameters, trials),
        "jobs": jobs,
        "cell_timeout": cell_timeout,
    }


def make_executor(name: str, jobs: int) -> Executor:
    """Threads here, each with a kernel process; or the workers of a Dask cluster that already runs."""
    if name == "local":
        return ThreadPoolExecutor(jobs)
    if not name.startswith("dask://") or name == "dask://":
        raise UsageError(f"--executor {name}: write local, or dask://HOST:PORT")
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--executor dask:// needs a package that is not installed: pip install distributed") from None
    try:
        return Client("tcp://" + name.removeprefix("dask://"), timeout=10).get_executor()
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {name}: start one there ({first_line(error)})") from None


def missing(needs: dict, profile: str, inventory: list[dict]) -> dict[str, str]:
    """The families that a notebook needs under a profile and whose default model is not ready: {family: what to do}."""
    hints = dict.fromkeys(needs.get("families", []), "there is none in this version")
    for row in reversed(inventory):  # the first of a family is the default, so it has the last word
        if row["profile"] == profile and row["family"] in needs.get("families", []):
            hints[row["family"]] = "" if row["state"] in READY else row["hint"] or "see `mmfm doctor`"
    return {family: hint for family, hint in hints.items() if hint}


def check_models(tasks: list[dict]) -> None:
    """Raise for what a notebook would only say after its kernel has started: a missing, damaged or unfetched model."""
    needing = [(task, nb.metadata.get("mmfm", {})) for task in tasks if (nb := read(Path(task["path"])))]
    if not any(needs.get("families") for _, needs in needing):
        return
    from . import models

    inventory = models.inventory()
    for task, needs in needing:
        for family, hint in missing(needs, task["profile"], inventory).items():
            raise UsageError(f"{task['name']} needs the {family} model, which is missing or damaged: {hint}")


def results_folder(results, profile: str) -> Path:
    folder = Path(results or findings.root() / "results") / profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write results into {folder} ({error.strerror}): choose another --results") from None
    return folder


def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


# ----------------------------------------------------------------------------------------------------------- the run
def run(
    names=(),
    parameters=(),
    profile: str = "tiny",
    device: str = "auto",
    jobs: int = 1,
    executor: str | Executor = "local",
    resume: bool = False,
    results=None,
    cell_timeout: int = 600,
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
    check_models([task for task in tasks if task not in unfit])
    tasks = [task for task in tasks if task not in unfit]
    where = f"{jobs} at once" if executor == "local" else f"on {executor}"
    say(f"Running {len(tasks)} notebooks, profile {profile}, device {device}, {where}; writing to {folder}")
    for task in unfit:
        say(f"{task['name']}: skipped, it does not run under {profile}")
    _stop.clear()
    counts, waiting = Counter(), {}
    progress = Progress({task["name"]: last_seconds(task, folder) for task in tasks}, jobs)
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
            progress.tell(dict(_running), {task["name"] for task in waiting.values()})
    except KeyboardInterrupt:
        for future in waiting:
            future.cancel()
        stop_kernels()
        pool.shutdown(wait=executor == "local")
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
        old = json.loads((folder / f"{task['name']}.json").read_text())
        old["executed"] = (folder / f"{task['name']}.ipynb").read_text()
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


def _with_palette(png: str, colours: int) -> str:
    """A PNG, base64, in so many colours that cover all of its own, the rare ones too: 256 are a third of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    small = io.BytesIO()
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    flat.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True, dpi=picture.info.get("dpi", (72, 72))
    )
    return base64.b64encode(small.getvalue()).decode()


def commit(task: dict, result: dict) -> list[str]:
    """Write outputs and stamp into the notebook, and the values into data/expected/<profile>.json.

    Figures have 256 colours, and fewer in a notebook that would be too large with these.
    """
    for colours in (256, 128, 64, 32):
        text = _committed(task, result, colours)
        if len(text.encode()) <= LIMIT_KB * 1000:
            break
    else:
        return [f"{len(text.encode()) // 1000} KB with its outputs, more than {LIMIT_KB}: make its figures smaller"]
    try:
        pictures = readme_pictures(nbformat.reads(text, as_version=4), task["name"])
    except UsageError as error:  # nothing is written then
        return [str(error)]
    path, known = findings.root() / "data" / "expected" / f"{task['profile']}.json", findings.registry()
    values = json.loads(path.read_text()) if path.exists() else {}
    values = {id: value for id, value in values.items() if id in known and known[id].notebook != task["name"]}
    values |= {row["id"]: {"verdict": row["verdict"], "value": row["value"]} for row in result["rows"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(dict(sorted(values.items())), indent=1) + "\n")
    write_atomic(Path(task["path"]), text)
    for path, picture in pictures.items():
        path.write_bytes(picture)
    return []


def readme_pictures(nb, name: str) -> dict[Path, bytes]:
    """README's pictures that a notebook draws: data/readme/NAME.7.png is the first figure of its code cell 7.

    Raises UsageError where that cell draws none any more.
    """
    found, cells = {}, code_cells(nb)
    for path in sorted((findings.root() / "data" / "readme").glob(f"{name}.*.png")):
        number = int(path.name.split(".")[-2])
        outputs = cells[number - 1].outputs if 0 < number <= len(cells) else []
        drawn = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        if not drawn:
            raise UsageError(f"{path.name}: code cell {number} of {name} draws no figure; rename it, and README's link")
        found[path] = base64.b64decode(drawn[0])
    return found


def _committed(task: dict, result: dict, colours: int) -> str:
    """The text of the notebook as it is committed: its outputs, their cost, its stamp."""
    source, ran = (nbformat.reads(text, as_version=4) for text in (task["notebook"], result["executed"]))
    for number, (cell, done) in enumerate(zip(code_cells(source), code_cells(ran)), 1):
        cell.execution_count = number
        cell.outputs = [o for o in done.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _with_palette(output["data"]["image/png"], colours)
            output |= {"execution_count": number} if "execution_count" in output else {}
    cost = rf"\g<1>{result['seconds']:.0f} s, {result['peak_mb'] / 1000:.1f} GB\g<2>"
    source.cells = [cell for cell in source.cells if "injected-parameters" not in tags(cell)]
    for cell in source.cells:
        cell.source = MEASURED.sub(cost, cell.source) if cell.cell_type == "markdown" else cell.source
        cell.metadata = {k: v for k, v in cell.metadata.items() if k not in ("papermill", "execution")}
    source.metadata = {k: v for k, v in source.metadata.items() if k not in ("papermill", "widgets")} | {
        "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
        "language_info": {"name": "python"},
        "mmfm": source.metadata.get("mmfm", {}) | {"stamp": stamp(source, result["loaded"], task["profile"])},
    }
    return nbformat.writes(source) + "\n"


# -------------------------------------------------------------------------------------------------------- the report
def stored(folder: Path) -> list[dict]:
    """The results in a folder, by name of the notebook."""
    found = []
    for path in sorted(path for path in folder.glob("*.json") if path.name != "ledger.json"):
        try:
            found += [result] if "status" in (result := json.loads(path.read_text())) else []
        except (ValueError, TypeError):
            say(f"{path} is damaged and left out: run its notebook again")
    return found


def show(folder: Path) -> Path | None:
    """Build ledger.json, ledger.md and report.html anew from all the results in a folder."""
    results, known = stored(folder), findings.registry()
    rows = [row for result in results if result["status"] != "failed" for row in result["rows"]]
    try:
        lines = [{k: row[k] for k in LEDGER} | _source(known.get(row["id"])) for row in rows]
        write_atomic(folder / "ledger.json", json.dumps(lines, indent=1))
        write_atomic(folder / "ledger.md", _markdown(results, rows))
        write_atomic(folder / "report.html", page(folder, results, rows))
        return (folder / "report.html").resolve()
    except OSError as error:
        say(f"cannot write the report into {folder} ({error.strerror}): make room, then `mmfm report`")


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:auto;padding:12px;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}td,h3{overflow-wrap:anywhere}
th,td{text-align:left;vertical-align:top;padding:4px 8px}
tr{border-bottom:1px solid #ddd}a{white-space:nowrap}img{max-width:100%;margin:6px 0}
@media(min-width:901px){td:first-child{white-space:nowrap}}
@media(max-width:900px){tr:has(th){display:none}tr{display:block;padding:8px 0}td{display:block;padding:1px 0}
td:empty{display:none}td::before{content:attr(data-h) ": ";color:#777}}"""


class _Html(str):
    """Text that needs no escaping."""


def _table(head: tuple, lines: list) -> str:
    """An HTML table; nothing where there are no lines."""
    if not lines:
        return ""
    body = ""
    for line in lines:
        cells = (cell if isinstance(cell, _Html) else html.escape(str(cell)) for cell in line)
        body += "<tr>" + "".join(f'<td data-h="{h}">{cell}</td>' for h, cell in zip(head, cells)) + "</tr>"
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table>"


def _figures(cells: list, name: str) -> str:
    """The PNGs of the cells tagged `figure` of a notebook, or all of its PNGs; each cell is a place to link to."""
    cells = [(n, cell) for n, cell in enumerate((c for c in cells if c.cell_type == "code"), 1) if _pngs(cell)]
    cells = [(n, cell) for n, cell in cells if "figure" in tags(cell)] or cells
    image, found = '<img alt="{}, cell {}" src="data:image/png;base64,{}">', ""
    for n, cell in cells:
        drawn = (image.format(html.escape(name), n, png.replace("\n", "")) for png in _pngs(cell))
        found += f'<div id="{html.escape(name)}-{n}">{"".join(drawn)}</div>'
    return found


def _pngs(cell) -> list[str]:
    return [o.data["image/png"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]


def _figure_of(cells: list, id: str) -> int | None:
    """The code cell with the figure nearest to where a finding is judged: above it in its section, or else below it."""
    judged = next((n for n, cell in enumerate(cells) if f'judge("{id}"' in re.sub(r"\(\s+", "(", cell.source)), None)
    if judged is None:
        return None
    for steps in (range(judged, -1, -1), range(judged + 1, len(cells))):
        for n in steps:
            if cells[n].cell_type == "markdown" and re.search(r"^##? ", cells[n].source, re.M):
                break
            if cells[n].cell_type == "code" and _pngs(cells[n]):
                return sum(cell.cell_type == "code" for cell in cells[: n + 1])
    return None


HEAD = ("id", "claim", "paper", "reported", "ours", "control", "interval", "verdict")


def _source(entry) -> dict:
    """What the registry says of where a finding comes from."""
    return {"paper": entry.source() if entry else "", "reported": entry.told() if entry else ""}


def _told(row: dict, entry) -> tuple:
    """A finding as the report tells it, without its verdict."""
    numbers = (shown(row[key]) for key in ("value", "control", "interval"))
    return row["id"], row["claim"], *_source(entry).values(), *numbers


COST = ("notebook", "status", "reason", "seconds", "peak MB", "device")


def _cost(results: list[dict]) -> list[tuple]:
    """How each notebook ran, and what it took."""
    return [(r["name"], r["status"], r["reason"], f"{r['seconds']:.1f}", f"{r['peak_mb']:.0f}", r["device"])
            for r in results]  # fmt: skip


def _packages(results: list[dict]) -> list[tuple]:
    """The environment: (package, version)."""
    return list((results[-1]["versions"] if results else {}).items())


def _markdown(results: list[dict], rows: list[dict]) -> str:
    """The findings, the notebooks and the environment as Markdown tables."""
    known = findings.registry()
    tables = {
        HEAD: [(*_told(row, known.get(row["id"])), row["verdict"]) for row in rows],
        COST: _cost(results),
        ("package", "version"): _packages(results),
    }
    text = []
    for head, lines in tables.items():
        cells = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
        text.append("".join(f"| {' | '.join(line)} |\n" for line in cells))
    return "\n".join(text)


def _map(rows: list[dict], known: dict) -> str:
    """The branches of the taxonomy, one a line, and in the column of each family the verdicts, with links."""
    families = dict.fromkeys(["contrastive", "generative", "diffusion", "language"])
    families |= dict.fromkeys(known[row["id"]].family for row in rows if row["id"] in known)
    link = '<a href="#{0}" style="color:{1}" title="{2}: {3}">{0}&nbsp;{4}</a> '
    lines = []
    for notebook in dict.fromkeys(row["notebook"] for row in rows):
        cells = dict.fromkeys(families, "")
        for row in rows:
            if row["notebook"] == notebook and row["id"] in known:
                told = (html.escape(row["id"]), COLOURS[row["verdict"]], row["verdict"], html.escape(row["claim"]))
                told += (MARKS[row["verdict"]],)
                cells[known[row["id"]].family] += link.format(*told)
        lines.append((notebook, *map(_Html, cells.values())))
    key = ", ".join(f'<b style="color:{COLOURS[v]}">{MARKS[v]} {v}</b>' for v in findings.VERDICTS)
    return f"<p>{key}</p>" + _table(("notebook", *families), lines)


def page(folder: Path, results: list[dict], rows: list[dict]) -> str:
    """report.html: self-contained, and readable on a phone."""
    known, count = findings.registry(), Counter(row["verdict"] for row in rows)
    lines, title = [], f"Findings, profile {folder.name}"
    paths = {r["name"]: folder / f"{r['name']}.ipynb" for r in results}
    ran = {
        name: [cell for cell in read(path).cells if "injected-parameters" not in tags(cell)]
        for name, path in paths.items()
        if path.exists()
    }
    for row in rows:
        verdict = f'<b style="color:{COLOURS[row["verdict"]]}">{row["verdict"]}</b> {html.escape(row["why"])}'
        figure = _figure_of(ran.get(row["notebook"], []), row["id"])
        figure = figure and _Html(f'<a href="#{html.escape(row["notebook"])}-{figure}">see it</a>') or ""
        id, *told = _told(row, known.get(row["id"]))
        lines.append((_Html(f'<span id="{html.escape(id)}">{html.escape(id)}</span>'), *told, _Html(verdict), figure))
    undone = [entry for entry in known.values() if entry.not_done]
    lines += [(f.id, f.claim, f.source(), f.told(), "", "", "", f"not done: {f.not_done}", "") for f in undone]
    numbers = [(r["name"], m["name"], f"{shown(m['value'])} {m['unit']}") for r in results for m in r["metrics"]]
    drawn = [(name, _figures(cells, name)) for name, cells in ran.items()]
    figures = "".join(f"<h3>{html.escape(name)}</h3>{pngs}" for name, pngs in drawn if pngs)
    summary = ", ".join(f"{count[v]} {v}" for v in findings.VERDICTS if count[v]) or "none judged"
    states = ", ".join(f"{n} {status}" for status, n in Counter(r["status"] for r in results).items())
    parts = {
        "Findings": _table((*HEAD, "figure"), lines),
        "Notebooks": _table(COST, _cost(results)),
        "Other numbers": _table(("notebook", "number", "value"), numbers),
        "Figures": figures,
        "Environment": _table(("package", "version"), _packages(results)),
    }
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p>Findings: {summary}.<br>Notebooks: {states}.</p>"
        + f'<h2 id="map">The map</h2>{_map(rows, known)}'
        + "".join(f'<h2>{name} <a href="#map">↑</a></h2>{part}' for name, part in parts.items() if part)
        + "</html>\n"
    )


def changes(old, new) -> list[str]:
    """What changed between two ledgers (files, or folders that hold one) beyond the tolerance of each finding."""
    ledgers, known = [], findings.registry()
    for path in map(Path, (old, new)):
        path = path / "ledger.json" if path.is_dir() else path
        try:
            ledgers.append({row["id"]: row for row in json.loads(path.read_text())})
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"no ledger at {path}: give a ledger.json, or the folder that holds it") from None
    before, after = ledgers
    want = {id: row | {"tolerance": known[id].tolerance if id in known else 0} for id, row in before.items()}
    lines = findings.compare([row for row in after.values() if row["id"] in before], want)
    return lines + [f"{id} is new" for id in after if id not in before]
