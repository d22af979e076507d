"""What a request asks for: which notebooks, with which parameters and models, executed by whom."""

import ast
import math
import re
import tempfile
from pathlib import Path

import nbformat
import yaml

from .. import UsageError, findings, nearest, root
from ..machine import missing
from .notebook import check_source, defaults, read
from .stamps import result_key


def select(names) -> list[Path]:
    """The notebooks that names, unique prefixes or paths stand for; all of notebooks/ when there are none."""
    folder, found = root() / "notebooks", {}
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
    try:
        return name, _typed(raw, known[name])
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, yaml.YAMLError):
        wanted = type(known[name]).__name__
        raise UsageError(f"-p {text}: {name} must be of type {wanted}, like its default {known[name]!r}") from None


def _typed(raw, default):
    """A text, or what YAML's brackets made of one, with the type of a default. YAML guesses no type: 010 is 10."""
    match default:
        case bool():
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[raw.lower()]
        case int():
            return int(raw)
        case float() if math.isfinite(value := float(raw)):
            return value
        case str():
            return str(raw)
        case None if raw == "":
            return None
        case None:
            return ast.literal_eval(raw) if re.fullmatch(r"None|True|False|[-+]?[\d.]+(e[-+]?\d+)?", raw) else raw
        case list() | tuple() | dict():
            found = yaml.load(raw, yaml.BaseLoader) if isinstance(raw, str) else raw
            if isinstance(default, dict) and isinstance(found, dict):
                return {key: _typed(value, default.get(key)) for key, value in found.items()}
            if not isinstance(default, dict) and isinstance(found, list):
                return type(default)(_typed(value, (*default, None)[0]) for value in found)
    raise ValueError(raw)


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


def check_models(tasks: list[dict]) -> None:
    """Raise for what a notebook would only say after its kernel has started: a missing, damaged or unfetched model."""
    needing = [(task, nb.metadata.get("mmfm", {})) for task in tasks if (nb := read(Path(task["path"])))]
    if not any(needs.get("families") for _, needs in needing):
        return
    from .. import models

    inventory = models.inventory()
    for task, needs in needing:
        for family, hint in missing(needs, task["profile"], inventory).items():
            raise UsageError(f"{task['name']} needs the {family} model, which is missing or damaged: {hint}")


def results_folder(results, profile: str) -> Path:
    folder = Path(results or root() / "results") / profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write results into {folder} ({error.strerror}): choose another --results") from None
    return folder


def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()
