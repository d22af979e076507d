"""The report: ledger.json, ledger.md and report.html of all the results in a folder."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image

from .. import UsageError, collection, findings, say, write_atomic
from ..collection import Notebook
from ..findings import COLOURS, shown
from ..models import FAMILIES
from .notebook import read, tags

NOT_DONE = "not done"  # of a finding that the registry keeps with the reason why it cannot be measured
# {verdict: (sign, colour)}; the sign is for those who do not tell colours apart.
VERDICTS = {v: (sign, COLOURS[v]) for v, sign in zip(findings.VERDICTS, "✓≈✗–", strict=True)}
VERDICTS |= {NOT_DONE: ("∅", COLOURS["not judged"])}
FIGURE_TEXT = re.compile(r"^\*Figure(?: \d+)?:\s+(.+?)\*\s*$", re.M | re.S)  # below a figure: what it shows, in words
THUMBNAIL = 600  # pixels wide, twice what the page gives them, for screens with fine pixels
LEDGER = tuple("id notebook claim value control interval n verdict rule seconds peak_mb why".split())


def stored(folder: Path) -> list[dict]:
    """The results in a folder, by name of the notebook."""
    found = []
    for path in sorted(path for path in folder.glob("*.json") if path.name != "ledger.json"):
        try:
            found += [result] if "status" in (result := json.loads(path.read_text(encoding="utf-8"))) else []
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
        context = _context(folder, results, rows, known)
        for name in ("ledger.md", "report.html"):
            write_atomic(folder / name, _rendered(f"{name}.jinja", context))
        return (folder / "report.html").resolve()
    except OSError as error:
        say(f"cannot write the report into {folder} ({error.strerror}): make room, then `mmfm report`")


def _rendered(template: str, context: dict) -> str:
    """A template of templates/ filled in; in HTML all that is filled in is escaped."""
    import jinja2  # here, because only the report needs it

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader,
        autoescape=lambda name: name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template(template).render(context)


def _context(folder: Path, results: list[dict], rows: list[dict], known: dict) -> dict:
    """What both templates are filled with."""
    figures = {name: _figures(cells, name) for name, cells in _executed(folder, results).items()}
    cards = [_card(row, known.get(row["id"]), figures.get(row["notebook"], [])) for row in rows]
    cards += [_card(_unjudged(entry), entry, []) for entry in known.values() if entry.not_done]
    families = list(dict.fromkeys((*FAMILIES, *filter(None, (card["family"] for card in cards)))))
    count = Counter(card["verdict"] for card in cards)
    return {
        "profile": folder.name,
        "results": results,
        "cards": cards,
        "families": families,
        "present": {card["family"] for card in cards},
        "verdicts": {verdict: (*VERDICTS[verdict], count[verdict]) for verdict in VERDICTS if count[verdict]},
        "lessons": _lessons(results, cards, families),
        "states": Counter(result["status"] for result in results),
        "figures": {name: drawn for name, drawn in figures.items() if drawn},
        "costs": [
            [r["name"], r["status"], r["reason"], r["seconds"], round(r["peak_mb"]), r["device"]] for r in results
        ],
        "metrics": [[r["name"], m["name"], f"{shown(m['value'])} {m['unit']}"] for r in results for m in r["metrics"]],
        "packages": results[-1]["versions"] if results else {},
    }


def _executed(folder: Path, results: list[dict]) -> dict[str, list]:
    """{name: cells} of the executed notebooks in a folder, without the cells of the runner."""
    paths = {result["name"]: folder / f"{result['name']}.ipynb" for result in results}
    return {
        name: [cell for cell in read(path).cells if "injected-parameters" not in tags(cell)]
        for name, path in paths.items()
        if path.exists()
    }


def _unjudged(entry) -> dict:
    """The row of a finding that the registry keeps although it cannot be measured here."""
    empty = dict.fromkeys(("value", "control", "interval", "n"))
    row = {"id": entry.id, "notebook": entry.notebook, "claim": entry.claim, "verdict": NOT_DONE}
    return row | empty | {"rule": "", "why": entry.not_done}


def _card(row: dict, entry, figures: list[dict]) -> dict:
    """A finding as the page tells it: its row, what the registry says of it, and the figure that shows it."""
    figure = next((figure for figure in figures if row["id"] in figure["ids"]), None)
    return row | _source(entry) | {"entry": entry, "family": entry.family if entry else "", "figure": figure,
                                   "sign": VERDICTS[row["verdict"]][0], "numbers": _numbers(row)}  # fmt: skip


def _numbers(row: dict) -> list[tuple]:
    """(name, value, control, interval) for every name among them; the name of a number alone is empty."""
    parts = [row[key] if isinstance(row[key], dict) else {"": row[key]} for key in ("value", "control", "interval")]
    names = dict.fromkeys(name for part in parts for name, number in part.items() if number is not None)
    return [(name, *(part.get(name) for part in parts)) for name in names]


def _lessons(results: list[dict], cards: list[dict], families: list[str]) -> list[dict]:
    """The lines of the map: the table of notebooks, and what else was run, with the findings of each by family."""
    ran, lines = {result["name"]: result for result in results}, collection.notebooks()
    lines |= {name: Notebook(name, name, "", (), "here", name) for name in ran if name not in lines}
    found = []
    for name, line in lines.items():
        own = [card for card in cards if card["notebook"] == name]
        by_family = {family: [card for card in own if card["family"] == family] for family in families}
        found.append({"line": line, "result": ran.get(name), "cards": own, "by_family": by_family})
    return found


def _figures(cells: list, name: str) -> list[dict]:
    """The figures of a notebook: where each is on the page, its pictures, what it shows in words, whose findings."""
    found, ids = [], {}
    for id in re.findall(r'judge\(\s*"([^"]+)"', "\n".join(c.source for c in cells if c.cell_type == "code")):
        ids.setdefault(_figure_of(cells, id), []).append(id)
    code = [n for n, cell in enumerate(cells) if cell.cell_type == "code"]
    for number, n in enumerate(code, 1):
        if pngs := _pngs(cells[n]):
            below = cells[n + 1].source if n + 1 < len(cells) else ""
            words = FIGURE_TEXT.search(below)
            found.append({
                "anchor": f"{name}-{number}",
                "cell": number,
                "pictures": [_webp(png) for png in pngs],
                "thumbnail": _webp(pngs[0], THUMBNAIL) if number in ids else "",
                "words": " ".join(words[1].split()) if words else f"Figure of cell {number} of {name}",
                "ids": ids.get(number, []),
            })  # fmt: skip
    return found


def _webp(png: str, width: int | None = None) -> str:
    """A PNG, base64, as a WebP that is half as large: as it was drawn, or small and at most so many pixels wide."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"), io.BytesIO()
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if width:
        flat.thumbnail((width, 10 * width))
    flat.save(file, "WEBP", **({"quality": 75} if width else {"lossless": True, "quality": 20, "method": 1}))
    return base64.b64encode(file.getvalue()).decode()


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


def _source(entry) -> dict:
    """What the registry says of where a finding comes from."""
    return {"paper": entry.source() if entry else "", "reported": entry.told() if entry else ""}


def changes(old, new) -> list[str]:
    """What changed between two ledgers (files, or folders that hold one) beyond the tolerance of each finding."""
    ledgers, known = [], findings.registry()
    for path in map(Path, (old, new)):
        path = path / "ledger.json" if path.is_dir() else path
        try:
            ledgers.append({row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))})
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"no ledger at {path}: give a ledger.json, or the folder that holds it") from None
    before, after = ledgers
    want = {id: row | {"tolerance": known[id].tolerance if id in known else 0} for id, row in before.items()}
    lines = findings.compare([row for row in after.values() if row["id"] in before], want)
    return lines + [f"{id} is new" for id in after if id not in before]
