"""Every notebook keeps the contract, and every check of the contract catches what it is there for."""

import dataclasses

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from mmfm_utils import runner
from tests import notebook_contract as contract
from tests.toy_notebook import NAME, REGISTRY, SOLUTION_1, TABLE, figure, solution, toy


@pytest.mark.parametrize("path", contract.notebooks(), ids=lambda p: p.stem)
def test_contract_of(path):
    found = contract.complaints(runner.read(path), path.stem, path)
    assert not found, "\n".join([path.name, *found])


def test_every_finding_has_its_notebook():
    """A finding of the registry that names a notebook which does not exist yet is marked as not done."""
    known = {path.stem for path in contract.notebooks()}
    homeless = {key: notebook for key, notebook in contract.load_registry().items() if notebook not in known}
    assert not homeless, f"findings without a notebook: {homeless}"


# ---- each check, on a notebook with one fault ----------------------------------------------------------------------


def stamped(nb):
    nb.metadata["mmfm"] = nb.metadata.get("mmfm", {}) | {"stamp": runner.stamp(nb)}
    return nb


def complaints(nb, name=NAME, stamp=True):
    if stamp:
        stamped(nb)
    return contract.complaints(nb, name, registry=REGISTRY, table=TABLE)


def code(number):
    """The code cell with a number, as on the page."""
    return lambda nb: dict(contract.code_cells(nb))[number]


def source(number, text, before=None):
    """Put a text into a code cell: at its end, or in place of another text."""

    def fault(nb):
        cell = code(number)(nb)
        assert before is None or before in cell.source
        cell.source = cell.source + "\n" + text if before is None else cell.source.replace(before, text)

    return fault


def words(index, text):
    """Replace the Markdown of a cell."""

    def fault(nb):
        assert nb.cells[index].cell_type == "markdown"
        nb.cells[index].source = text

    return fault


def output(number, **made):
    def fault(nb):
        code(number)(nb).outputs.append(new_output(**made))

    return fault


def nbgrader(number, **changed):
    def fault(nb):
        code(number)(nb).metadata["nbgrader"].update(changed)

    return fault


def dropped(*indices):
    def fault(nb):
        for index in sorted(indices, reverse=True):
            del nb.cells[index]

    return fault


def count(nb):
    code(3)(nb).execution_count = 9


def untag(nb):
    code(1)(nb).metadata["tags"] = []


def tag_twice(nb):
    code(2)(nb).metadata["tags"] = ["parameters"]


def empty_cell(nb):
    nb.cells.insert(5, new_code_cell("\n", execution_count=None))


def attach(nb):
    nb.cells[13]["attachments"] = {"a.png": {"image/png": "AAAA"}}


def larger(**size):
    def fault(nb):
        code(5)(nb).outputs = [figure(**size)]

    return fault


def other_family(nb):
    nb.metadata["mmfm"] = {"families": ["language"]}


def widget_state(nb):
    nb.metadata["widgets"] = {"state": {}}


def other_kernel(nb):
    nb.metadata["kernelspec"]["name"] = "my-venv"


def old_format(nb):
    nb.nbformat_minor = 4


def machine_metadata(nb):
    nb.metadata["papermill"] = {"input_path": "/home/somebody/01_toy.ipynb"}


def swapped(nb):
    nb.cells[14], nb.cells[15] = nb.cells[15], nb.cells[14]


def parameters_first(nb):
    nb.cells[1], nb.cells[2] = nb.cells[2], nb.cells[1]


def five_exercises(nb):
    for k in range(3):
        nb.cells[12:12] = [solution(f"ex{k + 3}-more", SOLUTION_1)]


def no_outputs(nb):
    for _, cell in contract.code_cells(nb):
        cell.outputs = []


FAULTS = {
    "too long": (source(2, "\n".join(f"x{k} = {k}" for k in range(25))), "cell 2: 30 lines of code; at most 25"),
    "not Python": (source(2, "def (:"), "cell 2: SyntaxError"),
    "empty cell": (empty_cell, "an empty code cell: cell 2"),
    "not tagged": (untag, "no cells are tagged `parameters`"),
    "tagged twice": (tag_twice, "2 cells are tagged `parameters`"),
    "computed parameter": (source(1, "m = n * 2"), "may hold only `name = literal`"),
    "unread parameter": (source(1, "batch = 8"), "`batch` is never read"),
    "parameter overwritten": (source(2, "n = 5\nrandom.seed(seed)", "random.seed(seed)"), "`n` is overwritten"),
    "other profile": (source(1, '"hub"', '"tiny"'), 'must say `profile = "tiny"`'),
    "other device": (source(1, '"cuda"', '"auto"'), 'must say `device = "auto"`'),
    "no seed": (source(1, "seeds = 0", "seed = 0"), "must say `seed = 0`"),
    "shell": (source(2, "!ls"), "cell 2: `!ls` runs something outside Python"),
    "shell, assigned": (source(2, "files = !ls"), "runs something outside Python"),
    "install": (source(2, "%pip install x"), "`%pip install x` runs something outside Python"),
    "cell magic": (source(5, "%%bash\nprint", "print"), "`%%bash` runs something outside Python"),
    "subprocess": (source(2, "import subprocess"), "starts a process"),
    "absolute path": (source(2, "open('/data/some/file')"), "the absolute path '/data/some/file'"),
    "home": (source(2, "open('~/file')"), "the absolute path '~/file'"),
    "drive": (source(2, r"open('C:\\file')"), "the absolute path"),
    "path in an output": (output(2, output_type="stream", text="in /home/somebody/x\n"), "cell 2: a path of one"),
    "path in the text": (words(13, "## Unimodal and multimodal\n\nsee /usr/share/x"), "after cell 8: a path"),
    "path in the metadata": (machine_metadata, "metadata hold a path of one machine"),
    "cuda by name": (source(2, "x.to('cuda:0')"), "the device 'cuda:0' is hard-coded"),
    "cpu by name": (source(2, "x.to('cpu')"), "the device 'cpu' is hard-coded"),
    "cuda by method": (source(2, "x.cuda()"), "`.cuda()`"),
    "requests": (source(2, "import requests"), "imports `requests`"),
    "urllib": (source(2, "from urllib.request import urlopen"), "imports `urllib.request`"),
    "hub download": (source(2, "hf_hub_download('a', 'b')"), "`hf_hub_download` reaches for the network"),
    "hub weights": (source(2, "create_model('ViT-B-32', pretrained='openai')"), "`pretrained='openai'` fetches"),
    "from_pretrained": (source(2, "AutoModel.from_pretrained('a/b')"), "`from_pretrained`; load models with"),
    "address": (source(2, "x = 'https://example.org/x.csv'"), "links belong in Markdown"),
    "picture opened": (source(2, "Image.open(f)"), "`Image.open` reads a picture"),
    "picture read": (source(2, "plt.imread(f)"), "`plt.imread` reads a picture"),
    "picture file": (source(2, "show('map.png')"), "the picture file 'map.png'"),
    "picture in Markdown": (words(13, "## Unimodal and multimodal\n![map](map.png)"), "a picture in Markdown"),
    "attachment": (attach, "the Markdown after cell 8: an attached file"),
    "pickle": (source(2, "import pickle"), "`pickle` can run foreign code"),
    "torch.load": (source(2, "torch.load(f)"), "`torch.load` can run foreign code"),
    "remote code": (source(2, "load(trust_remote_code=True)"), "`trust_remote_code` can run foreign code"),
    "no title": (dropped(0), "the first cell must be Markdown"),
    "no claim": (words(0, "# Doubling\n\nIt works."), "below the title stands the claim"),
    "other title": (words(0, f"# Halving\n\n{'word ' * 9}."), "its title is 'Halving', and 'The doubling of numbers'"),
    "other families": (other_family, "metadata.mmfm.families are ['language'], and [] in data/notebooks.yaml"),
    "unstamped table": (source(2, "collection.notebooks()"), "metadata.mmfm.reads must name it"),
    "unstamped registry": (source(2, "findings.registry()"), "reads data/findings.yaml"),
    "no parameters heading": (dropped(1), "'Parameters' is missing"),
    "parameters before their heading": (parameters_first, "before the heading 'Parameters'"),
    "no set-up": (dropped(3), "'Set-up' is missing"),
    "no section of its own": (dropped(5), "at least one section, one a finding"),
    "no unimodal": (dropped(13), "'Unimodal and multimodal' is missing"),
    "nothing to try": (dropped(14), "'Try it yourself' is missing"),
    "nothing goes wrong": (dropped(15), "'What goes wrong' is missing"),
    "sections out of order": (swapped, "stands too early; the order is: Parameters, Set-up"),
    "no ledger": (dropped(16), "'The ledger' is missing"),
    "no references": (dropped(17), "'References' is missing"),
    "one exercise": (dropped(10, 11), "1 exercises; a notebook has 2 to 4"),
    "five exercises": (five_exercises, "5 exercises; a notebook has 2 to 4"),
    "solution not marked": (nbgrader(3, solution=False), "a solution outside a solution cell"),
    "solution locked": (nbgrader(3, locked=True), "metadata.nbgrader.locked is True, must be False"),
    "old schema": (nbgrader(3, schema_version=2), "metadata.nbgrader.schema_version is 2, must be 3"),
    "no grade_id": (nbgrader(3, grade_id=""), "grade_id is missing"),
    "no region": (source(3, "    pass", "    ### END SOLUTION"), "one `### BEGIN SOLUTION` and one `### END SOLUTION`"),
    "grade_id twice": (nbgrader(6, grade_id="ex1-double"), "the grade_id 'ex1-double' is used twice"),
    "test unlocked": (nbgrader(4, locked=False), "cell 4: metadata.nbgrader.locked is False"),
    "test misnamed": (nbgrader(4, grade_id="t1"), "grade_id is 't1', must be 'test-ex1-double'"),
    "no points": (nbgrader(4, points=0), "points above 0"),
    "no test cell": (dropped(11), "must be its test cell"),
    "stray test cell": (dropped(10), "a test cell that does not follow a solution cell"),
    "hidden tests not ended": (source(4, "", "### END HIDDEN TESTS"), "one `### BEGIN HIDDEN TESTS`"),
    "hidden tests elsewhere": (source(5, "### BEGIN HIDDEN TESTS"), "hidden tests outside a test cell"),
    "test without assert": (source(7, "", "assert "), "asserts nothing"),
    "assert without message": (source(7, "assert total(numbers)"), "cell 7: an assert without a message"),
    "finding not judged": (source(8, "print", "findings.judge"), "the finding T1 is never judged"),
    "finding of another": (source(8, 'findings.judge("Z9")'), "cell 8: judges Z9, which the registry does not give"),
    "finding by a variable": (source(8, "findings.judge(numbers)"), "in so many letters"),
    "out of order": (count, "cell 3: its execution count is 9"),
    "error": (output(2, output_type="error", ename="KeyError", evalue="x", traceback=[]), "in an error, KeyError"),
    "warning": (output(2, output_type="stream", name="stderr", text="UserWarning: x"), "a warning or progress bar"),
    "no outputs": (no_outputs, "no outputs are committed"),
    "too large": (output(2, output_type="stream", text="x" * 500_000), "KB; at most 500"),
    "widget state": (widget_state, "widget state is committed"),
    "live widget": (output(2, output_type="display_data", data={contract.WIDGET_MIME: {}}), "a live widget"),
    "other kernel": (other_kernel, "kernelspec.name must be `python3`"),
    "old format": (old_format, "nbformat 4.5 or newer"),
    "too many dots": (larger(dpi=150), "a figure at 150 dpi; at most 80"),
    "too wide": (larger(width=1200), "a figure of 1200 x 240 pixels"),
    "figure without words": (words(9, "It is grey."), "the Markdown cell right below a figure describes it"),
    "figure above code": (dropped(9), "the Markdown cell right below a figure describes it"),
    "figure in few words": (words(9, "*Figure: a map.*"), "says too little"),
}  # fmt: skip


def test_the_toy_keeps_the_contract():
    assert complaints(toy()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name):
    fault, expected = FAULTS[name]
    nb = toy()
    fault(nb)
    found = complaints(nb)
    assert any(expected in complaint for complaint in found), found


@pytest.mark.parametrize(
    "text",
    [
        "g = torch.Generator('cpu').manual_seed(seed)",
        "x = y.cpu().numpy()",
        "layer = 'vision.3.attn'",
        "print('seconds / step', 'a/b', '/ token', 'n/s')",
        "create_model('ViT-B-32', pretrained=None)",
        "%matplotlib inline",
        "a = b != c",
    ],
)
def test_what_is_no_fault(text):
    nb = toy()
    source(2, text)(nb)
    assert complaints(nb) == []


def test_the_tour_may_do_without_exercises():
    nb = toy()
    dropped(6, 7, 10, 11)(nb)
    assert not [c for c in complaints(nb, "00_tour") if "exercises" in c]
    assert [c for c in complaints(nb, "01_toy") if "0 exercises; a notebook has 2 to 4" in c]


def test_the_stamp():
    assert complaints(toy(), stamp=False) == [runner.stale(toy())] != [""]
    nb = stamped(toy())
    assert complaints(nb, stamp=False) == []
    nb.cells[13].source += " Edited."
    assert complaints(nb, stamp=False) == [runner.stale(nb)] != [""]


def test_the_stamp_covers_the_data_that_a_notebook_reads(tmp_path, monkeypatch):
    """The map of the tour shows the table of notebooks: it is out of date when a notebook is added there."""
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    table, nb = tmp_path / "data" / "notebooks.yaml", toy()
    table.write_text("[]")
    nb.metadata["mmfm"] = {"reads": ["data/notebooks.yaml"]}
    assert not runner.stale(stamped(nb))
    table.write_text("[{}]")
    assert runner.stale(nb).startswith("its data changed since it ran")
    assert not runner.stale(stamped(nb))
    table.unlink()
    assert "its data changed" in runner.stale(nb)


def test_a_notebook_needs_a_line_in_the_table():
    missing = ["data/notebooks.yaml has no line that says that 01_toy is here"]
    assert contract.check_table(toy(), NAME, {}) == missing
    planned = {NAME: dataclasses.replace(TABLE[NAME], state="planned")}
    assert contract.check_table(toy(), NAME, planned) == missing


def test_the_place_of_a_cell():
    nb = toy()
    assert contract.place(nb, 0) == "the Markdown at the top"
    assert contract.place(nb, 2) == "cell 1" and contract.place(nb, 3) == "the Markdown after cell 1"


def test_the_size_and_dots_of_a_picture():
    (data,) = contract.images(new_code_cell("", outputs=[figure(width=30, height=20, dpi=72)]))
    width, height, dpi = contract.png_size(data)
    assert (width, height) == (30, 20) and abs(dpi - 72) < 0.1


def test_headings_in_fenced_code_do_not_count():
    nb = toy()
    nb.cells = [new_markdown_cell("```\n# a comment\n```\n## A heading")]
    assert contract.headings(nb) == [(0, 2, "A heading")]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contract.collection, "notebooks", lambda: TABLE)
    good, bad = tmp_path / f"{NAME}.ipynb", tmp_path / "02_bad.ipynb"
    nb = toy()
    nb.cells[12].source = nb.cells[12].source.replace("findings.judge", "print")  # the real registry knows no T1
    good.write_text(nbformat.writes(stamped(nb)))
    assert contract.main([str(good)]) == 0 and "1 notebooks, 0 with complaints" in capsys.readouterr().out
    bad.write_text("no notebook")
    assert contract.main([str(good), str(bad)]) == 1 and "is not a notebook" in capsys.readouterr().out
