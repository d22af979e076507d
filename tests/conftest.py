"""Settings for all tests."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples everywhere, and no deadline: a slow machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

sys.path.append(str(Path(__file__).parents[1] / "data" / "models"))  # where the recipes share training.py


@pytest.fixture(scope="module")
def one_thread():
    """One thread for the tests of a module: sums come in one order, so that two runs can be compared bit by bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
