"""Settings for all tests."""

from hypothesis import settings

# The same examples everywhere, and no deadline: a slow machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
