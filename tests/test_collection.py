"""The table of the notebooks agrees with what is here, and a line that lacks something is refused."""

import re

import pytest
import yaml

from mmfm_utils import UsageError, collection, findings
from tests.notebook_contract import notebooks

TABLE = collection.notebooks()
PLANNED = {"name": "01_new", "branch": "b", "question": "q", "families": ["language"], "state": "planned", "papers": []}


def test_the_notebooks_that_are_here_are_those_of_the_table():
    assert [name for name, line in TABLE.items() if line.here] == [path.stem for path in notebooks()]


def test_the_numbers_are_in_order_and_names_say_the_branch():
    assert [line.number for line in TABLE.values()] == [f"{n:02}" for n in range(len(TABLE))]
    for line in TABLE.values():
        plain = re.sub(r"\W", "_", line.branch.lower())
        assert line.name[3:].startswith(plain.split("_")[0]), f"{line.name} is about {line.branch}"


def test_the_findings_of_a_notebook_are_about_its_families():
    for finding in findings.registry().values():
        assert finding.not_done or finding.family in TABLE[finding.notebook].families, finding.id


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "notebooks.yaml"


def test_a_folder_of_notebooks_may_have_no_table(table):
    assert collection.notebooks() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "there"}, "line 2 of the table: unknown state 'there' .nearest: here"),
        ({"families": ["diffuse"]}, "unknown family 'diffuse' .nearest: diffusion"),
        ({"paper": []}, "unknown field 'paper' .nearest: papers"),
        ({"title": "T"}, "01_new: give a title where it is here, and papers where it is planned"),
        ({"state": "here"}, "give a title where it is here"),
    ],
)
def test_a_wrong_line_is_refused(table, change, message):
    table.write_text(yaml.safe_dump([PLANNED | {"name": "00_old"}, PLANNED | change]))
    with pytest.raises(UsageError, match=message):
        collection.notebooks()


@pytest.mark.parametrize("text", ["- name: [", "- 3", "- {name: 01_new}"])
def test_a_damaged_table_is_refused(table, text):
    table.write_text(text)
    with pytest.raises(UsageError, match="notebooks.yaml, line 1 of the table"):
        collection.notebooks()


def test_a_line_that_lacks_a_field_is_refused(table):
    table.write_text(yaml.safe_dump([{key: value for key, value in PLANNED.items() if key != "branch"}]))
    with pytest.raises(UsageError, match="branch"):
        collection.notebooks()
