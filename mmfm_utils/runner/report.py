"""The report: ledger.json, ledger.md and report.html of all the results in a folder."""

import html
import json
import re
from collections import Counter
from pathlib import Path

from .. import UsageError, findings, say, write_atomic
from ..findings import COLOURS, shown
from .notebook import read, tags

MARKS = dict(zip(findings.VERDICTS, "✓≈✗–", strict=True))  # of verdicts, for those who do not tell colours apart
LEDGER = tuple("id notebook claim value control interval n verdict rule seconds peak_mb why".split())


def stored(folder: Path) -> list[dict]:
    """The results in a folder, by name of the notebook."""
    found = []
    for path in sorted(path for path in folder.glob("*.json") if path.name != "ledger.json"):
        try:
            found += [result] if "status" in (result := json.loads(path.read_text())) else []
        except (ValueError, TypeError):
            say(f"{path} is damaged and left out: run its notebook again")
    return found


def show(folder: Path) -> Path | None:
    """Build ledger.json, ledger.md and report.html anew from all the results in a folder."""
    results, known = stored(folder), findings.registry()
    rows = [row for result in results if result["status"] != "failed" for row in result["rows"]]
    try:
        lines = [{k: row[k] for k in LEDGER} | _source(known.get(row["id"])) for row in rows]
        write_atomic(folder / "ledger.json", json.dumps(lines, indent=1))
        write_atomic(folder / "ledger.md", _markdown(results, rows))
        write_atomic(folder / "report.html", page(folder, results, rows))
        return (folder / "report.html").resolve()
    except OSError as error:
        say(f"cannot write the report into {folder} ({error.strerror}): make room, then `mmfm report`")


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:auto;padding:12px;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}td,h3{overflow-wrap:anywhere}
th,td{text-align:left;vertical-align:top;padding:4px 8px}
tr{border-bottom:1px solid #ddd}a{white-space:nowrap}img{max-width:100%;margin:6px 0}
@media(min-width:901px){td:first-child{white-space:nowrap}}
@media(max-width:900px){tr:has(th){display:none}tr{display:block;padding:8px 0}td{display:block;padding:1px 0}
td:empty{display:none}td::before{content:attr(data-h) ": ";color:#777}}"""


class _Html(str):
    """Text that needs no escaping."""


def _table(head: tuple, lines: list) -> str:
    """An HTML table; nothing where there are no lines."""
    if not lines:
        return ""
    body = ""
    for line in lines:
        cells = (cell if isinstance(cell, _Html) else html.escape(str(cell)) for cell in line)
        body += "<tr>" + "".join(f'<td data-h="{h}">{cell}</td>' for h, cell in zip(head, cells)) + "</tr>"
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table>"


def _figures(cells: list, name: str) -> str:
    """The PNGs of the cells tagged `figure` of a notebook, or all of its PNGs; each cell is a place to link to."""
    cells = [(n, cell) for n, cell in enumerate((c for c in cells if c.cell_type == "code"), 1) if _pngs(cell)]
    cells = [(n, cell) for n, cell in cells if "figure" in tags(cell)] or cells
    image, found = '<img alt="{}, cell {}" src="data:image/png;base64,{}">', ""
    for n, cell in cells:
        drawn = (image.format(html.escape(name), n, png.replace("\n", "")) for png in _pngs(cell))
        found += f'<div id="{html.escape(name)}-{n}">{"".join(drawn)}</div>'
    return found


def _pngs(cell) -> list[str]:
    return [o.data["image/png"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]


def _figure_of(cells: list, id: str) -> int | None:
    """The code cell with the figure nearest to where a finding is judged: above it in its section, or else below it."""
    judged = next((n for n, cell in enumerate(cells) if f'judge("{id}"' in re.sub(r"\(\s+", "(", cell.source)), None)
    if judged is None:
        return None
    for steps in (range(judged, -1, -1), range(judged + 1, len(cells))):
        for n in steps:
            if cells[n].cell_type == "markdown" and re.search(r"^##? ", cells[n].source, re.M):
                break
            if cells[n].cell_type == "code" and _pngs(cells[n]):
                return sum(cell.cell_type == "code" for cell in cells[: n + 1])
    return None


HEAD = ("id", "claim", "paper", "reported", "ours", "control", "interval", "verdict")


def _source(entry) -> dict:
    """What the registry says of where a finding comes from."""
    return {"paper": entry.source() if entry else "", "reported": entry.told() if entry else ""}


def _told(row: dict, entry) -> tuple:
    """A finding as the report tells it, without its verdict."""
    numbers = (shown(row[key]) for key in ("value", "control", "interval"))
    return row["id"], row["claim"], *_source(entry).values(), *numbers


COST = ("notebook", "status", "reason", "seconds", "peak MB", "device")


def _cost(results: list[dict]) -> list[tuple]:
    """How each notebook ran, and what it took."""
    return [(r["name"], r["status"], r["reason"], f"{r['seconds']:.1f}", f"{r['peak_mb']:.0f}", r["device"])
            for r in results]  # fmt: skip


def _packages(results: list[dict]) -> list[tuple]:
    """The environment: (package, version)."""
    return list((results[-1]["versions"] if results else {}).items())


def _markdown(results: list[dict], rows: list[dict]) -> str:
    """The findings, the notebooks and the environment as Markdown tables."""
    known = findings.registry()
    tables = {
        HEAD: [(*_told(row, known.get(row["id"])), row["verdict"]) for row in rows],
        COST: _cost(results),
        ("package", "version"): _packages(results),
    }
    text = []
    for head, lines in tables.items():
        cells = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
        text.append("".join(f"| {' | '.join(line)} |\n" for line in cells))
    return "\n".join(text)


def _map(rows: list[dict], known: dict) -> str:
    """The branches of the taxonomy, one a line, and in the column of each family the verdicts, with links."""
    families = dict.fromkeys(["contrastive", "generative", "diffusion", "language"])
    families |= dict.fromkeys(known[row["id"]].family for row in rows if row["id"] in known)
    link = '<a href="#{0}" style="color:{1}" title="{2}: {3}">{0}&nbsp;{4}</a> '
    lines = []
    for notebook in dict.fromkeys(row["notebook"] for row in rows):
        cells = dict.fromkeys(families, "")
        for row in rows:
            if row["notebook"] == notebook and row["id"] in known:
                told = (html.escape(row["id"]), COLOURS[row["verdict"]], row["verdict"], html.escape(row["claim"]))
                told += (MARKS[row["verdict"]],)
                cells[known[row["id"]].family] += link.format(*told)
        lines.append((notebook, *map(_Html, cells.values())))
    key = ", ".join(f'<b style="color:{COLOURS[v]}">{MARKS[v]} {v}</b>' for v in findings.VERDICTS)
    return f"<p>{key}</p>" + _table(("notebook", *families), lines)


def page(folder: Path, results: list[dict], rows: list[dict]) -> str:
    """report.html: self-contained, and readable on a phone."""
    known, count = findings.registry(), Counter(row["verdict"] for row in rows)
    lines, title = [], f"Findings, profile {folder.name}"
    paths = {r["name"]: folder / f"{r['name']}.ipynb" for r in results}
    ran = {
        name: [cell for cell in read(path).cells if "injected-parameters" not in tags(cell)]
        for name, path in paths.items()
        if path.exists()
    }
    for row in rows:
        verdict = f'<b style="color:{COLOURS[row["verdict"]]}">{row["verdict"]}</b> {html.escape(row["why"])}'
        figure = _figure_of(ran.get(row["notebook"], []), row["id"])
        figure = figure and _Html(f'<a href="#{html.escape(row["notebook"])}-{figure}">see it</a>') or ""
        id, *told = _told(row, known.get(row["id"]))
        lines.append((_Html(f'<span id="{html.escape(id)}">{html.escape(id)}</span>'), *told, _Html(verdict), figure))
    undone = [entry for entry in known.values() if entry.not_done]
    lines += [(f.id, f.claim, f.source(), f.told(), "", "", "", f"not done: {f.not_done}", "") for f in undone]
    numbers = [(r["name"], m["name"], f"{shown(m['value'])} {m['unit']}") for r in results for m in r["metrics"]]
    drawn = [(name, _figures(cells, name)) for name, cells in ran.items()]
    figures = "".join(f"<h3>{html.escape(name)}</h3>{pngs}" for name, pngs in drawn if pngs)
    summary = ", ".join(f"{count[v]} {v}" for v in findings.VERDICTS if count[v]) or "none judged"
    states = ", ".join(f"{n} {status}" for status, n in Counter(r["status"] for r in results).items())
    parts = {
        "Findings": _table((*HEAD, "figure"), lines),
        "Notebooks": _table(COST, _cost(results)),
        "Other numbers": _table(("notebook", "number", "value"), numbers),
        "Figures": figures,
        "Environment": _table(("package", "version"), _packages(results)),
    }
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p>Findings: {summary}.<br>Notebooks: {states}.</p>"
        + f'<h2 id="map">The map</h2>{_map(rows, known)}'
        + "".join(f'<h2>{name} <a href="#map">↑</a></h2>{part}' for name, part in parts.items() if part)
        + "</html>\n"
    )


def changes(old, new) -> list[str]:
    """What changed between two ledgers (files, or folders that hold one) beyond the tolerance of each finding."""
    ledgers, known = [], findings.registry()
    for path in map(Path, (old, new)):
        path = path / "ledger.json" if path.is_dir() else path
        try:
            ledgers.append({row["id"]: row for row in json.loads(path.read_text())})
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"no ledger at {path}: give a ledger.json, or the folder that holds it") from None
    before, after = ledgers
    want = {id: row | {"tolerance": known[id].tolerance if id in known else 0} for id, row in before.items()}
    lines = findings.compare([row for row in after.values() if row["id"] in before], want)
    return lines + [f"{id} is new" for id in after if id not in before]
