"""An nbgrader course made of the notebooks: `build`.

nbgrader does the work: `source/` holds the notebooks as they are, `release/` what students get (solutions replaced by a
stub, hidden tests taken out, tests locked, outputs cleared), `gradebook.db` the points of every test. Each notebook is
an assignment of its own name.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from .. import UsageError, runner

STUB_SAYS = "Write this part, then run the cell again."
STUB = f'raise NotImplementedError("{STUB_SAYS}")'
CONFIG = {
    "CourseDirectory": {"course_id": "mmfm"},
    "ClearSolutions": {"code_stub": {"python": STUB}},
}
MADE = "nbgrader_config.json"  # nbgrader reads it; a folder that holds it is a course


def build(folder: str | Path, names: list[str] = ()) -> list[Path]:
    """Make the nbgrader course of notebooks (all, or those that the names stand for) in a folder; the released ones.

    Building anew replaces these notebooks in `source/` and `release/`, and leaves what was submitted and graded alone.
    Raises UsageError for a folder that holds something else, and for a notebook that nbgrader refuses.
    """
    folder, notebooks = Path(folder), runner.select(names)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MADE).exists())):
        raise UsageError(f"{folder} holds something else than a course: name a new folder, or an empty one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MADE).exists():  # an instructor's own settings stay
            (folder / MADE).write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
        for path in notebooks:
            (folder / "source" / path.stem).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / "source" / path.stem / path.name)
    except OSError as error:
        raise UsageError(f"cannot write into {folder} ({error.strerror}): make room, or name another folder") from None
    with nbgrader(folder) as api:
        for path in notebooks:
            made = api.generate_assignment(path.stem, force=True, create=True)
            if not made["success"]:
                why = re.findall(r"^\s+[\w.]+(?:Error|Exception): (.+)$", made["log"], re.M) or [made["error"]]
                raise UsageError(f"nbgrader refuses {path.name}: {why[-1]} (`make lint` tells what an exercise lacks)")
    return [folder / "release" / path.stem / path.name for path in notebooks]


@contextlib.contextmanager
def nbgrader(folder: Path, **more: dict):
    """nbgrader's API on the course in a folder, with its settings and further ones: `Autograde={"option": value}`.

    Raises UsageError where the settings cannot be read.
    """
    from nbgrader.apps import NbGraderAPI  # slow
    from traitlets.config import Config

    try:
        config = Config(json.loads((folder / MADE).read_text(encoding="utf-8")))
        config.merge(Config(more))
        config.CourseDirectory.root = str(folder.resolve())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / MADE} cannot be read ({error}): mend it, or build a course elsewhere") from None
    before = os.environ.get("PATH", "")
    # nbgrader starts `alembic` by its name; it lies beside this Python, which need not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its database
            yield NbGraderAPI(config=config)
    finally:
        os.environ["PATH"] = before
