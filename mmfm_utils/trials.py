"""Trials of an exercise in the kernel of its notebook: stub and wrong answers must fail, and leave nothing behind.

The runner calls `check` just before the cell of the reference. It is imported into every such kernel, so it imports
nothing that is slow.
"""

import contextlib
import io
import linecache
import random
import re
import sys
from functools import partial

from IPython.core.inputtransformer2 import TransformerManager


def check(names: dict, grade_id: str, stub: list[str], says: str, wrong: list, test: str) -> list[str]:
    """What is wrong with an exercise, in plain words, from the names of a notebook that has come to it.

    stub holds the student's cell and its visible test, says the message of the stub, wrong [(name, pattern, source)].
    """
    outcome = _attempt(names, (stub[0], "stub"), (stub[1], "visible test"))
    found = [f"{grade_id}: {what}" for what in _of_stub(outcome, says)]
    for title, pattern, source in wrong:
        outcome = _attempt(names, (source, "wrong answer"), (test, "test"))
        found += [f"{grade_id}: the wrong answer '{title}' {what}" for what in _of_wrong(outcome, pattern)]
    return found


def _attempt(names: dict, *cells: tuple[str, str]) -> tuple[str, BaseException] | None:
    """Execute (source, label) cells; the label and the exception that ended them, or None. All names are put back."""
    before, back = dict(names), _generators(names)
    label = ""
    try:
        for source, label in cells:
            code = TransformerManager().transform_cell(source)
            file = f"<{label}>"
            linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(code, file, "exec"), names)
    except (Exception, SystemExit) as error:
        return label, error
    finally:
        for name in names.keys() - before.keys():
            del names[name]
        names.update(before)
        for put_back in back:
            put_back()
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close("all")
    return None


def _generators(names: dict) -> list:
    """What puts the random generators back as they are now: those of the libraries, and those that have a name."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    back = [partial(random.setstate, random.getstate())]
    back += [partial(numpy.random.set_state, numpy.random.get_state())] if numpy else []  # noqa: NPY002
    back += [partial(torch.set_rng_state, torch.get_rng_state())] if torch else []
    for value in names.values():
        if isinstance(value, random.Random):
            back.append(partial(value.setstate, value.getstate()))
        elif numpy and isinstance(value, numpy.random.Generator):
            back.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif torch and isinstance(value, torch.Generator):
            back.append(partial(value.set_state, value.get_state()))
    return back


def _told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error)[:300] or '(no message)'}"


def _is_stub(error: BaseException | None, says: str) -> bool:
    """Whether the stub is behind an exception."""
    while error is not None:
        if isinstance(error, NotImplementedError) and str(error) == says:
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_stub(outcome, says: str) -> list[str]:
    """The student's cell and its visible test must end at the stub."""
    if outcome is None:
        return ["the assignment runs through before anything is written; the visible test must use the answer"]
    if not _is_stub(outcome[1], says):
        return [f"the assignment fails, but not at the stub: {_told(outcome[1])}"]
    return []


def _of_wrong(outcome, pattern: str) -> list[str]:
    """What is wrong with the way in which a wrong answer ended."""
    if re.search(pattern, ""):
        return [f"has the pattern {pattern!r}, which any message matches"]
    if outcome is None:
        return ["passes the test"]
    label, error = outcome
    if label != "test" or not isinstance(error, AssertionError):
        return [f"ends in the {label} with {_told(error)}; the test must catch it with a message of its own"]
    if not re.search(pattern, str(error)):
        return [f"is told {str(error)[:300]!r}, which does not match {pattern!r}"]
    return []
