"""Plumbing shared by the notebooks: the world, the models, hooks, scores, plots, the registry and the runner.

The methods that the notebooks teach are written out in the notebooks, never here.
"""

import contextlib
import difflib
import errno
import os
import tempfile
from pathlib import Path

__version__ = "0.1.0"


class UsageError(ValueError):
    """The request itself was wrong or cannot be served here; the message is one line that says what to do next.

    The command line prints the message without a traceback and exits with code 2.
    """


def root() -> Path:
    """The folder that holds notebooks/, data/ and results/: $MMFM_ROOT, else the one that holds mmfm_utils/."""
    return Path(os.environ.get("MMFM_ROOT") or Path(__file__).resolve().parents[1])


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def data(name: str) -> Path:
    """A file or folder of data/: below `root()`, or else beside the package, where a clone has it.

    Raises UsageError where neither is, as in an installation without the data.
    """
    for folder in (root(), Path(__file__).resolve().parents[1]):
        if (path := folder / "data" / name).exists():
            return path
    raise UsageError(
        f"data/{name} is not below {root()}: set MMFM_ROOT to a clone of the repository, which holds data/"
    )


def nearest(word: str, known) -> str:
    """' (nearest: a, b)', or what there is to choose from, or nothing."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), known, 3, 0.4) or (known if len(known) <= 12 else [])
    return f" (nearest: {', '.join(close)})" if close else ""


def write_atomic(path: Path, text: str) -> None:
    """Write the whole file or leave the old one as it was, also where a file system knows no modes or no fsync."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        with contextlib.suppress(PermissionError, NotImplementedError):
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
