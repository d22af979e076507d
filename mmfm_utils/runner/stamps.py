"""Two hashes, kept apart.

The *stamp* of a committed notebook covers its own cells, the weights that it loaded and the data that its metadata says
it reads (`mmfm: {reads: [data/notebooks.yaml]}`), so that an edit elsewhere does not outdate its outputs. The *key* of
a result covers whatever could change it (that, all of mmfm_utils and data/, the parameters, the versions): `--resume`
keeps a result only while the key is the same.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

from .. import root
from ..machine import versions
from .notebook import tags

MEASURED = re.compile(r"(<!--measured-->).*?(<!--/measured-->)", re.S)  # `--write` puts seconds and memory between


def measured(text: str) -> float | None:
    """The seconds of the last reference run, out of the text of a notebook; None where there was none."""
    found = re.search(r"<!--measured-->(\d+) s", text)
    return float(found[1]) if found else None


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
    models = root() / "data" / "models"
    return {folder: _hash(_tree(models / folder, "*.safetensors")) for folder in folders}


def weights_hash(nb) -> str:
    """As in stamps that do not say which models were loaded: of all the embedded weights of the notebook's families.

    The families are those of its metadata (`mmfm: {families: [...]}`), or all. A family's further models lie in folders
    beside its own: language, language_half.
    """
    models = root() / "data" / "models"
    families = nb.metadata.get("mmfm", {}).get("families", []) or [""]
    folders = [name for family in families for name in (family, *sorted(p.name for p in models.glob(f"{family}_*")))]
    return _hash([[folder, _tree(models / folder, "*.safetensors")] for folder in folders])


def data_of(nb) -> dict[str, str]:
    """{file: hash} of the data that a notebook reads by itself, as its metadata say; files from the root."""
    paths = [root() / name for name in nb.metadata.get("mmfm", {}).get("reads", [])]
    return {str(path.relative_to(root())): _hash(_tree(path.parent, path.name)) for path in paths}


def stamp(nb, loaded=(), profile: str = "tiny") -> dict:
    """What the outputs of a committed notebook were made from; loaded: the folders of the models that it opened."""
    made_from = {"source": source_hash(nb), "weights": weights_of(loaded), "data": data_of(nb), "profile": profile}
    return made_from | {"packages": versions()}


def stale(nb) -> str:
    """Why the outputs of a committed notebook are out of date, or nothing."""
    old = nb.metadata.get("mmfm", {}).get("stamp", {})
    old = old and {"data": {}} | old  # stamps from before notebooks could say what they read
    weights = old.get("weights", {})
    new = stamp(nb, weights if isinstance(weights, dict) else ())
    new |= {"weights": weights_hash(nb)} if isinstance(weights, str) else {}
    changed = [name for name in ("source", "weights", "data", "profile") if old.get(name) != new[name]]
    what = f"its {' and '.join(changed)} changed since it ran" if old else "it carries no stamp"
    return f"{what}: make its outputs anew with `mmfm run NAME --write`" if changed else ""


def project_hash() -> str:
    """Of all the code and the data that a result may depend on."""
    package, data = _tree(Path(__file__).parents[1], "*.py"), _tree(root() / "data", "*", skip="expected")
    return _hash(package, data)


def result_key(nb, parameters: dict, trials: dict) -> str:
    return _hash(source_hash(nb), project_hash(), parameters, versions(), trials)
