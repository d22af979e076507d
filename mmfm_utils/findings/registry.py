"""The registry of findings in data/findings.yaml, and the committed results that a run is compared with."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from .. import UsageError, nearest, root
from .rule import Rule

VERDICTS = ("reproduced", "partly", "not reproduced", "not judged")
PROFILES = ("tiny", "rehearsal", "hub")


@dataclass(frozen=True)
class Finding:
    """One entry of data/findings.yaml; the fields up to `control` are required, rule and tolerance where it is judged.

    partly: the condition for `partly`, asked where `rule` does not hold; tolerance: how far the value may leave the
    committed one, a number or a mapping of names to numbers; expected: {profile: verdict}; exact: no interval is
    needed; rule_changed: the reasons why the rule is not the first one; not_done: why this cannot be measured here.
    """

    id: str
    notebook: str
    family: str
    claim: str
    paper: str
    arxiv: str
    reported: str
    verified: bool
    measured: str
    control: str
    rule: Rule | None = None
    partly: Rule | None = None
    tolerance: float | dict | None = None
    expected: dict | None = None
    exact: bool = False
    rule_changed: list | tuple = ()
    not_done: str = ""

    def source(self) -> str:
        """The paper, and its arXiv id where it has one (`none` says that it has not)."""
        return self.paper + ("" if self.arxiv == "none" else f", arXiv {self.arxiv}")

    def told(self) -> str:
        """What the paper reports; a number from memory is marked."""
        return self.reported + ("" if self.verified else " (unverified)")


def _entry(raw: dict) -> Finding:
    """One entry of the file, checked field by field."""

    def need(fine: bool, message: str) -> None:
        if not fine:
            raise UsageError(message)

    def texts(several) -> bool:
        return all(isinstance(text, str) and text.strip() for text in several)

    for key in raw:
        known = {field.name for field in fields(Finding)}
        need(key in known, f"unknown field `{key}`{nearest(key, known)}")
    for key in ("notebook", "family", "claim", "paper", "arxiv", "reported", "measured", "control"):
        need(texts([raw.get(key)]), f"`{key}` must be a text (in quotes where it looks like a number)")
    for key in ("verified", "exact"):
        need(isinstance(raw.get(key, False if key == "exact" else None), bool), f"`{key}` must be true or false")
    judged, expected, tolerance = not raw.get("not_done"), raw.get("expected", {}), raw.get("tolerance")
    need(isinstance(raw.get("rule_changed", []), list), "`rule_changed` must be a list of reasons")
    need(texts(raw.get("rule_changed", [])), "`rule_changed` must be a list of reasons")
    fine = isinstance(expected, dict) and set(expected) <= set(PROFILES) and set(expected.values()) <= set(VERDICTS)
    need(fine, f"`expected` maps a profile ({', '.join(PROFILES)}) to a verdict ({', '.join(VERDICTS)})")
    for width in tolerance.values() if isinstance(tolerance, dict) else [tolerance] * judged:
        fine = type(width) in (int, float) and 0 <= width < math.inf
        need(fine, "`tolerance` must be a number of at least 0, or a mapping of names to such numbers")
    for key in ["rule"] * judged + ["partly"] * ("partly" in raw):
        need(texts([raw.get(key)]), f"`{key}` must be a condition, written as a text")
    rules = {key: Rule(raw[key]) for key in ("rule", "partly") if key in raw}
    return Finding(**{**raw, **rules})


def registry(path: Path | None = None) -> dict[str, Finding]:
    """The findings by id, read from data/findings.yaml: a list of entries."""
    import yaml

    path = Path(path or root() / "data" / "findings.yaml")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError:
        raise UsageError(f"no registry at {path}: restore it, or set MMFM_ROOT to the folder above data/") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, list):
        raise UsageError(f"{path} must hold a list of entries, each with an id")
    found = {}
    for entry in raw:
        key = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(key, str) or key in found:
            raise UsageError(f"{path}: every entry needs a text `id` that no other has, not {key!r}")
        try:
            found[key] = _entry(entry)
        except UsageError as error:
            raise UsageError(f"{path}: {key}: {error}") from None
    return found


def expected(profile: str, known: dict[str, Finding] | None = None, notebook: str = "") -> dict[str, dict]:
    """The committed results of a profile: {id: {verdict, value, tolerance}}; data/expected/<profile>.json holds them.

    A verdict that the registry states for the profile counts before the one in the file.
    """
    path = root() / "data" / "expected" / f"{profile}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        stored = {key: {"verdict": row["verdict"], "value": row["value"]} for key, row in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged: restore it, or write it anew with `mmfm run --write`") from None
    known = registry() if known is None else known
    return {
        key: {
            "verdict": (finding.expected or {}).get(profile, stored[key]["verdict"]),
            "value": stored[key]["value"],
            "tolerance": finding.tolerance,
        }
        for key, finding in known.items()
        if key in stored and not finding.not_done and notebook in ("", finding.notebook)
    }


def compare(rows: list[dict], expected: dict[str, dict]) -> list[str]:
    """What differs between rows and expected results, in either direction; empty when all agree."""
    found, wrong = {row["id"]: row for row in rows}, []
    wrong += [f"{key} is missing" for key in expected if key not in found]
    for key, row in found.items():
        if key not in expected:
            wrong.append(f"{key} has no committed result (`mmfm run --write` commits one)")
            continue
        want = expected[key]
        if row["verdict"] != want["verdict"]:
            wrong.append(f"{key} is {row['verdict']}, expected {want['verdict']}")
        ours, theirs = (v if isinstance(v, dict) else {"": v} for v in (row["value"], want["value"]))
        if set(ours) != set(theirs):
            wrong.append(f"{key} has the values {sorted(ours)}, expected {sorted(theirs)}")
            continue
        for name, value in ours.items():
            width = want["tolerance"]
            width = width.get(name, 0) if isinstance(width, dict) else width or 0
            if not abs(value - theirs[name]) <= width + 1e-9 * abs(theirs[name]):
                label = f"{key}.{name}" if name else key
                wrong.append(f"{label} is {value:.4g}, expected {theirs[name]:.4g} within {width:g}")
    return wrong
