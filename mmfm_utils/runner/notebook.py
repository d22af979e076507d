"""Read a notebook, and say what would let it pass without testing anything, as far as its source shows it.

Cells are numbered as in the committed notebook: code cells that hold code, from 1, without the injected one.
"""

import ast
import re
import symtable
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from .. import UsageError, nearest

MAGICS = ("matplotlib", "config")  # the others hide failures, or reach outside the notebook
SHELLS = ("system", "getoutput", "run_line_magic", "run_cell_magic", "run_cell")  # what IPython turns them into


def read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.v4.upgrade(nbformat.reads(Path(path).read_text(encoding="utf-8"), as_version=4))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"{path} is not a notebook: {str(error).splitlines()[0]:.100}") from None


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(nb) -> list:
    """The cells that must run, in order; `In [n]` of the committed notebook is the place in this list."""
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return [cell for cell in code if "injected-parameters" not in tags(cell)]


def defaults(nb) -> dict:
    """The parameters and their defaults: the tagged cell may hold `name = literal` and nothing else."""
    tagged = [cell for cell in code_cells(nb) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise UsageError(f"{len(tagged) or 'no'} cells are tagged `parameters`: tag exactly one")
    found = {}
    for line in ast.parse(tagged[0].source).body:
        try:
            targets = [line.target] if isinstance(line, ast.AnnAssign) else line.targets
            (target,) = targets
            found[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            text = ast.unparse(line)
            raise UsageError(f"the `parameters` cell may hold only `name = literal`, not `{text}`") from None
    return found


def check_source(nb, parameters: dict) -> list[str]:
    """What would let this notebook pass without testing anything, as far as the source shows it."""
    problems, known, later, lines = [], {}, False, []
    try:
        known = defaults(nb)
        unknown = [name for name in parameters if name not in known]
        problems += [f"no parameter `{name}` in the tagged cell{nearest(name, known)}" for name in unknown]
    except (UsageError, SyntaxError) as error:
        problems.append(str(error))
    for number, cell in enumerate(code_cells(nb), 1):
        try:
            tree = ast.parse(TransformerManager().transform_cell(cell.source))
        except SyntaxError as error:
            problems.append(f"cell {number}: SyntaxError: {error.msg}")
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=base, attr=name), args=[_, *_] as args):
                    call, first = f"{ast.unparse(base)}.{name}", getattr(args[0], "value", "")
                    shell = call == "os.system" or (call.startswith("get_ipython().") and name in SHELLS)
                    if shell and not ("magic" in name and first in MAGICS):
                        what = f"%{first}" if "magic" in name else "!"
                        problems.append(f"cell {number}: `{what}` is not allowed, its failure would go unseen")
        lines += tree.body if later else []
        later = later or "parameters" in tags(cell)
    return problems + [problem for name in known if (problem := _unread(name, lines))]


def _unread(name: str, lines: list[ast.stmt]) -> str:
    """Why the value of a parameter cannot matter: it is overwritten before it is read, or never read. Else nothing."""
    for line in lines:
        tables = [symtable.symtable(ast.unparse(line), "cell", "exec")]
        for table in tables:
            tables += table.get_children()
        uses = [(table, table.lookup(name)) for table in tables if name in table.get_identifiers()]
        if any(use.is_referenced() and (table is tables[0] or use.is_global()) for table, use in uses):
            return ""
        if any(use.is_assigned() and table is tables[0] for table, use in uses):
            return f"parameter `{name}` is overwritten before it is read"
    return f"parameter `{name}` is never read after the tagged cell"


def errors(nb) -> list[str]:
    """`cell 7: AssertionError: message` for every error in the outputs, also where papermill would forgive it."""
    found = [(n, o) for n, cell in enumerate(code_cells(nb), 1) for o in cell.outputs if o.output_type == "error"]
    return [f"cell {number}: {output.ename}: {first_line(output.evalue)}" for number, output in found]


def first_line(text="") -> str:
    """The first line of a message, without colours."""
    return (re.sub(r"\x1b\[[\d;]*m", "", str(text)).strip().splitlines() or [""])[0][:200]
