"""The lock, pyproject.toml and environment.yml say the same; the package stays thin; nothing unsafe is in it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmfm_utils"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "data").rglob("*.py"))

MAX_LINES = 300  # of a module, docstrings and comments included, which are a quarter of them
TOO_LONG = {"data/models/generative/recipe.py"}  # the second generation divides it
# What the notebooks teach is written out in the notebooks: no function or class of the package bears these in its name.
METHODS = [
    "ablate", "ablation", "attribution", "decompose", "decomposition", "gradcam", "integrated_gradients", "knockout",
    "lens", "patching", "path_patch", "rollout", "saliency", "sparse_autoencoder", "steer", "task_vector", "tcav",
    "textspan", "trace", "unlearn",
]  # fmt: skip
# Imported under another name than the one they are installed by, or brought by a direct dependency.
BROUGHT_BY = {
    "PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open-clip-torch",
    "resvg_py": "resvg-py", "IPython": "ipywidgets", "traitlets": "ipywidgets", "nbformat": "papermill",
    "nbclient": "papermill", "jupyter_client": "papermill", "tokenizers": "transformers",
    "packaging": "transformers", "huggingface_hub": "transformers", "filelock": "transformers", "nbconvert": "nbgrader",
    "zmq": "papermill",
}  # fmt: skip
OPTIONAL = {"dask", "distributed"}  # only with `--executor dask://...`, by those who have a cluster


# ---- versions ----------------------------------------------------------------------------------------------------


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct():
    """{name: requirement} of the direct dependencies, those of the `dev` extra included."""
    lines = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def locked():
    """{name: version} of the lock, which must hold one version of each package."""
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        match = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([\w.+!]+)( ; .+)?", line)
        assert match, f"requirements.lock holds `name==version ; marker` lines only, not {line!r}"
        assert match[1] not in found, f"{match[1]} has two versions in the lock"
        found[match[1]] = match[2]
    return found


def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_the_lock_satisfies_pyproject():
    lock = locked()
    for name, requirement in direct().items():
        assert name in lock, f"{name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(lock[name], prereleases=True), (
            f"{requirement}, but the lock has {lock[name]}"
        )


def test_every_direct_dependency_has_a_lower_bound_and_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in direct().values():
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: one lower bound"
        assert re.search(rf'"{re.escape(requirement.name)}>=[^"]*",? +# \S+', text), f"{requirement.name}: say why"


def test_environment_yml_has_the_same_versions():
    *_, pip = environment()["dependencies"]
    pins = [r for r in pip["pip"] if "==" in r]
    lock = locked()
    assert {canonicalize_name(Requirement(r).name): str(Requirement(r).specifier) for r in pins} == {
        name: f"=={lock[name]}" for name in direct()
    }
    others = [r for r in pip["pip"] if "==" not in r]
    assert others == ["--constraint requirements.lock", "-e ."]


def test_environment_yml_has_a_python_that_fits():
    (python,) = [d for d in environment()["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    needed = Requirement(f"python{project()['requires-python']}").specifier
    assert needed.contains(python.removeprefix("python=")) and str(needed) == ">=3.11"
    assert environment()["channels"] == ["conda-forge"]


def test_one_version_number():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project()["version"] == str(cff["version"])
    assert project()["license"] == cff["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()
    source = (PACKAGE / "__init__.py").read_text()
    assert f'__version__ = "{project()["version"]}"' in source


@pytest.mark.parametrize(
    "name", ["requirements.lock", "pyproject.toml", "environment.yml", "Makefile", ".ci/run", ".pre-commit-config.yaml"]
)
def test_no_host_and_no_path_of_a_machine(name):
    text = (ROOT / name).read_text()
    assert not re.search(
        r"://|@ *(file|git|http)|--(extra-)?index-url|--find-links|(?<!\.)/(home|root|tmp|Users)\b", text
    )


def test_the_installed_versions_are_those_of_the_lock():
    """Where `make` has installed the lock; an environment of one's own may differ."""
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by `make`")
    from importlib.metadata import version

    lock = locked()
    wrong = {name: version(name) for name in direct() if Version(version(name)).public != Version(lock[name]).public}
    assert not wrong, f"installed: {wrong}"


def test_torch_and_torchvision_fit():
    import torch
    import torchvision

    assert torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5).tolist() == [0]


def test_what_is_imported_is_declared():
    known = {name.replace("-", "_") for name in direct()} | set(BROUGHT_BY) | OPTIONAL | {"mmfm_utils", "tests"}
    assert set(BROUGHT_BY.values()) <= set(direct())
    for path in [*MODULES, *RECIPES, *(ROOT / "tests").rglob("*.py")]:
        beside = {p.stem for folder in (path.parent, ROOT / "data" / "models") for p in folder.glob("*.py")}
        strange = {m.split(".")[0] for m in imports(path)[0]} - known - beside - set(sys.stdlib_module_names)
        assert not strange, f"{path.relative_to(ROOT)} imports {sorted(strange)}, which pyproject.toml does not name"


# ---- the package -------------------------------------------------------------------------------------------------


def imports(path):
    """(names of modules imported from elsewhere, rooms of the package that are imported)."""
    folders = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()
    return imports_of(path.read_text(encoding="utf-8"), folders)


def imports_of(source, folders=()):
    """The same of a source in these folders of the package."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["mmfm_utils", *folders][: len(folders) + 2 - node.level] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "mmfm_utils" else [base]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "mmfm_utils":
                inside.add((name.split(".") + [""])[1])
            else:
                outside.add(name)
    return outside, {name for name in inside if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() and name}


def house():
    """{floor: {room: rooms that it imports}}, from the drawing of the house in CONTRIBUTING."""
    drawing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```\nlibrary\n")[1].split("```")[0]
    floors, rooms = {"library": (found := {})}, "library"
    for line in drawing.splitlines():
        if line.startswith("  "):
            room, told = line.split(maxsplit=1)
            job, rooms = told.split("<-")
            assert job.strip() and room not in found
            found[room] = set(rooms.split()) - {"nothing"}
        else:
            found = floors[line] = {}
    return floors


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def method_names(source):
    """The functions, classes and globals in a source that bear the name of a method that a notebook teaches."""
    tree = ast.parse(source)
    defined = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    defined += [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    plain = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in defined]
    return [name for name in plain if re.search(rf"(^|_)({'|'.join(METHODS)})(_|s?$)", name)]


FOREIGN = r"(_?c?pickle|dill|cloudpickle|joblib|torch\.(load|save|jit\.load)|trust_remote_code|allow_pickle)(\..*)?"


def unsafe(source):
    """What in a source reads or runs foreign code: pickle and its kin, torch.load, remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        found += [name for name in names if re.fullmatch(FOREIGN, name, re.I)]
    return found


def test_the_house_is_as_drawn():
    """Every room is in the drawing with what it imports, and each imports only from rooms above it."""
    found = {}
    for path in MODULES:
        found.setdefault(room_of(path), set()).update(imports(path)[1])
    assert not found.pop("__init__")
    drawn = {room: imported for floor in house().values() for room, imported in floor.items()}
    assert {room: imported - {room} for room, imported in found.items()} == drawn
    rooms = list(drawn)
    for room, imported in drawn.items():
        assert imported <= set(rooms[: rooms.index(room)]), f"{room} imports what stands below it"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_imports_the_library_alone(path):
    cells = nbformat.read(path, 4).cells
    code = "\n".join(c.source for c in cells if c.cell_type == "code" and not c.source.lstrip().startswith("%"))
    assert imports_of(code)[1] <= set(house()["library"])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_method_of_a_notebook_is_in_the_package(path):
    source = path.read_text(encoding="utf-8")
    assert not method_names(source), f"{path.name}: the notebook that teaches {method_names(source)} writes it out"
    assert not re.search(r"^\s*(import|from)\s+\S*notebook(s\b|_\d)|\d\d_\w+\.ipynb", source, re.M), (
        "it knows a notebook"
    )


@pytest.mark.parametrize("path", [*MODULES, *RECIPES], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path):
    assert not unsafe(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*MODULES, *RECIPES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_is_longer_than_a_room(path):
    long = len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    assert long == (str(path.relative_to(ROOT)) in TOO_LONG)


def unnamed_encodings(source):
    """The calls that read or write text in whatever encoding the machine has: under Windows it is not UTF-8."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") in ("read_text", "write_text")]
    return [ast.unparse(call) for call in calls if "encoding" not in [keyword.arg for keyword in call.keywords]]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_is_utf_8(path):
    assert not unnamed_encodings(path.read_text(encoding="utf-8"))
    assert unnamed_encodings("path.read_text()\npath.write_text(x, encoding='utf-8')") == ["path.read_text()"]


def test_a_package_without_its_data_says_what_to_set(tmp_path):
    """As `pip install` from a repository leaves it: the code is there, its data are not."""
    shutil.copytree(PACKAGE, tmp_path / "mmfm_utils", ignore=shutil.ignore_patterns("__pycache__"))
    plain = {key: value for key, value in os.environ.items() if key not in ("MMFM_ROOT", "PYTHONPATH")}

    def python(code, **more):
        env = plain | {"PYTHONPATH": str(tmp_path)} | more
        return subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)

    for code in ("from mmfm_utils import models", "from mmfm_utils import findings; findings.registry()"):
        assert python(code, MMFM_ROOT=str(ROOT)).returncode == 0
        assert "set MMFM_ROOT to" in python(code).stderr.splitlines()[-1]


def test_a_method_would_be_caught():
    source = (
        "def mean_ablate(x): ...\nclass LogitLens: ...\ndef patch_size(x): ...\ndef lensing(x): ...\ntextspan = 1\n"
    )
    assert method_names(source) == ["mean_ablate", "logit_lens", "textspan"]


def test_imports_are_found():
    source = (
        "import numpy\nfrom mmfm_utils import UsageError, hooks, models\nfrom .plots import x\nfrom . import texts\n"
    )
    assert imports_of(source) == ({"numpy"}, {"hooks", "models", "plots", "texts"})
    source = "from .. import UsageError, root\nfrom ..scenes.draw import x\nfrom . import own\nfrom .own import x\n"
    assert imports_of(source, ("texts",)) == (set(), {"scenes", "texts"})


def test_something_unsafe_would_be_caught():
    source = '"""Never pickle."""\nimport pickle\ntorch.load(f)\nload(trust_remote_code=True)\nfrom torch import load\n'
    assert sorted(unsafe(source)) == ["pickle", "torch.load", "torch.load", "trust_remote_code"]


# ---- the source as a whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\nset -euo pipefail\n") and "make test </dev/null" in text


def test_make_says_what_it_can():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and {"make run", "make test", "make lab"} <= set(re.findall(r"make \w+", done.stdout))


def test_make_refuses_an_old_python(tmp_path):
    """In a folder of its own, with an interpreter that says that it is old and no other in reach."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cmp", "head"):
        found = [Path(folder) / name for folder in ("/bin", "/usr/bin") if (Path(folder) / name).exists()]
        (tools / name).symlink_to(found[0])
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    make = next(f"{folder}/make" for folder in os.environ["PATH"].split(":") if Path(f"{folder}/make").exists())
    done = subprocess.run([make, "setup"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    assert "Python 3.11 or newer is needed; 'python3' here is: Python 3.9.2" in done.stderr
