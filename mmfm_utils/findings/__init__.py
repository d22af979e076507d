"""The registry of findings, the rule that judges each, the verdict, and the card that shows it.

A notebook calls `begin` once, `judge` for every finding, `metric` for a number that nothing judges, and `ledger` at the
end. The verdict follows from the rule in data/findings.yaml and from nothing else.
"""

import html
import json
import math
import os
import re
import sys
import time
from pathlib import Path

from .. import UsageError, nearest, write_atomic
from .registry import PROFILES, VERDICTS, Finding, compare, expected, registry
from .rule import Rule, shown

COLOURS = dict(zip(VERDICTS, ("#0072B2", "#E69F00", "#D55E00", "#777777"), strict=True))

__all__ = [
    "COLOURS", "PROFILES", "VERDICTS", "Finding", "Rule", "begin", "close", "compare", "expected", "judge", "ledger",
    "metric", "peak_mb", "registry", "rows", "shown",
]  # fmt: skip

_run: dict | None = None


def peak_mb(pid: int | str = "self") -> float:
    """The largest resident memory that a process has had so far, in MB (0 where the system does not tell)."""
    try:
        return (
            int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8")).group(1)) / 1024
        )
    except (OSError, AttributeError):
        return 0.0


class _Shown:
    """Shown as HTML where that is possible, as plain text elsewhere."""

    def __init__(self, text: str, page: str):
        self._text, self._page = text, page

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._page


def _display(text: str, page: str) -> None:
    from IPython.display import display

    display(_Shown(text, page))


def _number(what: str, value):
    """A finite float, a non-empty mapping of names to them, or an error."""
    if isinstance(value, dict):
        if value and all(isinstance(key, str) and not isinstance(v, dict) for key, v in value.items()):
            return {key: _number(f"{what}.{key}", v) for key, v in value.items()}
    else:
        try:
            plain = value.item() if hasattr(value, "item") else value
        except (ValueError, RuntimeError):  # an array of several numbers
            plain = None
        if isinstance(plain, int | float) and not isinstance(plain, bool) and math.isfinite(plain):
            return float(plain)
    raise UsageError(f"{what} must be a finite number or a flat mapping of names to such numbers, not {value!r:.80}")


def _interval(what: str, pair):
    """A pair (low, high), or a mapping of names to pairs."""
    if isinstance(pair, dict) and pair:
        return {key: _interval(f"{what}.{key}", v) for key, v in pair.items()}
    try:
        low, high = (_number(what, end) for end in pair)
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be a pair (low, high) of finite numbers, not {pair!r:.80}") from None
    if low > high:
        raise UsageError(f"{what} is ({low:g}, {high:g}): the low end must come first")
    return [low, high]


def _without_width(interval) -> str:
    """Which intervals have width 0: they say that nothing varied, and not how sure we are."""
    named = {f"interval.{name}": v for name, v in interval.items()} if isinstance(interval, dict) else {}
    named = named or ({"interval": interval} if interval else {})
    return ", ".join(name for name, ends in named.items() if math.isclose(*ends, rel_tol=1e-9, abs_tol=1e-12))


def begin(notebook: str, profile: str, seed: int = 0) -> None:
    """Start the records of a notebook; call it once, in the set-up cell."""
    global _run
    if profile not in PROFILES:
        raise UsageError(f"profile must be one of {', '.join(PROFILES)}, not {profile!r}")
    _run = {"notebook": notebook, "profile": profile, "seed": seed, "rows": [], "metrics": []}
    _run["registry"], _run["clock"] = registry(), time.perf_counter()
    _save()


def _begun(what: str) -> dict:
    if _run is None:
        raise UsageError(f"{what} before begin: call findings.begin(notebook=..., profile=profile, seed=seed) first")
    return _run


def _save(**more) -> None:
    """Hand the records to the runner, which names the file."""
    if path := os.environ.get("MMFM_RESULTS_FILE"):
        kept = {key: v for key, v in (_run or {}).items() if key not in ("registry", "clock")}
        write_atomic(Path(path), json.dumps({**kept, **more}))


def rows() -> list[dict]:
    """The rows that this notebook has recorded so far."""
    return list(_begun("rows")["rows"])


def metric(name: str, value: float, unit: str = "") -> None:
    """Record a headline number that nothing judges."""
    run, value = _begun("metric"), _number("value", value)
    run["metrics"] = [m for m in run["metrics"] if m["name"] != name]
    run["metrics"].append({"name": name, "value": value, "unit": unit})
    _save()
    line = f"{name}: {shown(value)} {unit}".rstrip()
    _display(line, f"<p>{html.escape(line)}</p>")


def judge(id: str, *, value, control=None, interval=None, n: int | None = None, why: str = "") -> None:
    """Judge a measurement by the rule of its finding, show the card, and record the row.

    value and control are a number or a flat mapping of names to numbers; interval is (low, high), or a mapping of
    names to such pairs; why says why ours differs from the paper. An interval of width 0 says nothing of how sure we
    are: unless the registry calls the finding exact, it is not judged, and its row says why and holds no interval.
    """
    run = _begun("judge")
    finding = run["registry"].get(id)
    if finding is None:
        raise UsageError(f"no finding {id!r} in the registry{nearest(id, run['registry'])}")
    if finding.notebook != run["notebook"]:
        raise UsageError(f"{id} belongs to {finding.notebook}, not to {run['notebook']}: judge it there")
    if finding.not_done:
        raise UsageError(f"{id} is marked `not_done` in the registry: give it a rule before it is judged")
    known = {"value": _number(f"{id}: value", value)}
    known["control"] = None if control is None else _number(f"{id}: control", control)
    known["interval"] = None if interval is None else _interval(f"{id}: interval", interval)
    known["n"] = n
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise UsageError(f"{id}: n must be a whole number of at least 1, not {n!r}")
    needed = finding.rule.names | (finding.partly.names if finding.partly else set())
    for name in needed | (set() if finding.exact else {"interval"}):
        if known[name] is None:
            raise UsageError(f"{id}: give {name}=...; its rule is `{finding.rule.text}`")
    verdict = "reproduced" if finding.rule(known) else "not reproduced"
    if verdict == "not reproduced" and finding.partly and finding.partly(known):
        verdict = "partly"
    refused = "" if finding.exact else _without_width(known["interval"])
    if refused:
        refused += " of width 0: take more examples, or measure what varies between them"
    if refused or run["profile"] != "tiny":
        verdict = "not judged"
    before = [row for row in run["rows"] if row["id"] == id]
    run["rows"] = [row for row in run["rows"] if row["id"] != id]
    now = time.perf_counter()
    row = {"id": id, "notebook": run["notebook"], "claim": finding.claim, **known, "verdict": verdict}
    row |= {"interval": None} if refused else {}
    row |= {"rule": finding.rule.text, "seconds": round(now - run["clock"], 2), "peak_mb": round(peak_mb(), 1)}
    run["clock"] = now
    told = "; ".join(filter(None, (refused, why)))
    run["rows"].append({**row, "why": told, "times": 1 + sum(r["times"] for r in before)})
    _save()
    _card(finding, row, known, why, refused)


def _card(finding: Finding, row: dict, known: dict, why: str, refused: str) -> None:
    rule = finding.partly if row["verdict"] == "partly" else finding.rule
    lines = {
        "paper": finding.source(),
        "reported": finding.told(),
        "ours": f"{shown(row['value'])} ({finding.measured})",
        "control": f"{shown(row['control'])} ({finding.control})",
        "interval": shown(row["interval"]) + (f", n = {row['n']}" if row["n"] else ""),
        "verdict": row["verdict"] + (f", {refused}" if refused else ""),
        "rule": ("partly if " if row["verdict"] == "partly" else "") + f"{rule.words()}  →  {rule.filled(known)}",
    }
    lines |= {"rule changed": "; ".join(finding.rule_changed)} if finding.rule_changed else {}
    lines |= {"why ours differs": why} if why else {}
    text = f"{finding.id}  {finding.claim}\n" + "\n".join(f"  {key:<17}{line}" for key, line in lines.items())
    colour = COLOURS[row["verdict"]]
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{key}</th><td style="text-align:left'
        + (f';color:{colour};font-weight:bold">' if key == "verdict" else '">')
        + f"{html.escape(line)}</td></tr>"
        for key, line in lines.items()
    )
    title = f"<b>{html.escape(finding.id)}</b> {html.escape(finding.claim)}"
    box = f"border-left:6px solid {colour};padding:2px 12px;margin:6px 0"
    _display(text, f'<div style="{box}">{title}<table>{cells}</table></div>')


def ledger() -> None:
    """Show what this notebook has judged, and what it still owes."""
    run = _begun("ledger")
    columns = ("id", "claim", "ours", "control", "interval", "verdict")
    table = [(r["id"], r["claim"], shown(r["value"]), shown(r["control"]), shown(r["interval"]), r["verdict"])
             for r in run["rows"]]  # fmt: skip
    judged = {row["id"] for row in run["rows"]}
    table += [(f.id, f.claim, "", "", "", f"not done: {f.not_done}" if f.not_done else "still to judge")
              for f in run["registry"].values() if f.notebook == run["notebook"] and f.id not in judged]  # fmt: skip
    table += [("", m["name"], f"{shown(m['value'])} {m['unit']}".strip(), "", "", "") for m in run["metrics"]]
    text = "\n".join("  ".join(filter(None, line)) for line in table)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table)
    head = "".join(f"<th>{column}</th>" for column in columns)
    _display(text, f"<table><tr>{head}</tr>{body}</table>")


def close() -> None:
    """What the runner asks for in the same kernel, after the last cell: what is wrong with widgets, hooks still open,
    embedded models that were opened, and the device in use."""
    hooks, plots, models = (sys.modules.get(f"mmfm_utils.{name}") for name in ("hooks", "plots", "models"))
    torch = sys.modules.get("torch")
    told = {"widgets": plots.changed() if plots else [], "loaded": sorted(models.LOADED) if models else []}
    told |= {"open_hooks": [str(hook) for hook in hooks.leftover()] if hooks else []}
    device = torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else "cpu"
    _save(closed=True, device=device, **told)
