"""The table of the notebooks, data/notebooks.yaml: which are here, which are planned, and what each is about."""

from dataclasses import dataclass, fields

import yaml

from . import UsageError, nearest, root
from .models import FAMILIES

STATES = ("here", "planned")


@dataclass(frozen=True)
class Notebook:
    """A line of the table.

    branch: of the survey's taxonomy, in two or three words; question: what the notebook asks, in a line; title: its
    first heading, once it is here; papers: what a planned one will reproduce.
    """

    name: str
    branch: str
    question: str
    families: tuple[str, ...]
    state: str
    title: str = ""
    papers: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def here(self) -> bool:
        return self.state == "here"


def notebooks() -> dict[str, Notebook]:
    """The notebooks by name, in their order; none where $MMFM_ROOT is a folder of notebooks without a table.

    Raises UsageError for a line that has not what it needs.
    """
    path, found = root() / "data" / "notebooks.yaml", {}
    try:
        for line in yaml.safe_load(path.read_text(encoding="utf-8")):
            found[line["name"]] = _checked(line)
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, TypeError, KeyError, UsageError) as error:
        raise UsageError(f"{path}, line {len(found) + 1} of the table: {' '.join(str(error).split())}") from None
    return found


def _checked(line: dict) -> Notebook:
    known = {field.name for field in fields(Notebook)}
    for word, words, what in (
        *((key, known, "field") for key in line),
        *((family, FAMILIES, "family") for family in line["families"]),
        (line["state"], STATES, "state"),
    ):
        if word not in words:
            raise UsageError(f"unknown {what} {word!r}{nearest(word, words)}")
    if (line["state"] == "here") != ("title" in line) or (line["state"] == "planned") != ("papers" in line):
        raise UsageError(f"{line['name']}: give a title where it is here, and papers where it is planned")
    return Notebook(**line | {key: tuple(line.get(key, ())) for key in ("families", "papers")})
