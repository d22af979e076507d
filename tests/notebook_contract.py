"""The notebook contract, as checks.

Each check takes a notebook (an nbformat node) and returns complaints in plain words: an empty list is a pass.
`python -m tests.notebook_contract [NOTEBOOK ...]` prints the complaints and ends with 1 where there are any; without
names it takes every notebook in notebooks/. tests/test_notebooks.py runs the same checks.
"""

import ast
import base64
import contextlib
import json
import re
import struct
import sys
from pathlib import Path

import nbformat

from mmfm_utils import UsageError, collection, findings, runner
from mmfm_utils.course.exercises import exercises, is_solution, is_test, place, python_of
from mmfm_utils.runner.report import FIGURE_TEXT

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

MAX_LINES = 25
MAX_BYTES = 500_000
MAX_DPI = 80
MAX_PIXELS = 1100
REQUIRED_PARAMETERS = {"profile": "tiny", "device": "auto", "seed": 0}

# After the title, these headings (level 2 or deeper, any case, more words may follow) stand in this order.
SECTIONS = [
    ("Parameters", r"parameters\b"),
    ("Set-up", r"set-?\s?up\b"),
    ("at least one section of its own", None),
    ("Unimodal and multimodal", r"unimodal (and|or|against|versus|vs\.?) multimodal\b"),
    ("Try it yourself", r"try it yourself\b"),
    ("What goes wrong", r"what goes wrong\b"),
    ("The ledger", r"(the |this notebook's )?ledger\b"),
    ("References", r"references\b"),
]
PICTURE_FILE = re.compile(r"\.(png|jpe?g|gif|svg|webp|bmp|tiff?)$", re.I)
ROOTS = "home|root|tmp|usr|opt|mnt|srv|var|etc|private|Users|Volumes"
ABSOLUTE_PATH = re.compile(rf"^(/[\w.~-]+/[\w./~-]*|/({ROOTS})\b.*|~(/.*)?|[A-Za-z]:[\\/].*)$")
MACHINE_PATH = re.compile(rf"(?<![\w./:-])/(?:{ROOTS})/[\w.-]+|{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}\b")
SHELL = re.compile(r"\s*(!|%%|%(pip|conda|mamba|uv|sx|system|cd|run|load|env)\b)|.*=\s*!\w")
NETWORK_MODULES = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "http", "socket", "ftplib", "huggingface_hub"}
NETWORK_CALLS = {"hf_hub_download", "snapshot_download", "urlopen", "urlretrieve", "load_state_dict_from_url", "wget"}
READ_BY = {r"collection\.notebooks": "data/notebooks.yaml", r"findings\.registry": "data/findings.yaml"}
PICTURE_READERS = {"imread", "read_image", "decode_image"}
UNSAFE = re.compile(r"\b(pickle|cPickle|dill|joblib\.load|torch\.load|trust_remote_code|allow_pickle)\b")
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


# ---- reading a notebook ------------------------------------------------------------------------------------------


def code_cells(nb):
    """[(number, cell)] of the code cells, numbered from 1 as on the page (`In [7]` is cell 7)."""
    return list(enumerate(runner.code_cells(nb), 1))


def tags(cell):
    return cell.metadata.get("tags", [])


def trees(nb, skip_parameters=False):
    """[(number, syntax tree)] of the code cells; a cell that is not Python is left to `check_source`."""
    found = []
    for n, cell in code_cells(nb):
        if skip_parameters and "parameters" in tags(cell):
            continue
        with contextlib.suppress(SyntaxError):
            found.append((n, ast.parse(python_of(cell.source))))
    return found


def headings(nb):
    """[(index, level, text)] of the Markdown headings, fenced code left out."""
    found = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.M | re.S)
        for level, words in re.findall(r"^(#{1,6})\s+(.+?)\s*#*\s*$", text, re.M):
            found.append((i, len(level), words))
    return found


def called(node):
    """The dotted name that a call calls: `Image.open`, `judge`."""
    parts, at = [], node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    if isinstance(at, ast.Name):
        parts.append(at.id)
    return ".".join(reversed(parts))


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def strings(tree):
    """The string constants, docstrings and lone strings left out."""
    lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in lone
    ]


def images(cell):
    """The PNG pictures among a cell's outputs, as bytes."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {}).get("image/png")
        if data:
            found.append(base64.b64decode("".join(data)))
    return found


def png_size(data):
    """(width, height, dots per inch or None) from the bytes of a PNG."""
    width, height = struct.unpack(">II", data[16:24])
    at, dpi = 8, None
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"pHYs":
            per_metre, _, unit = struct.unpack(">IIB", data[at + 8 : at + 17])
            dpi = per_metre * 0.0254 if unit == 1 else None
        if kind in (b"IDAT", b"IEND"):
            break
        at += 12 + length
    return width, height, dpi


# ---- the source --------------------------------------------------------------------------------------------------


def check_source(nb):
    """What the runner refuses: no Python, a shell, parameters that are not plain values or are never read."""
    return runner.check_source(nb, {})


def check_cells(nb):
    """Every code cell holds something, is at most 25 lines long, and starts no process."""
    found = [f"an empty code cell: {place(nb, i)} comes before it" for i, c in enumerate(nb.cells)
             if c.cell_type == "code" and not c.source.strip()]  # fmt: skip
    for n, cell in code_cells(nb):
        lines = [line for line in cell.source.strip().splitlines() if not line.strip().startswith("### ")]
        if len(lines) > MAX_LINES:
            found.append(f"cell {n}: {len(lines)} lines of code; at most {MAX_LINES}: one idea a cell")
        found += [f"cell {n}: `{line.strip()[:40]}` runs something outside Python"
                  for line in cell.source.splitlines() if SHELL.match(line)]  # fmt: skip
        if re.search(r"\b(subprocess|os\.system|get_ipython)\b", cell.source):
            found.append(f"cell {n}: starts a process or speaks to the shell")
    return found


def check_parameters(nb):
    """The three parameters of every notebook, with their values."""
    try:
        values = runner.defaults(nb)
    except (ValueError, SyntaxError):
        return []  # `check_source` tells
    return [f"the parameters cell must say `{name} = {json.dumps(value)}`"
            for name, value in REQUIRED_PARAMETERS.items() if name not in values or values[name] != value]  # fmt: skip


def check_paths(nb):
    """No absolute path in the code, and no path of a machine in text, outputs or metadata."""
    found = [
        f"cell {n}: the absolute path {s!r}" for n, tree in trees(nb) for s in strings(tree) if ABSOLUTE_PATH.match(s)
    ]
    for i, cell in enumerate(nb.cells):
        texts = [cell.source, json.dumps(cell.metadata)]
        for output in cell.get("outputs", []):
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            texts += [value if isinstance(value, str) else json.dumps(value) for value in data.values()]
            texts += ["".join(output.get("text", ""))]
        for path in MACHINE_PATH.findall("\n".join(texts)):
            found.append(f"{place(nb, i)}: a path of one machine, {path!r}")
    for path in MACHINE_PATH.findall(json.dumps(nb.metadata)):
        found.append(f"the notebook's metadata hold a path of one machine, {path!r}")
    return found


def check_device(nb):
    """The device is the `device` parameter; only a noise generator may be put on the CPU by name."""
    found = []
    for n, tree in trees(nb, skip_parameters=True):
        generators = [call for call in calls(tree) if called(call).split(".")[-1] == "Generator"]
        allowed = {
            id(s) for call in generators for s in ast.walk(call) if isinstance(s, ast.Constant) and s.value == "cpu"
        }
        for node in ast.walk(tree):
            named = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if named and re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", node.value) and id(node) not in allowed:
                found.append(f"cell {n}: the device {node.value!r} is hard-coded; use the parameter `device`")
            if isinstance(node, ast.Call) and called(node).endswith(".cuda"):
                found.append(f"cell {n}: `.cuda()`; use the parameter `device`")
    return found


def check_network(nb):
    """Nothing in a code path may reach for the network: weights come through `mmfm_utils.models.load`."""
    found = []
    for n, tree in trees(nb):
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [m for m in modules if m.split(".")[0] in NETWORK_MODULES]
            found += [f"cell {n}: imports `{m}`, which reaches for the network" for m in bad]
        for call in calls(tree):
            name = called(call).split(".")[-1]
            if name in NETWORK_CALLS:
                found.append(f"cell {n}: `{name}` reaches for the network")
            if name == "from_pretrained":
                found.append(f"cell {n}: `from_pretrained`; load models with `mmfm_utils.models.load`")
            for key in call.keywords:
                if key.arg == "pretrained" and isinstance(key.value, ast.Constant) and key.value.value:
                    found.append(f"cell {n}: `pretrained={key.value.value!r}` fetches weights from a hub")
        links = [s for s in strings(tree) if re.match(r"(https?|ftp|hf|s3)://", s)]
        found += [f"cell {n}: the address {s[:40]!r} in code; links belong in Markdown" for s in links]
    return found


def check_pictures(nb):
    """Figures are computed in the notebook; none is read from a file."""
    found = []
    for n, tree in trees(nb):
        for name in map(called, calls(tree)):
            if name.split(".")[-1] in PICTURE_READERS or name.endswith("Image.open"):
                found.append(f"cell {n}: `{name}` reads a picture from a file; figures are computed here")
        files = [s for s in strings(tree) if PICTURE_FILE.search(s) and not re.search(r"\s", s)]
        found += [f"cell {n}: the picture file {s!r}; figures are computed and shown here" for s in files]
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown" and re.search(r"!\[[^\]]*\]\([^)]*\)|<img\b", cell.source):
            found.append(f"{place(nb, i)}: a picture in Markdown; figures are computed in a code cell")
        if cell.get("attachments"):
            found.append(f"{place(nb, i)}: an attached file; figures are computed in a code cell")
    return found


def check_unsafe(nb):
    """No pickle and no remote code."""
    names = [(n, name) for n, cell in code_cells(nb) for name in UNSAFE.findall(cell.source)]
    return [f"cell {n}: `{name}` can run foreign code; weights are safetensors, arrays are plain" for n, name in names]


def check_sections(nb):
    """Title and claim first, then the sections of every notebook, in their order."""
    found = []
    first = nb.cells[0] if nb.cells else None
    title = re.match(r"#\s+\S.*\n+(.+)", first.source) if first is not None and first.cell_type == "markdown" else None
    if not title:
        found.append("the first cell must be Markdown: `# Title`, and below it the claim in one sentence")
    elif len(title.group(1).split()) < 8:
        found.append("below the title stands the claim in one sentence: phenomenon, model, evidence, control")
    heads = [(i, words) for i, level, words in headings(nb) if level >= 2]
    places, at = {}, -1
    for name, pattern in SECTIONS:
        if pattern is None:
            continue
        fits = [k for k, (_, words) in enumerate(heads) if re.match(r"(\d+[.)]?\s+)?" + pattern, words, re.I)]
        after = [k for k in fits if k > at]
        if after:
            places[name] = at = after[0]
        elif fits:
            order = ", ".join(name for name, _ in SECTIONS)
            found.append(f"the section '{name}' stands too early; the order is: {order}")
        else:
            found.append(f"the section '{name}' is missing")
    if {"Set-up", "Unimodal and multimodal"} <= places.keys():
        if places["Unimodal and multimodal"] - places["Set-up"] < 2:
            found.append("between 'Set-up' and 'Unimodal and multimodal' stands at least one section, one a finding")
    tagged = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and "parameters" in tags(cell)]
    if tagged and "Parameters" in places and tagged[0] < heads[places["Parameters"]][0]:
        found.append("the parameters cell stands before the heading 'Parameters'")
    return found


def check_exercises(nb, name=""):
    """Two to four exercises (the tour may do without); each a solution cell with markers, then a locked test cell."""
    pairs, found = exercises(nb), []
    least = 2 if re.match(r"\d\d_", name) and not name.startswith("00_") else 0
    if not least <= len(pairs) <= 4:
        found.append(f"{len(pairs)} exercises; a notebook has {least or 'none'} to 4")
    ids = [cell.metadata["nbgrader"].get("grade_id") for cell in nb.cells if "nbgrader" in cell.metadata]
    found += [f"the grade_id {g!r} is used twice" for g in sorted({g for g in ids if ids.count(g) > 1}, key=str)]
    tests = {test for _, test in pairs}
    for i, cell in enumerate(nb.cells):
        if is_test(cell) and i not in tests:
            found.append(f"{place(nb, i)}: a test cell that does not follow a solution cell")
        if "BEGIN SOLUTION" in cell.source and not is_solution(cell):
            found.append(f"{place(nb, i)}: a solution outside a solution cell would be shown to students")
        if "BEGIN HIDDEN TESTS" in cell.source and not is_test(cell):
            found.append(f"{place(nb, i)}: hidden tests outside a test cell would be shown to students")
    for i, test in pairs:
        solution, here = nb.cells[i], place(nb, i)
        wanted = {"schema_version": 3, "solution": True, "grade": False, "locked": False}
        found += [f"{here}: {what}" for what in _marks(solution, wanted, "SOLUTION", 1)]
        if test is None:
            found.append(f"{here}: the next code cell after a solution cell must be its test cell (grade: true)")
            continue
        grade_id = f"test-{solution.metadata['nbgrader'].get('grade_id')}"
        found += [f"{place(nb, test)}: {what}" for what in _test_cell(nb.cells[test], grade_id)]
    return found


def _marks(cell, wanted, region, least):
    """What is wrong with the nbgrader metadata and the markers of a cell."""
    given = cell.metadata["nbgrader"]
    wrong = {key: value for key, value in wanted.items() if given.get(key) != value}
    found = [f"metadata.nbgrader.{key} is {given.get(key)!r}, must be {value!r}" for key, value in wrong.items()]
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(given.get("grade_id", ""))):
        found.append("metadata.nbgrader.grade_id is missing or not a plain name")
    marks = re.findall(rf"^\s*### (BEGIN|END) {region}\s*$", cell.source, re.M)
    if marks not in [["BEGIN", "END"], [] if least == 0 else None]:
        found.append(f"one `### BEGIN {region}` and one `### END {region}` must stand here, each on its own line")
    return found


def _test_cell(cell, grade_id):
    """What is wrong with a test cell."""
    wanted = {"schema_version": 3, "solution": False, "grade": True, "locked": True, "grade_id": grade_id}
    found = _marks(cell, wanted, "HIDDEN TESTS", 0)
    points = cell.metadata["nbgrader"].get("points")
    if not isinstance(points, int | float) or points <= 0:
        found.append("the test cell needs points above 0")
    with contextlib.suppress(SyntaxError):
        asserts = [node for node in ast.walk(ast.parse(python_of(cell.source))) if isinstance(node, ast.Assert)]
        if not asserts:
            found.append("the test cell asserts nothing")
        if any(node.msg is None for node in asserts):
            found.append("an assert without a message; say what the likely mistake is")
    return found


def check_findings(nb, name="", registry=None):
    """Every finding that the registry gives to this notebook is judged in it, and no other."""
    registry = load_registry() if registry is None else registry
    mine = {key for key, notebook in registry.items() if notebook == name}
    judged, found = {}, []
    for n, tree in trees(nb):
        for call in calls(tree):
            if called(call).split(".")[-1] == "judge":
                given = [*call.args[:1], *(key.value for key in call.keywords if key.arg == "id")]
                if given and isinstance(given[0], ast.Constant):
                    judged.setdefault(given[0].value, n)
                else:
                    found.append(f"cell {n}: findings.judge must be given the finding's id in so many letters")
    found += [f'the finding {key} is never judged: findings.judge("{key}", ...)' for key in sorted(mine - set(judged))]
    strange = {key: n for key, n in judged.items() if key not in mine}
    return found + [f"cell {n}: judges {key}, which the registry does not give here" for key, n in strange.items()]


def load_registry(path=None):
    """{id: notebook} from data/findings.yaml; a row that is marked as not done need not be judged."""
    path = path or ROOT / "data" / "findings.yaml"
    if not path.exists():
        return {}
    return {key: finding.notebook for key, finding in findings.registry(path).items() if not finding.not_done}


def check_table(nb, name, table=None):
    """The notebook is as its line in data/notebooks.yaml says, and its stamp covers the data that its code reads."""
    line = (collection.notebooks() if table is None else table).get(name)
    if line is None or not line.here:
        return [f"data/notebooks.yaml has no line that says that {name} is here"]
    title, found = next((words for _, level, words in headings(nb) if level == 1), ""), []
    if title != line.title:
        found.append(f"its title is {title!r}, and {line.title!r} in data/notebooks.yaml")
    families = nb.metadata.get("mmfm", {}).get("families", [])
    if set(families) != set(line.families):
        found.append(f"metadata.mmfm.families are {families}, and {list(line.families)} in data/notebooks.yaml")
    code = "\n".join(cell.source for _, cell in code_cells(nb))
    for read, file in READ_BY.items():
        if re.search(rf"\b{read}\b", code) and file not in nb.metadata.get("mmfm", {}).get("reads", []):
            found.append(f"`{read}` reads {file}: metadata.mmfm.reads must name it, so that the stamp covers it")
    return found


# ---- the committed outputs ---------------------------------------------------------------------------------------


def check_executed(nb):
    """Committed as one run from a fresh kernel left it: in order, without an error or a warning."""
    found = []
    for n, cell in code_cells(nb):
        if cell.get("execution_count") != n:
            found.append(f"cell {n}: its execution count is {cell.get('execution_count')}: run the notebook in order")
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {n}: ended in an error, {output.get('ename')}: {str(output.get('evalue'))[:80]}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {n}: a warning or progress bar on the page: {''.join(output.text).strip()[:80]!r}")
    if not any(cell.get("outputs") for _, cell in code_cells(nb)):
        found.append("no outputs are committed")
    return found


def check_size(nb, path=None):
    """At most 500 KB."""
    size = path.stat().st_size if path else len(nbformat.writes(nb).encode())
    return [f"{size / 1000:.0f} KB; at most {MAX_BYTES / 1000:.0f}"] if size > MAX_BYTES else []


def check_metadata(nb):
    """The plain Python kernel, nbformat 4.5, and no widget state."""
    found = []
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("metadata.kernelspec.name must be `python3`, so that every machine has it")
    if (nb.nbformat, nb.nbformat_minor) < (4, 5):
        found.append("nbformat 4.5 or newer, with cell ids, is needed")
    if "widgets" in nb.metadata:
        found.append("widget state is committed (metadata.widgets)")
    for n, cell in code_cells(nb):
        if any(WIDGET_MIME in output.get("data", {}) for output in cell.get("outputs", [])):
            found.append(f"cell {n}: a live widget is committed; keep its static twin only")
    return found


def check_figures(nb):
    """At most 80 dpi, and the Markdown below says in words what is to be seen: `*Figure: ...*`."""
    found = []
    for i, cell in enumerate(nb.cells):
        pictures = images(cell)
        if not pictures:
            continue
        here = place(nb, i)
        for width, height, dpi in map(png_size, pictures):
            if max(width, height) > MAX_PIXELS:
                found.append(f"{here}: a figure of {width} x {height} pixels; at most {MAX_PIXELS} either way")
            if dpi is not None and dpi > MAX_DPI + 0.5:
                found.append(f"{here}: a figure at {dpi:.0f} dpi; at most {MAX_DPI}")
        below = nb.cells[i + 1] if i + 1 < len(nb.cells) else None
        text = FIGURE_TEXT.search(below.source) if below is not None and below.cell_type == "markdown" else None
        if not text:
            found.append(f"{here}: the Markdown cell right below a figure describes it: a line `*Figure: ...*`")
        elif len(text.group(1).split()) < 6:
            found.append(f"{here}: the text of the figure says too little for a reader who cannot see it")
    return found


def check_stamp(nb):
    """Nobody edited a cell, or the weights, and left the old outputs."""
    reason = runner.stale(nb)
    return [reason] if reason else []


CHECKS = (
    check_source, check_cells, check_parameters, check_paths, check_device, check_network, check_pictures, check_unsafe,
    check_sections, check_executed, check_metadata, check_figures, check_stamp,
)  # fmt: skip


def complaints(nb, name, path=None, registry=None, table=None):
    """Everything that is wrong with a notebook, in plain words."""
    found = [complaint for check in CHECKS for complaint in check(nb)]
    found += check_table(nb, name, table) + check_exercises(nb, name) + check_findings(nb, name, registry)
    return found + check_size(nb, path)


def notebooks():
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def main(arguments):
    paths = [Path(a) for a in arguments] or notebooks()
    bad = 0
    for path in paths:
        try:
            found = complaints(runner.read(path), path.stem, path)
        except UsageError as error:
            found = [str(error)]
        bad += bool(found)
        for complaint in found:
            print(f"{path.name}: {complaint}")
    print(f"{len(paths)} notebooks, {bad} with complaints")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
