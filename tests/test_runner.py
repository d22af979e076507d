"""Every silent pass, as a small notebook that must be reported as failed; and what a run leaves behind."""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mmfm_utils import UsageError, findings, runner
from mmfm_utils.runner import progress

REPOSITORY = Path(__file__).parents[1]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PARAMETERS = 'profile = "tiny"\ndevice = "auto"\nseed = 0'
READ = "print(device, seed)"
MEASURE = "findings.metric('answer', 42)"
ENTRY = {key: "x" for key in ("family", "claim", "paper", "arxiv", "reported", "measured", "control")}
ENTRY |= {"verified": True, "rule": "value > control", "tolerance": 0.01}


def begin(name):
    return f"from mmfm_utils import findings\nfindings.begin(notebook={name!r}, profile=profile, seed=seed)"


def judge(key, value=0.5):
    return f"findings.judge({key!r}, value={value}, control=0.1, interval=(0.2, 0.6), n=9)"


class World:
    """A folder with notebooks/, data/ and results/, as the runner knows it."""

    def __init__(self, folder: Path):
        self.folder, self.entries, self.expected = folder, [], {}
        for name in ("notebooks", "data/expected"):
            (folder / name).mkdir(parents=True)

    def add(self, name, *cells, parameters=PARAMETERS, finding=None, metadata=None, **committed):
        """A notebook of these cells after the usual ones; a string is the source of a code cell."""
        usual = [new_markdown_cell("# Toy <!--measured--><!--/measured-->")]
        usual += [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
        cells = [*usual, begin(name), READ, *cells]
        nb = new_notebook(cells=[new_code_cell(c) if isinstance(c, str) else c for c in cells], metadata=metadata or {})
        for cell in nb.cells:
            if cell.cell_type == "code":  # what an earlier run left must not be taken for a result
                cell.execution_count = 1 + nb.cells.index(cell)
        nbformat.write(nb, self.path(name))
        if finding:
            self.entries.append(ENTRY | {"id": finding, "notebook": name})
            self.expected[finding] = {"verdict": "reproduced", "value": 0.5} | committed
        (self.folder / "data/findings.yaml").write_text(yaml.safe_dump(self.entries))
        (self.folder / "data/expected/tiny.json").write_text(json.dumps(self.expected))

    def path(self, name):
        return self.folder / "notebooks" / f"{name}.ipynb"

    def read(self, name):
        return json.loads((self.folder / "results/tiny" / name).read_text())

    def run(self, *names, **options):
        """The exit code and the lines."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = runner.run(names, **options)
        return code, out.getvalue().splitlines()

    def start(self, *arguments, **options):
        environment = os.environ | {"MMFM_ROOT": str(self.folder), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "mmfm_utils.cli", "run", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    return World(tmp_path)


# ---------------------------------------------------------------------------------------------------- silent passes
FAILS = {  # name: what its line must say
    "b_exit": r"cell 4: SystemExit: 0; 2 cells after it did not run",
    "b_exit_hard": r"cell 4: the kernel died \(exit code 0\)",
    "b_raises_tag": r"cell 4: ZeroDivisionError: division by zero",
    "b_long_error": r"cell 4: AssertionError: first line",
    "b_unknown": r"no parameter `device` in the tagged cell",
    "b_no_tag": r"no cells are tagged `parameters`",
    "b_derived": r"only `name = literal`, not `double = 2 \* seed`",
    "b_unread": r"parameter `n` is never read after the tagged cell",
    "b_shadowed": r"parameter `n` is never read after the tagged cell",
    "b_overwritten": r"parameter `n` is overwritten before it is read",
    "b_shell": r"cell 4: `!` is not allowed",
    "b_shell_value": r"cell 4: `!` is not allowed",
    "b_pip": r"cell 4: `%pip` is not allowed",
    "b_bash": r"cell 4: `%bash` is not allowed",
    "b_time": r"cell 4: `%time` is not allowed",
    "b_syntax": r"cell 4: SyntaxError",
    "b_skipped": r"cell 4 did not run in its turn",
    "b_order": r"cell 5 did not run in its turn",
    "b_hook": r"a hook is still open at the end: record on vision.3",
    "b_unjudged": r"U1 was not judged",
    "b_twice": r"W1 was judged 2 times",
    "b_silent": r"recorded no finding and no metric",
    "b_profile": r"findings.begin says profile='hub', but it is 'tiny'",
    "b_name": r"findings.begin says notebook='another', but it is 'b_name'",
    "b_value": r"DISAGREES V1 is 0.52, expected 0.5 within 0.01",
    "b_verdict": r"DISAGREES X1 is not reproduced, expected reproduced; X1 is 0.05",
    "b_endless": r"cell 4: ran longer than 6 s: make it smaller, or raise --cell-timeout",
    "b_killed": r"cell 4: the kernel died \(killed by signal 9: out of memory\?\)",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """All the broken notebooks and two good ones, run at once, under a user's kernelspec that runs nothing."""
    world = World(tmp_path_factory.mktemp("world"))
    spec = world.folder / "share/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"})
    )
    threads = "import os\nfindings.metric('threads', int(os.environ['OMP_NUM_THREADS']))"
    figure = f"from IPython.display import Image\nimport base64\nImage(base64.b64decode('{PNG}'))"
    grow = "grown = bytearray(150_000_000)\nimport time; time.sleep(0.3)\ndel grown"
    metadata = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    world.add("a_good", judge("G1"), threads, grow, "findings.ledger()", finding="G1", metadata=metadata)
    world.add("c_good", MEASURE, figure)
    world.add("b_exit", "import sys\nsys.exit(0)", MEASURE, "print(2)")
    world.add("b_exit_hard", "import os\nos._exit(0)", MEASURE)
    world.add("b_raises_tag", new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}), MEASURE)
    world.add("b_long_error", "assert False, 'first line\\nsecond line'", MEASURE)
    world.add("b_unknown", MEASURE, parameters='profile = "tiny"\nseed = 0')
    world.add("b_no_tag", MEASURE, parameters="")
    world.add("b_derived", MEASURE, "print(double)", parameters=PARAMETERS + "\ndouble = 2 * seed")
    world.add("b_unread", MEASURE, parameters=PARAMETERS + "\nn = 5")
    world.add("b_shadowed", "def f(n):\n    return n", MEASURE, parameters=PARAMETERS + "\nn = 5")
    world.add("b_overwritten", "n = 3", "print(n)", MEASURE, parameters=PARAMETERS + "\nn: int = 5")
    world.add("b_shell", "!false", MEASURE)
    world.add("b_shell_value", "if True:\n    there = !ls", MEASURE)
    world.add("b_pip", "%pip install nothing-of-this-name", MEASURE)
    world.add("b_bash", "%%bash\nfalse", MEASURE)
    world.add("b_time", "%%time\n1 / 0", MEASURE)
    world.add("b_syntax", "x = = 1", MEASURE)
    world.add("b_skipped", new_code_cell("1 / 0", metadata={"tags": ["skip-execution"]}), MEASURE)
    world.add("b_order", "get_ipython().execution_count += 3", MEASURE)
    hook = "sys.modules['mmfm_utils.hooks'] = types.SimpleNamespace(leftover=lambda: ['record on vision.3'])"
    world.add("b_hook", MEASURE, f"import sys, types\n{hook}")
    world.add("b_unjudged", MEASURE, finding="U1")
    world.add("b_twice", judge("W1", 0.01), judge("W1"), finding="W1")
    world.add("b_silent", "print(1)")
    world.add("b_profile", begin("b_profile").replace("=profile", "='hub'"), MEASURE)
    world.add("b_name", begin("another"), MEASURE)
    world.add("b_value", judge("V1", 0.52), finding="V1")
    world.add("b_verdict", judge("X1", 0.05), finding="X1")
    world.add("b_endless", "while True: pass", MEASURE)
    world.add("b_killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", MEASURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFM_ROOT", str(world.folder))
        patch.setenv("JUPYTER_PATH", str(world.folder / "share"))
        patch.setenv("JUPYTER_DATA_DIR", str(world.folder / "share"))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        world.code, world.lines = world.run(jobs=2, cell_timeout=6)
        yield world


@pytest.mark.parametrize("name", FAILS)
def test_silent_pass_is_reported(broken, name):
    (line,) = [line for line in broken.lines if line.startswith(f"{name}: ")]
    assert re.search(FAILS[name], line), line
    status = "disagrees" if "DISAGREES" in line else "failed"
    assert broken.read(f"{name}.json")["status"] == status and status.upper() in line


def test_the_good_ones_pass_beside_them(broken):
    assert broken.code == 1
    lines = {line.split(":")[0]: line for line in broken.lines}
    assert re.fullmatch(r"a_good: 1 reproduced  \(\d+\.\d s, \d+ MB\)", lines["a_good"])
    assert "ran, nothing to judge" in lines["c_good"]
    assert broken.lines[-1] == f"report: {broken.folder.resolve()}/results/tiny/report.html"
    assert f"{len(FAILS) + 2} notebooks in" in broken.lines[-2] and "2 ok" in broken.lines[-2]


def test_result_of_a_notebook(broken):
    result = broken.read("a_good.json")
    assert result["status"] == "ok" and result["parameters"] == {"profile": "tiny", "device": "auto"}
    assert result["metrics"][0]["value"] == 1  # thread: with tiny models more of them are slower
    assert 150 < result["peak_mb"] < 400  # of which it held 143 for a moment
    assert result["seconds"] > 0 and result["versions"]["papermill"]
    executed = nbformat.read(broken.folder / "results/tiny/a_good.ipynb", as_version=4)
    assert [c.execution_count for c in executed.cells if c.cell_type == "code"] == list(range(1, 9))
    assert "injected-parameters" in executed.cells[2].metadata.tags


def test_traceback_is_kept(broken):
    text = (broken.folder / "results/tiny/b_long_error.ipynb").read_text()
    assert "second line" in text and '"traceback"' in text
    assert "ran longer than" in (broken.folder / "results/tiny/b_endless.ipynb").read_text()


def test_ledger(broken):
    rows = broken.read("ledger.json")
    assert {row["id"] for row in rows} == {"G1", "V1", "X1"}  # what failed is not to be trusted
    assert all(tuple(row) == (*runner.LEDGER, "paper", "reported") for row in rows)


def test_report(broken):
    page = (broken.folder / "results/tiny/report.html").read_text()
    assert page.count("data:image/webp;base64,") == 1 and 'name="viewport"' in page
    assert "http" not in page and "<link" not in page and not re.search(r"<script [^>]*src", page)
    for part in ("G1", "cell 4: the kernel died", "out of memory?", "threads", "papermill", "[0.2, 0.6]"):
        assert part in page, part
    linked = set(re.findall(r'href="#([^"]+)"', page))
    assert {"G1", "V1", "X1"} <= linked <= set(re.findall(r' id="([^"]+)"', page))  # the map leads to each finding


def test_ledger_as_markdown(broken):
    tables = (broken.folder / "results/tiny/ledger.md").read_text().split("\n\n")
    found, cost, environment = ([line.split(" | ") for line in table.splitlines()] for table in tables)
    assert {line[0] for line in found[2:]} == {"| G1", "| V1", "| X1"}
    assert {len(line) for line in found} == {8}
    assert ["| a_good", "ok"] in [line[:2] for line in cost] and len(cost) == len(FAILS) + 4
    assert "| torch" in [line[0] for line in environment]


# ------------------------------------------------------------------------------------------------ what a run leaves
@pytest.fixture
def quick(monkeypatch):
    """Execute the cells here instead of in a kernel, for tests of what happens around it."""

    def execute(task):
        nb, names = (
            nbformat.reads(task["notebook"], as_version=4),
            {"print": lambda *_: None, "seed": 0} | task["parameters"],
        )
        try:
            for cell in runner.code_cells(nb)[1:]:
                exec(cell.source, names)
        except AssertionError:
            return runner.blank(task, "cell 4: AssertionError:")
        kept = {key: findings._run[key] for key in ("rows", "metrics")}
        return runner.blank(task) | kept | {"executed": task["notebook"]}

    monkeypatch.setattr(findings, "_display", lambda *_: None)
    monkeypatch.setattr(findings, "_run", None)
    monkeypatch.setattr(runner, "execute", execute)


def test_what_runs_is_said_meanwhile(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    client, lines = SimpleNamespace(cell=0, cells=40, begun=0.0), lambda: capsys.readouterr().err.splitlines()
    told = progress.Progress({"01": 200.0, "02": 60.0, "03": 100.0}, jobs=2)
    told.tell({"01": client}, {"01", "02", "03"})
    assert lines() == ["  01: starts, 40 cells; it took 200 s last time"]
    now, client.cell = 20.0, 12
    told.tell({"01": client}, {"01", "02", "03"})
    assert lines() == []
    now = 50.0
    told.tell({"01": client}, {"01", "02", "03"})
    assert lines() == ["  01: in cell 12 of 40 after 50 s, about 150 s left; 3 notebooks left, about 3 min"]
    now, told.last["02"] = 90.0, None
    told.tell({}, {"02", "03"})
    told.tell({}, set())
    assert lines() == ["  2 notebooks left"]


def test_a_run_says_where_it_is(world, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    world.add("01_first", "import time\ntime.sleep(2)", MEASURE)
    assert world.run()[0] == 0
    told = capsys.readouterr().err
    assert "01_first: starts, 5 cells\n" in told
    assert re.search(r"01_first: in cell 4 of 5 after \d+ s; 1 notebook left\n", told)
    assert world.run()[0] == 0
    assert re.search(r"01_first: starts, 5 cells; it took \d+ s last time\n", capsys.readouterr().err)


def test_fake_executor_and_partial_run(world):
    """Any executor runs the tasks, which are plain data; a partial run updates its rows and keeps the others."""

    class Inline(Executor):
        def submit(self, function, /, *arguments):
            future = Future()
            function, arguments = pickle.loads(pickle.dumps((function, arguments)))
            future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
            return future

    class Lost(Executor):
        def submit(self, function, /, *arguments):
            future = Future()
            future.set_exception(RuntimeError("the worker is gone"))
            return future

    world.add("01_first", judge("A1"), finding="A1")
    world.add("02_second", "k = n\n" + judge("B1", 0.4), finding="B1", value=0.4, parameters=PARAMETERS + "\nn = 2")
    assert world.run(executor=Inline())[0] == 0
    world.add("02_second", "k = n\n" + judge("B1", "n / 10"), parameters=PARAMETERS + "\nn = 2")
    code, lines = world.run("02", executor=Inline(), parameters=["n=8"])
    assert code == 0 and "not compared, because of -p" in lines[1]  # the committed values are those of the defaults
    assert [(row["id"], row["value"]) for row in world.read("ledger.json")] == [("A1", 0.5), ("B1", 0.8)]
    code, lines = world.run("01", executor=Lost())
    assert code == 1 and "FAILED RuntimeError: the worker is gone" in lines[1]


def test_profiles(world, quick):
    world.add("01_first", judge("A1"), finding="A1")
    world.add("02_second", MEASURE, metadata={"mmfm": {"profiles": ["tiny"]}})
    code, lines = world.run(profile="rehearsal")
    assert code == 0 and "02_second: skipped" in lines[1] and "01_first: 1 not judged" in lines[2]
    with pytest.raises(UsageError, match="runs under tiny, not under rehearsal"):
        world.run("02", profile="rehearsal")


def test_a_familys_further_models_belong_to_its_weights(world):
    folder = world.folder / "data/models"
    for name in ("language", "language_half", "contrastive"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
    notebooks = [new_notebook(metadata={"mmfm": {"families": [name]}}) for name in ("language", "contrastive")]
    before = [runner.weights_hash(nb) for nb in notebooks]
    (folder / "language_half/model.safetensors").write_text("trained for longer")
    after = [runner.weights_hash(nb) for nb in notebooks]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_stamp_covers_the_models_that_were_loaded_and_no_other(world):
    folder = world.folder / "data/models"
    for name in ("language", "language_half"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
    models = "import sys, types\nsys.modules['mmfm_utils.models'] = types.SimpleNamespace(LOADED={'language'})"
    world.add("01_first", models, MEASURE)
    assert world.run(write=True) == (0, ANY)
    nb, old = (runner.read(world.path("01_first")) for _ in range(2))
    old.metadata["mmfm"]["families"] = ["language"]
    old.metadata["mmfm"]["stamp"]["weights"] = runner.weights_hash(old)  # as it was written once
    assert list(nb.metadata["mmfm"]["stamp"]["weights"]) == ["language"]
    assert runner.stale(nb) == runner.stale(old) == ""
    (folder / "language_half/model.safetensors").write_text("trained for longer")
    assert runner.stale(nb) == "" and "its weights changed" in runner.stale(old)
    (folder / "language/model.safetensors").write_text("trained for longer")
    assert "its weights changed" in runner.stale(nb)


def test_write(world, monkeypatch):
    """The reference run lands in the notebook and in data/expected; any change of the source outdates it."""
    view = "from IPython.display import display\ndisplay({'application/vnd.jupyter.widget-view+json': {}}, raw=True)"
    world.add("01_first", judge("A1", 0.3), view, "1 + 1", finding="A1")
    assert world.run()[0] == 1  # 0.3 is not the committed 0.5
    line = {"name": "01_first", "branch": "b", "question": "q", "families": [], "state": "here", "title": "Toy"}
    (world.folder / "data/notebooks.yaml").write_text(yaml.safe_dump([line]))
    (world.folder / "README.md").write_text("<!--minutes of 01_first-->?<!--/minutes-->")
    code, lines = world.run(write=True)
    assert code == 0, lines
    assert (world.folder / "README.md").read_text() == "<!--minutes of 01_first-->1 minute<!--/minutes-->"
    nb = runner.read(world.path("01_first"))
    cells = runner.code_cells(nb)
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4, 5, 6] and len(nb.cells) == 7
    assert cells[4].outputs == [] and cells[5].outputs[0].execution_count == 6
    assert re.search(r"<!--measured-->\d+ s, \d\.\d GB<!--/measured-->", nb.cells[0].source)
    assert "papermill" not in world.path("01_first").read_text().replace('"papermill": "', "")
    assert findings.expected("tiny")["A1"]["value"] == 0.3 and runner.stale(nb) == ""
    nbformat.validate(nb)
    changed = nbformat.from_dict(json.loads(json.dumps(nb)))
    changed.cells[1].source += "  # changed"
    assert "its source changed" in runner.stale(changed)
    monkeypatch.setattr(runner.outputs, "LIMIT_KB", 1)
    before = world.path("01_first").read_text()
    code, lines = world.run(write=True)
    assert code == 1 and "more than 1: make its figures smaller" in lines[1]
    assert world.path("01_first").read_text() == before
    assert "carries no stamp" in runner.stale(new_notebook())


def test_resume(world, quick):
    world.add("01_first", judge("A1"), finding="A1")
    world.add("02_second", "assert False")
    assert world.run()[0] == 1
    code, lines = world.run(resume=True)
    assert "01_first: kept, 1 reproduced" in lines[1] and "02_second: FAILED" in lines[2]
    world.add("01_first", "print('changed')", judge("A1"))
    assert "kept" not in world.run("01", resume=True)[1][1]
    assert "kept" in world.run("01", resume=True)[1][1]
    assert "kept" not in world.run("01", resume=True, device="cpu")[1][1]
    (world.folder / "results/tiny/01_first.json").write_text("{")  # a damaged result is run again
    assert "kept" not in world.run("01", resume=True)[1][1]


def test_interrupt_and_resume(world):
    """Ctrl-C keeps what is finished, leaves no kernel behind, and `--resume` goes on from there."""
    world.add("01_first", MEASURE)
    wait = "import os, subprocess, time\nfrom pathlib import Path\nchild = subprocess.Popen(['sleep', '60'])\n"
    wait += "Path('pids').write_text(f'{os.getpid()} {child.pid}')\nwhile not Path('go').exists(): time.sleep(0.1)"
    world.add("02_second", wait, MEASURE)
    process, pids = world.start(), world.folder / "notebooks/pids"
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "mmfm run --resume" in out and "Traceback" not in err, out + err
    for pid in map(int, pids.read_text().split()):
        gone = not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert gone, f"process {pid} was left behind"
    finished = world.folder / "results/tiny/01_first.json"
    stamp = finished.stat().st_mtime_ns
    assert (
        not (world.folder / "results/tiny/02_second.json").exists()
        and (world.folder / "results/tiny/report.html").exists()
    )
    (world.folder / "notebooks/go").write_text("")
    code, lines = world.run(resume=True)
    assert code == 0 and "kept" in lines[1] and "2 ok" in lines[-2], lines
    assert world.read("01_first.json")["metrics"][0]["value"] == 42 and finished.stat().st_mtime_ns >= stamp


def test_full_disk(world, quick, monkeypatch):
    """No room for a result: said clearly, exit code 1, what was there before is intact."""
    world.add("01_first", judge("A1"), finding="A1")
    assert world.run()[0] == 0
    folder, replace = world.folder / "results/tiny", os.replace
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(source, target):
        if Path(target).parent == folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, lines = world.run()
    assert code == 1 and "cannot write into" in lines[1] and "No space left on device" in lines[1], lines
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_full_disk_for_real(world):
    """The same with a limit that the system sets on every file: no file may be larger than 100 KB."""
    world.add("01_first", MEASURE)
    world.add("02_second", "print('x' * 300_000)", MEASURE)
    process = world.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, out + err
    assert "02_second: FAILED cannot write into" in out and "File too large" in out
    assert world.read("01_first.json")["status"] == "ok"
    assert sorted(p.name for p in (world.folder / "results/tiny").iterdir()) == [
        "01_first.ipynb", "01_first.json", "ledger.json", "ledger.md", "report.html"
    ]  # fmt: skip


def test_how_many_at_once(monkeypatch):
    memory = lambda free: monkeypatch.setattr(
        runner.kernel.psutil, "virtual_memory", lambda: SimpleNamespace(available=free)
    )
    monkeypatch.setattr(runner.kernel, "cores", lambda: 16)
    for free, jobs in ((1e9, 1), (7e9, 2), (64e9, 4)):
        memory(free)
        assert runner.usual_jobs("tiny", write=False) == jobs
    assert runner.usual_jobs("tiny", write=True) == runner.usual_jobs("rehearsal", write=False) == 1
    monkeypatch.setattr(runner.kernel, "cores", lambda: 2)
    assert runner.usual_jobs("tiny", write=False) == 2


@pytest.mark.parametrize(
    ("profile", "own", "threads"),
    [
        ("tiny", "8", 1),
        ("rehearsal", "", 4),
        ("hub", "2", 2),
        ("hub", " 3,2,1", 3),
        ("hub", "2.0", 2),
        ("hub", "0", 1),
        ("hub", "all", 4),
    ],
)
def test_threads_of_a_kernel(monkeypatch, profile, own, threads):
    monkeypatch.setattr(runner.kernel, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert runner.environment("", profile, jobs=2)["OMP_NUM_THREADS"] == str(threads)


DEFAULTS = dict(
    seed=0, rate=0.5, word="dog", words=["dog"], layers=[1], pair=(1, 2), name=None, fast=True, many={"a": 1}, none=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=010", 10), ("seed=1_000", 1000), ("seed=-3", -3), ("seed= 3", 3), ("seed=1:30", None),
        ("seed=1e3", None), ("seed=yes", None), ("rate=-.5", -0.5), ("rate=2", 2.0), ("rate=nan", None),
        ("rate=-inf", None), ("word=no", "no"), ("word=010", "010"), ("word=a=b", "a=b"),
        ("words=[no, 007]", ["no", "007"]), ("words=no", None), ("words=[", None),
        ("words=[]", []), ("layers=[010]", [10]), ("layers=[1.5]", None), ("layers=[a]", None),
        ("pair=[3, 4]", (3, 4)), ("name=llava-1.5-7b", "llava-1.5-7b"), ("name=3", 3), ("name=None", None),
        ("fast=no", False), ("fast=True", True), ("fast=0", None), ("many={a: 2}", {"a": 2}), ("many=[a]", None),
        ("none=[x, 2]", ["x", 2]),
    ],
)  # fmt: skip
def test_a_parameter_has_the_type_of_its_default(text, value):
    """YAML 1.1 would make 8 of 010, 90 of 1:30 and False of no."""
    if value is None and text != "name=None":
        with pytest.raises(UsageError, match="must be of type"):
            runner.parse_parameter(text, DEFAULTS)
    else:
        found = runner.parse_parameter(text, DEFAULTS)
        assert found == (text.split("=")[0], value) and type(found[1]) is type(value)


def test_in_a_locale_that_knows_ascii_only(tmp_path):
    """As on Windows: what is read and written is UTF-8 all the same, and what cannot be printed ends nothing."""
    world = World(tmp_path)
    world.add("a_named", MEASURE, "print('→ 狮子')")
    world.add("b_fails", "assert False, '狮 → kaputt'")
    plain = {key: v for key, v in os.environ.items() if not key.startswith(("LC_", "LANG", "MMFM"))}
    ascii_only = plain | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MMFM_ROOT": str(tmp_path)}

    def mmfm(*arguments):
        command = [sys.executable, "-m", "mmfm_utils.cli", "run", *arguments]
        done = subprocess.run(command, env=ascii_only, capture_output=True, cwd=Path(__file__).parents[1])
        assert b"Traceback" not in done.stdout + done.stderr
        return done.returncode, done.stdout.decode()

    assert mmfm("a_named", "--jobs", "1")[0] == 0
    code, said = mmfm("b_fails", "--jobs", "1")
    assert code == 1 and "kaputt" in said
    assert "狮子" in (tmp_path / "results" / "tiny" / "a_named.ipynb").read_text(encoding="utf-8")
