"""The registry, the rule, the verdict, and what leaves the kernel."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from mmfm_utils import UsageError, findings, root, write_atomic
from mmfm_utils.findings import Rule

ENTRY = {
    "id": "T1",
    "notebook": "a_toy",
    "family": "contrastive",
    "claim": "late beats early",
    "paper": "Someone 2024",
    "arxiv": "2402.17304",
    "reported": "late 0.8, early 0.1",
    "verified": True,
    "measured": "share of the effect",
    "control": "a random twin",
    "rule": "value > control + 0.1 and interval[0] > control",
    "partly": "value > control",
    "tolerance": 0.05,
    "expected": {"tiny": "reproduced"},
}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A function that writes entries (ENTRY and changes to it) as the registry."""
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    monkeypatch.setattr(findings, "_run", None)
    (tmp_path / "data" / "expected").mkdir(parents=True)

    def write(*changed, **change):
        entries = [{k: v for k, v in (ENTRY | c).items() if v is not ...} for c in (changed or [change])]
        (tmp_path / "data" / "findings.yaml").write_text(yaml.safe_dump(entries))

    write()
    return write


def judged(profile="tiny", notebook="a_toy", **measured):
    findings.begin(notebook, profile)
    findings.judge("T1", **({"value": 0.6, "control": 0.1, "interval": (0.5, 0.7)} | measured))
    return findings.rows()[0]


# ------------------------------------------------------------------------------------------------------------ the rule
@pytest.mark.parametrize(
    ("rule", "truth"),
    [
        ("value.late > control", True),
        ('value["early"] > control', False),
        ("interval[0] > control and interval[1] < 1", True),
        ("not value.late < 0.5 or n < 3", True),
        ("0 < value.early < value.late < 1", True),
        ("abs(value.early - value.late) * 2 / 2 >= max(0.1, -control)", True),
        ("min(value.early, value.late) > 0.3", False),
        ("control <= 0.1", True),
    ],
)
def test_rule(rule, truth):
    known = {"value": {"early": 0.1, "late": 0.6}, "control": 0.1, "interval": [0.5, 0.7], "n": 10}
    assert Rule(rule)(known) is truth
    assert Rule(Rule(rule).filled(known))({}) is truth  # the numbers filled in say the same


@pytest.mark.parametrize(
    "rule",
    [
        "value >", "value", "value + 1", "1 if value > 0 else 2", "valeu > 0", "__import__('os').system('x') > 0",
        "value.__class__() > 0", "(lambda: 1)() > 0", "[v for v in value] > 0", "value > 'a'", "open('x') > 0",
        "(value > 0) + 1 > 0", "value and control", "value > True", "abs(value, key=1) > 0", "max() > 0",
        "value[control] > 0", "value ** 2 > 0", "value > (control := 2)", "control is value", "abs(value > 0) > 0",
        "abs > 0", "-(value > 0) > 0",
    ],
)  # fmt: skip
def test_rule_refused(rule):
    with pytest.raises(UsageError) as error:
        Rule(rule)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", ["value > 0", "value.lat > 0", "interval.late[0] > 0", "interval[2] > 0", "1 / n > 0"])
def test_rule_that_does_not_fit_the_values(rule):
    known = {"value": {"late": 0.5}, "control": 0.0, "interval": [0, 1], "n": 0}
    with pytest.raises(UsageError, match="must be a number|does not fit"):
        Rule(rule)(known)


def test_rule_in_words():
    rule = Rule("value.value > control and interval.late[0] > 0 and interval[1] < 1")
    assert rule.words() == "ours.value > control and low end of interval.late > 0 and high end of interval < 1"


# -------------------------------------------------------------------------------------------------------- the registry
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clam": "x"}, "unknown field `clam` .nearest: claim"),
        ({"claim": ...}, "`claim` must be a text"),
        ({"arxiv": 2402.173}, "`arxiv` must be a text .in quotes"),
        ({"verified": ...}, "`verified` must be true or false"),
        ({"exact": "yes"}, "`exact` must be true or false"),
        ({"rule": ...}, "`rule` must be a condition"),
        ({"rule": "valu > 0"}, "`valu` is not allowed in a rule"),
        ({"partly": "value"}, "must be a condition"),
        ({"tolerance": ...}, "`tolerance` must be a number"),
        ({"tolerance": {"late": -1}}, "`tolerance` must be a number"),
        ({"expected": {"tiny": "reproducd"}}, "`expected` maps a profile"),
        ({"expected": {"tiney": "reproduced"}}, "`expected` maps a profile"),
        ({"rule_changed": "because"}, "must be a list of reasons"),
        ({"id": 3}, "needs a text `id`"),
    ],
)
def test_entry_refused(registry, change, message):
    registry(change)
    with pytest.raises(UsageError, match=message) as error:
        findings.registry()
    assert "\n" not in str(error.value)


def test_registry_refused(registry, tmp_path):
    path = tmp_path / "data" / "findings.yaml"
    registry({}, {})
    for text, message in (
        (path.read_text(), "that no other has"),
        ("a: [", "YAML"),
        ("a: 1", "list"),
        (None, "no reg"),
    ):
        path.write_text(text) if text else path.unlink()
        with pytest.raises(UsageError, match=message):
            findings.registry()


def test_the_shipped_registry_is_sound():
    if not (root() / "data" / "findings.yaml").exists():
        pytest.skip("no registry yet")
    known = findings.registry()
    for profile in findings.PROFILES:
        path = root() / "data" / "expected" / f"{profile}.json"
        assert not set(json.loads(path.read_text()) if path.exists() else {}) - set(known)
        for key, want in findings.expected(profile, known).items():
            stated = (known[key].expected or {}).get(profile, want["verdict"])
            assert want["verdict"] == stated, f"{key}: the registry and data/expected/{profile}.json disagree"


# --------------------------------------------------------------------------------------------------------- the verdict
@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ({}, "reproduced"),
        ({"interval": (0.05, 0.9)}, "partly"),
        ({"value": 0.05}, "not reproduced"),
        ({"profile": "rehearsal"}, "not judged"),
        ({"profile": "hub"}, "not judged"),
        ({"value": np.float32(0.6), "interval": np.array([0.5, 0.7]), "n": 3}, "reproduced"),
    ],
)
def test_verdict(registry, capsys, measured, verdict):
    row = judged(**measured)
    assert row["verdict"] == verdict
    json.dumps(row)
    shown = capsys.readouterr().out
    for part in ("T1", "late beats early", "Someone 2024", "late 0.8, early 0.1", "a random twin", verdict, "0.1"):
        assert part in shown


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"value": float("nan")}, "finite"),
        ({"value": float("inf")}, "finite"),
        ({"value": "0.6"}, "finite number"),
        ({"value": True}, "finite number"),
        ({"value": {}}, "flat mapping"),
        ({"value": {"a": {"b": 1}}}, "flat mapping"),
        ({"value": {"a": float("nan")}}, "value.a"),
        ({"value": np.zeros(3)}, "finite number"),
        ({"value": {"late": 0.6}}, "`value` must be a number"),
        ({"control": None}, "give control="),
        ({"interval": None}, "give interval="),
        ({"interval": (0.7, 0.5)}, "low end must come first"),
        ({"interval": 0.5}, "pair"),
        ({"interval": (0.5, float("nan"))}, "pair"),
        ({"n": 0}, "whole number"),
        ({"n": 2.5}, "whole number"),
        ({"notebook": "b_other"}, "belongs to a_toy"),
        ({"profile": "tinny"}, "profile must be one of"),
    ],
)
def test_measurement_refused(registry, measured, message):
    with pytest.raises(UsageError, match=message):
        judged(**measured)


def test_judge_needs_begin_and_a_known_id(registry):
    with pytest.raises(UsageError, match="call findings.begin"):
        findings.judge("T1", value=1)
    findings.begin("a_toy", "tiny")
    with pytest.raises(UsageError, match="nearest: T1"):
        findings.judge("T11", value=1)
    registry(not_done="needs web data", rule=..., tolerance=...)
    findings.begin("a_toy", "tiny")
    with pytest.raises(UsageError, match="not_done"):
        findings.judge("T1", value=1)


def test_exact_values_and_mappings(registry):
    registry(exact=True, rule="value.late > value.early", partly=...)
    assert judged(value={"late": 2, "early": 1}, control=None, interval=None)["verdict"] == "reproduced"
    registry(rule="interval.late[0] > control.late", partly=...)
    mapping = {"value": {"late": 2}, "control": {"late": 0}, "interval": {"late": (1, 3)}}
    assert judged(**mapping)["interval"] == {"late": [1, 3]}


@pytest.mark.parametrize(
    ("interval", "named"),
    [((1, 1), "interval"), ({"early": (1, 1), "late": (0.1, 0.2)}, "interval.early"), ((0.3, 0.1 + 0.2), "interval")],
)
def test_an_interval_of_width_0_is_no_interval(registry, capsys, interval, named):
    """It does not end the notebook: the finding is not judged, which the comparison with the committed run reports."""
    rule = {"rule": "value > control", "partly": ...}
    registry(**rule)
    row = judged(interval=interval, why="a small model")
    assert (row["verdict"], row["interval"]) == ("not judged", None)
    reason = f"{named} of width 0: take more examples, or measure what varies between them"
    assert row["why"] == f"{reason}; a small model" and f"not judged, {reason}" in capsys.readouterr().out
    assert findings.compare([row], {"T1": {"verdict": "reproduced", "value": 0.6, "tolerance": 0}})
    registry(**rule, exact=True)  # asked for: nothing varies
    assert judged(interval=interval)["verdict"] == "reproduced"


def test_card_escapes_and_tells_why(registry, monkeypatch):
    shown = []
    monkeypatch.setattr(findings, "_display", lambda text, page: shown.append((text, page)))
    registry(claim="a < b", verified=False, rule_changed=["the first one was always true"])
    judged(why="our model is <small>")
    text, page = shown[0]
    assert "a < b" in text and "a &lt; b" in page and "&lt;small&gt;" in page and "(unverified)" in text
    assert "the first one was always true" in text and "0.6 > 0.1 + 0.1 and 0.5 > 0.1" in text


def test_records(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MMFM_RESULTS_FILE", str(tmp_path / "records.json"))
    registry({}, {"id": "T2"}, {"id": "T3", "not_done": "needs web data"})
    judged()
    findings.judge("T1", value=0.3, control=0.1, interval=(0.2, 0.4))
    findings.metric("accuracy", 0.5, "of 1")
    findings.metric("accuracy", 0.6, "of 1")
    findings.close()
    records = json.loads((tmp_path / "records.json").read_text())
    assert [row["times"] for row in records["rows"]] == [2] and records["closed"] and records["open_hooks"] == []
    assert records["metrics"] == [{"name": "accuracy", "value": 0.6, "unit": "of 1"}]
    capsys.readouterr()
    findings.ledger()
    shown = capsys.readouterr().out
    assert "still to judge" in shown and "not done: needs web data" in shown and "accuracy  0.6 of 1" in shown
    with pytest.raises(UsageError):
        findings.metric("accuracy", float("nan"))


# ----------------------------------------------------------------------------------------------------- the comparison
def test_compare():
    row = {"id": "T1", "verdict": "reproduced", "value": 0.5}
    want = {"T1": {"verdict": "reproduced", "value": 0.52, "tolerance": 0.02}}
    assert findings.compare([row], want) == []
    for value in (0.499, 0.541):  # in either direction
        assert "T1 is" in findings.compare([row | {"value": value}], want)[0]
    assert findings.compare([row | {"verdict": "partly"}], want) == ["T1 is partly, expected reproduced"]
    assert findings.compare([], want) == ["T1 is missing"]
    assert "no committed result" in findings.compare([row], {})[0]
    assert "has the values" in findings.compare([row | {"value": {"a": 1}}], want)[0]
    many = {"T1": {"verdict": "reproduced", "value": {"a": 1, "b": 2}, "tolerance": {"b": 1}}}
    assert findings.compare([row | {"value": {"a": 1, "b": 2.9}}], many) == []
    assert findings.compare([row | {"value": {"a": 1.1, "b": 2}}], many)[0].startswith("T1.a is 1.1")


def test_expected(registry, tmp_path):
    assert findings.expected("tiny") == {}
    path = tmp_path / "data" / "expected" / "tiny.json"
    path.write_text(json.dumps({"T1": {"verdict": "partly", "value": 0.5}, "gone": {"verdict": "partly", "value": 1}}))
    want = {"T1": {"verdict": "reproduced", "value": 0.5, "tolerance": 0.05}}  # the registry's verdict counts first
    assert findings.expected("tiny") == want and findings.expected("tiny", notebook="b_other") == {}
    for text in ("{", "[]", '{"T1": {"verdict": "partly"}}', '{"T1": 3}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            findings.expected("tiny")


def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_where_modes_and_fsync_are_unknown(tmp_path, monkeypatch):
    """As on drives of Windows under WSL, and on some that lie in a network."""

    def refuses(*error):
        return lambda *_: (_ for _ in ()).throw(OSError(*error))

    monkeypatch.setattr(os, "fsync", refuses(errno.EINVAL, "Invalid argument"))
    monkeypatch.setattr(os, "chmod", refuses(errno.EPERM, "Operation not permitted"))
    write_atomic(tmp_path / "a.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_no_torch():
    code = "import sys, mmfm_utils.findings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
