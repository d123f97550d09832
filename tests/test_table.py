"""Tables: means, dashes, and a README that is out of step."""

import copy
import json

import pytest

import table
from cli import InputError


def record(role, seed, ap):
    levels = {"easy": 0.0, "moderate": ap, "hard": 0.0}
    classes = {c: {"AP_R40": {"3d": levels, "bev": {k: 2 * v for k, v in levels.items()}}} for c in table.CLASSES}
    return {"role": role, "seed": seed, "steps": 10, "seconds": 60.0 * (seed + 1), "parameters": 1000, "macs": 2e9,
            "last": {"strict": classes}}  # fmt: skip


def cells(text, label):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_rows_are_means_over_seeds_and_all_seeds_are_shown():
    text = table.demo_table([record("none", 0, 10.0), record("none", 1, 20.0), record("rdd", 0, 30.0), record("rdd", 1, 31.0)])
    alone = cells(text, "student alone")
    assert alone[1:5] == ["1 k", "2.00", "10", "1.5"] and alone[5:9] == ["15.0"] * 4 and alone[9:13] == ["30.0"] * 4
    assert alone[13] == "10.0, 20.0"
    assert cells(text, "teacher")[1:] == ["—"] * 13  # nobody ran it


def test_a_class_without_result_counts_as_zero():
    r = record("none", 0, 30.0)
    r["last"]["strict"]["Cyclist"]["AP_R40"]["3d"] = None
    assert table.score(r, "3d") == pytest.approx(20.0) and table.score(r, "3d", "Cyclist") == 0


def test_results_are_read_in_the_order_of_roles_and_seeds(tmp_path):
    for i, r in enumerate([record("rdd", 0, 1), record("teacher", 1, 2), record("teacher", 0, 3)]):
        (tmp_path / f"{i}.json").write_text(json.dumps(copy.deepcopy(r)))
    assert [(r["role"], r["seed"]) for r in table.read_results(tmp_path)] == [("teacher", 0), ("teacher", 1), ("rdd", 0)]
    with pytest.raises(InputError, match="found none"):
        table.read_results(tmp_path / "nowhere")


def test_fill_replaces_tables_and_nothing_else():
    text = "a\n<!-- table readings -->\nout of date\n<!-- end -->\nb\n"
    filled = table.fill(text)
    assert filled.startswith("a\n<!-- table readings -->\n| ")
    assert filled.endswith("\n<!-- end -->\nb\n") and "out of date" not in filled
    assert table.fill(filled) == filled
    with pytest.raises(InputError, match="unknown table 'nothing'"):
        table.fill("<!-- table nothing --><!-- end -->")
