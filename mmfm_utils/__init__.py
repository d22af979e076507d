"""Plumbing shared by the notebooks: the world, the models, hooks, scores, plots, the registry and the runner.

The methods that the notebooks teach are written out in the notebooks, never here.
"""

import os
from pathlib import Path

__version__ = "0.1.0"


class UsageError(ValueError):
    """The request itself was wrong or cannot be served here; the message is one line that says what to do next.

    The command line prints the message without a traceback and exits with code 2.
    """


def root() -> Path:
    """The folder that holds notebooks/, data/ and results/: $MMFM_ROOT, else the one that holds mmfm_utils/."""
    return Path(os.environ.get("MMFM_ROOT") or Path(__file__).resolve().parents[1])
