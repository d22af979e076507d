"""A small notebook that keeps the contract, for tests that break it in one place."""

import base64
import io

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mmfm_utils.collection import Notebook

NAME = "01_toy"
REGISTRY = {"T1": NAME, "Z9": "02_other"}
TABLE = {NAME: Notebook(NAME, "toys", "", families=(), state="here", title="The doubling of numbers")}

TITLE = """# The doubling of numbers

A doubled number is larger than the number because it holds the number twice, while its negative is not.
"""
PARAMETERS = 'profile = "tiny"\ndevice = "auto"\nseed = 0\nn = 4'
SETUP = """import random

random.seed(seed)
numbers = [i + 1 for i in range(n)]
print(profile, device)"""
SOLUTION_1 = '''def double(numbers):
    """Each number, doubled."""
    ### BEGIN SOLUTION
    return [2 * x for x in numbers]
    ### END SOLUTION'''
TEST_1 = """doubled = double(numbers)
assert len(doubled) == len(numbers), "one value for each number: did you sum them?"
### BEGIN HIDDEN TESTS
assert doubled == [2 * x for x in numbers], "not the double: did you square it?"
### END HIDDEN TESTS"""
SOLUTION_2 = '''def total(numbers):
    """Their sum."""
    ### BEGIN SOLUTION
    return sum(double(numbers))
    ### END SOLUTION'''
TEST_2 = 'assert total(numbers) == 2 * sum(numbers), "this is not the sum of the doubled numbers"'
WRONG = {
    "ex1-double": [
        ("summed", "did you sum", "return [sum(numbers)]"),
        ("squared", "square", "return [x * x for x in numbers]"),
    ],
    "ex2-total": [
        ("not doubled", "doubled", "return sum(numbers)"),
        ("a mean", "not the sum", "return 2.5"),
    ],
}


def png(width=320, height=240, dpi=80):
    """A grey picture as base64."""
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, "png", dpi=(dpi, dpi))
    return base64.b64encode(file.getvalue()).decode()


def figure(**size):
    return new_output("display_data", {"image/png": png(**size), "text/plain": "<Figure>"})


def solution(grade_id, source):
    marks = {"schema_version": 3, "solution": True, "grade": False, "locked": False, "grade_id": grade_id}
    return new_code_cell(source, metadata={"nbgrader": marks})


def test_cell(grade_id, source, points=2):
    marks = {"schema_version": 3, "solution": False, "grade": True, "locked": True, "points": points}
    return new_code_cell(source, metadata={"nbgrader": {**marks, "grade_id": grade_id}})


test_cell.__test__ = False  # not for pytest to collect


def toy():
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nb.cells = [
        new_markdown_cell(TITLE),
        new_markdown_cell("## Parameters"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Set-up"),
        new_code_cell(SETUP, outputs=[new_output("stream", name="stdout", text="tiny auto\n")]),
        new_markdown_cell("## 1. Doubling"),
        solution("ex1-double", SOLUTION_1),
        test_cell("test-ex1-double", TEST_1),
        new_code_cell("print(double(numbers))", outputs=[figure()]),
        new_markdown_cell(
            "*Figure: a grey rectangle, which stands for\na figure with nothing else in it.*\n\nIt is grey."
        ),
        solution("ex2-total", SOLUTION_2),
        test_cell("test-ex2-total", TEST_2),
        new_code_cell('findings.judge("T1", value=total(numbers), control=-sum(numbers))'),
        new_markdown_cell("## Unimodal and multimodal\n\nThere is only one mode here."),
        new_markdown_cell("## Try it yourself"),
        new_markdown_cell("## What goes wrong: zero"),
        new_markdown_cell("## The ledger of this notebook"),
        new_markdown_cell("## References\n\n- Nobody, 2025"),
    ]
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    nbformat.validate(nb)
    return nb
