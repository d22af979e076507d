"""Settings for all tests."""

import sys
from pathlib import Path

from hypothesis import settings

# The same examples everywhere, and no deadline: a slow machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

sys.path.append(str(Path(__file__).parents[1] / "data" / "models"))  # where the recipes share training.py
