"""The registry of findings, the rule that judges each, the verdict, and the card that shows it.

A notebook calls `begin` once, `judge` for every finding, `metric` for a number that nothing judges, and `ledger` at the
end. The verdict follows from the rule in data/findings.yaml and from nothing else.
"""

import ast
import difflib
import html
import json
import math
import operator
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

from . import UsageError, root

VERDICTS = ("reproduced", "partly", "not reproduced", "not judged")
PROFILES = ("tiny", "rehearsal", "hub")
COLOURS = dict(zip(VERDICTS, ("#0072B2", "#E69F00", "#D55E00", "#777777"), strict=True))
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
}  # fmt: skip
FUNCTIONS = {"abs": abs, "min": min, "max": max}
NAMES = ("value", "control", "interval", "n")


def nearest(word: str, known) -> str:
    """' (nearest: a, b)', or what there is to choose from, or nothing."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), known, 3, 0.4) or (known if len(known) <= 12 else [])
    return f" (nearest: {', '.join(close)})" if close else ""


def write_atomic(path: Path, text: str) -> None:
    """Write the whole file or leave the old one as it was."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def peak_mb(pid: int | str = "self") -> float:
    """The largest resident memory that a process has had so far, in MB (0 where the system does not tell)."""
    try:
        return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)) / 1024
    except (OSError, AttributeError):
        return 0.0


# ---------------------------------------------------------------------------------------------------------- the rule
class _Any(float):
    """Stands for any number, and for a mapping of any names to numbers, while a rule is checked."""

    def __getitem__(self, key):
        return _Any(random.random())


class Rule:
    """A condition such as `value.late > control.late + 0.1 and interval[0] > 0`; read as a tree, never run as code."""

    def __init__(self, text: str):
        self.text = " ".join(text.split())
        try:
            self.tree = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            raise UsageError(f"`{self.text}` is no expression ({error.msg})") from None
        self.names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)} & set(NAMES)
        self({name: _Any(random.random()) for name in NAMES})

    def __call__(self, known: dict) -> bool:
        try:
            return _typed(self.tree, known, bool)
        except (TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            told = ", ".join(f"{name}={known[name]}" for name in sorted(self.names))
            raise UsageError(f"`{self.text}` does not fit {told} ({type(error).__name__}: {error})") from None

    def filled(self, known: dict) -> str:
        """The rule with the measured numbers in the places of the names."""

        class Fill(ast.NodeTransformer):
            def visit_Call(self, node):
                node.args = [self.visit(part) for part in node.args]
                return node

            def visit_Name(self, node):
                return ast.Name(shown(_eval(node, known)))

            visit_Attribute = visit_Subscript = visit_Name

        return ast.unparse(Fill().visit(ast.parse(self.text, mode="eval")))

    def words(self) -> str:
        """The rule for people: `interval[0]` is the low end of the interval, `value` is ours."""
        text = re.sub(r"\binterval((\.\w+)?)\[0\]", r"low end of interval\1", self.text)
        text = re.sub(r"\binterval((\.\w+)?)\[1\]", r"high end of interval\1", text)
        return re.sub(r"(?<![.\w\"'])value\b", "ours", text)


def _eval(node: ast.AST, known: dict):
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Attribute(value=base, attr=key) | ast.Subscript(value=base, slice=ast.Constant(value=key)):
            return _eval(base, known)[key]
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_typed(part, known)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _typed(part, known, bool)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)([_typed(part, known, bool) for part in parts])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_typed(left, known), _typed(right, known))
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in OPERATORS for op in ops):
            numbers = [_typed(part, known) for part in (left, *rest)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(ops, numbers, numbers[1:]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_typed(part, known) for part in args])
    allowed = ", ".join((*NAMES, *FUNCTIONS))
    raise UsageError(f"`{ast.unparse(node)}` is not allowed in a rule; its names are {allowed}")


def _typed(node: ast.AST, known: dict, condition=None):
    """The value of a part that must be a condition, or else a number."""
    found = _eval(node, known)
    if isinstance(found, bool) != (condition is bool) or not isinstance(found, int | float):
        raise UsageError(f"`{ast.unparse(node)}` must be {'a condition' if condition else 'a number'} in a rule")
    return found


# ------------------------------------------------------------------------------------------------------ the registry
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
        stored = json.loads(path.read_text()) if path.exists() else {}
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


# ------------------------------------------------------------------------------------------------- in the notebook
_run: dict | None = None


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


def shown(value) -> str:
    """A number, a pair or a mapping of either, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "none" if value is None else f"{value:.3g}"


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
