"""README's table of notebooks and its minutes, made from data/notebooks.yaml and from the notebooks themselves.

`mmfm run --write` fills them in, so that nothing of this is kept by hand.
"""

import re

from .. import collection, root
from ..models import FAMILIES
from .stamps import measured


def seconds() -> dict[str, float]:
    """{name: what it took in its last reference run} of the notebooks that are here, on one core of that machine."""
    names = [name for name, notebook in collection.notebooks().items() if notebook.here]
    found = {name: measured((root() / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")) for name in names}
    return {name: took for name, took in found.items() if took}


def filled(text: str) -> str:
    """README with the table between its `<!--notebooks-->` marks and the minutes between its `<!--minutes of ...-->`.

    The minutes are those of one notebook, or of `all`, one after the other on one core.
    """
    took = seconds()
    text = re.sub(r"(<!--notebooks-->\n).*?(<!--/notebooks-->)", lambda m: m[1] + _table(took) + m[2], text, flags=re.S)
    took |= {"all": sum(took.values())}
    minutes = lambda m: f"{m[1]}{_minutes(took[m[2]])}{m[3]}" if took.get(m[2]) else m[0]
    return re.sub(r"(<!--minutes of (\w+)-->).*?(<!--/minutes-->)", minutes, text)


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60) or 1
    return f"{minutes} minute{'s' * (minutes > 1)}"


def _table(took: dict[str, float]) -> str:
    """The table of notebooks in Markdown."""
    lines = [("notebook", "question", *FAMILIES, "minutes"), ("---",) * (3 + len(FAMILIES))]
    for name, notebook in collection.notebooks().items():
        link = f"[{name}](notebooks/{name}.ipynb)" if notebook.here else name
        sign = "●" if notebook.here else "○"
        marks = (sign if family in notebook.families else "" for family in FAMILIES)
        spent = f"{round(took[name] / 60) or 1}" if name in took else "planned" if not notebook.here else ""
        lines.append((link, notebook.question, *marks, spent))
    return "".join(f"| {' | '.join(line)} |\n".replace("  ", " ") for line in lines)
