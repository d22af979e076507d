"""The command line: one clear line and exit code 2 for a wrong request, and what each command says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mmfm_utils import cli, models, root, runner

PARAMETERS = (
    'profile = "tiny"\ndevice = "auto"\nseed = 0\nrate = 0.5\nword = "dog"\nfast = True\nlayers = [1]\nbest = None'
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Four notebooks that are never executed."""
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    for folder in ("notebooks", "data", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/findings.yaml").write_text("[]")
    needs = {"04_decomposition": ["contrastive"], "04_dead_ends": ["contrastive", "diffusion"], "05_lens": []}
    needs |= {"06_sounds": ["auditory"]}  # no such model is shipped
    for name, families in needs.items():
        cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        nb = new_notebook(cells=[cell], metadata={"mmfm": {"families": families}})
        nbformat.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
    nbformat.write(nb, tmp_path / "elsewhere/05_lens.ipynb")
    (tmp_path / "elsewhere/broken.ipynb").write_text("{")
    (tmp_path / "elsewhere/file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "execute", lambda task: pytest.fail("it ran"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: COMMAND"),
        ("rnu", "invalid choice: 'rnu'"),
        ("run 04 --speed", "unrecognized arguments: --speed"),
        ("run 05 --resume gone", "no notebook 'gone'"),
        ("run 17", "no notebook '17'"),
        ("run 05_lenz", "nearest: 05_lens"),
        ("run 04", "'04' fits 04_dead_ends, 04_decomposition: write more"),
        ("run notebooks/gone.ipynb", "no notebook 'notebooks/gone.ipynb'"),
        ("run elsewhere/broken.ipynb", "is not a notebook"),
        ("run 05 elsewhere/05_lens.ipynb", "would share one result"),
        ("run --profile tinny", "invalid choice: 'tinny'"),
        ("run --device tpu", "invalid choice: 'tpu'"),
        ("run 06_sounds", "needs the auditory model"),
        ("run 04_decomposition --profile hub", "hf download"),
        ("run --device cuda", "torch sees no CUDA device here"),
        ("run --jobs 0", "must be above 0"),
        ("run --jobs two", "invalid int value: 'two'"),
        ("run --cell-timeout -1", "must be above 0"),
        ("run --cell-timeout 1.5", "invalid int value"),
        ("run --executor ray", "write local, or dask://HOST:PORT"),
        ("run --executor dask://127.0.0.1:1", "pip install distributed|no Dask scheduler answers"),
        ("run --results elsewhere/file", "cannot write results into"),
        ("run --results /proc/nothing", "cannot write results into"),
        ("run 05 -p seed", "write it as name=value"),
        ("run 05 -p =3", "write it as name=value"),
        ("run 05 -p sed=3", "05_lens: -p sed=3: no such parameter .nearest: seed"),
        ("run 05 -p seed=three", "seed must be of type int, like its default 0"),
        ("run 05 -p seed=3.5", "must be of type int"),
        ("run 05 -p seed=true", "must be of type int"),
        ("run 05 -p rate=fast", "must be of type float"),
        ("run 05 -p fast=1", "must be of type bool"),
        ("run 05 -p layers=1", "must be of type list"),
        ("run 05 -p profile=hub", "use --profile hub"),
        ("run 05 -p device=cpu", "use --device cpu"),
        ("run 05 --write -p seed=1", "--write commits the reference run"),
        ("run 05 --write --profile hub", "--write commits the reference run"),
        ("report --results elsewhere", "no results in elsewhere"),
        ("report --compare elsewhere gone.json", "no ledger at elsewhere/ledger.json"),
    ],
)
def test_wrong_request(world, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(runner, "cuda_available", lambda: False)
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("mmfm: ") and "Traceback" not in out + err
    assert re.search(message, err), err


def test_wrong_data(world, capsys):
    (world / "data/findings.yaml").write_text("- {id: A1, notebok: x}")
    assert cli.main(["run"]) == 2 and "A1: unknown field `notebok` (nearest: notebook" in capsys.readouterr().err
    (world / "data/findings.yaml").unlink()
    assert cli.main(["run"]) == 2 and "no registry at" in capsys.readouterr().err
    for path in (world / "notebooks").iterdir():
        path.unlink()
    (world / "data/findings.yaml").write_text("[]")
    assert cli.main(["run"]) == 2 and "no notebooks in" in capsys.readouterr().err


def test_parameters_take_the_type_of_their_default(world):
    texts = ["seed=3", "rate=1", "rate=1e-3", "word=7", "word=a=b", "fast=false", "layers=[2, 3]", "best=0.5", "best="]
    known = runner.defaults(runner.read(world / "notebooks/05_lens.ipynb"))
    values = [runner.parse_parameter(text, known)[1] for text in texts]
    assert values == [3, 1.0, 1e-3, "7", "a=b", False, [2, 3], 0.5, None] and isinstance(values[1], float)


def test_doctor(world, capsys, monkeypatch):
    rows = [("contrastive", "tiny", "intact", ""), ("diffusion", "tiny", "intact", "")]
    rows += [("contrastive", "hub", "not cached", "fetch it"), ("contrastive", "rehearsal", "from config", "")]
    rows += [("diffusion", "hub", "cached", ""), ("diffusion", "rehearsal", "from config", "")]
    rows = [dict(zip(("family", "profile", "state", "hint"), row), name="B", path="p", bytes=5e6) for row in rows]
    monkeypatch.setattr(models, "inventory", lambda: rows)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (
        "nothing is written",
        "device",
        "memory",
        "disk",
        "papermill",
        "not cached",
        "fetch it",
        "doctor took",
    ):
        assert part in out, part
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["04_decomposition"].endswith("runs under tiny, rehearsal")
    assert lines["05_lens"].endswith("runs under tiny, rehearsal, hub")
    rows[1]["state"] = "damaged"
    assert cli.main(["doctor"]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["04_dead_ends"].endswith("runs under rehearsal")


def test_doctor_needs_no_slow_library(monkeypatch):
    """It lists every embedded model, imports no library that takes seconds, and asks torch only where there is a driver
    of a GPU."""
    slow = ("torch", "transformers", "diffusers", "open_clip", "papermill", "nbformat", "IPython", "nbgrader", "PIL")
    script = "import sys\nfrom mmfm_utils import cli, machine\ncode, seen = cli.main(['doctor']), machine.gpu()\n"
    script += f"print(code, [n for n in {slow} if n in sys.modules])"
    monkeypatch.setenv("PATH", "/nonexistent")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root())
    *lines, last = done.stdout.splitlines()
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    assert last == f"0 {['torch'] if driver else []}", done.stdout + done.stderr
    listed = {tuple(line.split()[:3]) for line in lines}
    for family, folders in models.EMBEDDED.items():
        assert {(family, "tiny", folder) for folder in folders.values()} <= listed


def test_report_and_compare(world, capsys):
    row = dict.fromkeys(runner.LEDGER) | {"id": "A1", "notebook": "05_lens", "verdict": "reproduced", "value": 0.5}
    old, new = world / "old.json", world / "results/tiny/ledger.json"
    new.parent.mkdir(parents=True)
    old.write_text(json.dumps([row]))
    new.write_text(json.dumps([row]))
    assert cli.main(["report", "--compare", str(old), str(new.parent)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    new.write_text(json.dumps([row | {"verdict": "partly", "value": 0.6}, row | {"id": "B1"}]))
    assert cli.main(["report", "--compare", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "A1 is partly, expected reproduced" in out and "A1 is 0.6, expected 0.5" in out and "B1 is new" in out
    task = {"name": "05_lens", "profile": "tiny", "parameters": {}, "key": ""}
    result = runner.blank(task) | {"status": "ok", "reason": "", "rows": [row | {"why": "<b>"}]}
    (new.parent / "05_lens.json").write_text(json.dumps(result))
    assert cli.main(["report"]) == 0
    out = capsys.readouterr().out
    assert f"report: {new.parent}/report.html" in out and "report took" in out
    assert "&lt;b&gt;" in (new.parent / "report.html").read_text()
    assert json.loads(new.read_text()) == [row | {"why": "<b>", "paper": "", "reported": ""}]


def test_the_command_itself(world):
    command = [sys.executable, "-m", "mmfm_utils.cli", "run", "05", "--jobs", "-3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root())
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("mmfm: --jobs -3")
