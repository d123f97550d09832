"""Run folders: which options make two runs different ones. (Resuming and refusing: test_train.py.)"""

from dataclasses import fields, replace
from pathlib import Path

import pytest

import baselines
from config import DISTIL, READING, Config
from runs import commit, differences


@pytest.mark.parametrize(("method", "changes", "found"), [
    ("none", {"alpha1": 7.0, "kd_weight": 3.0, "proposals": 9}, []), ("none", {"inherit": True, "lr": 1.0}, ["lr", "inherit"]),
    ("fg", {"alpha1": 7.0, "psi_norm": True, "select": "all"}, []),
    ("fg", {"kd_weight": 3.0, "kd_fade": True}, ["kd_weight", "kd_fade"]),
    ("lad", {"label_score": (0.5,)}, ["label_score"]), ("rdd", {"alpha1": 7.0, "seed": 3}, ["alpha1", "seed"]),
])  # fmt: skip
def test_runs_differ_in_what_they_read(method, changes, found):
    now = Config(method=method)
    assert differences(replace(now, **changes), now) == found
    assert differences(replace(now, method="hint"), now) == ["method"]


def test_no_baseline_reads_an_option_that_two_of_its_runs_may_differ_in():
    source = Path(baselines.__file__).read_text()
    for option in (f.name for f in fields(Config) if f.metadata.get("group") in (DISTIL, READING)):
        other = replace(Config(method="mimic"), **{option: "another"})
        assert (f"cfg.{option}" not in source) or differences(other, Config(method="mimic")) == [option], option


def test_where_there_is_no_git_a_run_can_begin(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit.__wrapped__() == "unknown"
