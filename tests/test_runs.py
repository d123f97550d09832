"""Run folders: which options make two runs different ones. (Resuming and refusing: test_train.py.)"""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import baselines
from config import DISTIL, READING, Config
from detector import build
from runs import RunFolder, commit, differences
from tests.scenes import tiny_config


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


def test_a_run_goes_on_with_its_loss_scale(tmp_path):
    cfg = tiny_config()
    scales = []
    for first in (8.0, 2.0):
        student = build(cfg)
        scaler = torch.amp.GradScaler("cpu", init_scale=first)
        run = RunFolder(tmp_path / "run", cfg, student, None, torch.optim.AdamW(student.parameters()), scaler)
        run.restore()
        scaler.scale(torch.zeros(()))  # before that a scaler has no state of its own
        run.save(1)
        scales.append(scaler.get_scale())
    assert scales == [8.0, 8.0]


def test_a_number_that_is_not_finite_is_null_in_the_log(tmp_path):
    student = build(tiny_config())
    optimizer = torch.optim.AdamW(student.parameters())
    run = RunFolder(tmp_path / "run", student.cfg, student, None, optimizer, torch.amp.GradScaler("cpu"))
    run.restore()
    run.log("train", {"step": 1, "loss": 2.5, "grad_norm": float("inf"), "pull_feat": float("nan")})
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found == {"kind": "train", "step": 1, "loss": 2.5, "grad_norm": None, "pull_feat": None, "seconds": 0.0}
