"""Rows: what they compare with what, names, and records that no table can be made of."""

import json
from dataclasses import replace

import pytest

import rows
from cli import InputError
from suites import SUITES


def test_difference_to_the_student_alone_is_over_the_seeds_that_both_have(write):
    for seed, ap in ((0, 10.0), (1, 20.0)):
        folder = write("small", "none", seed, ap)
    write("small", "rdd", 1, 23.0)
    row, bev = (r for r in rows.rows_of("trial", folder) if r["method"] == "rdd")
    assert (row["mean"], row["n"], row["delta"], row["macs_ratio"]) == (23.0, 1, 3.0, None)
    assert (bev["metric"], bev["mean"], bev["delta"]) == ("moderate_map_bev", 46.0, 6.0)
    assert row["low"] is row["high"] is None, "one seed has no interval: it would leave out what seeds differ by"


def test_a_variant_of_another_schedule_is_beside_the_student_alone_of_that_schedule(write, monkeypatch):
    longer = {f"{name}, 12 epochs": {} for name in ("none", "rdd", "hint")}
    suite = SUITES["trial"]
    monkeypatch.setitem(SUITES, "trial", replace(suite, variants=suite.variants | longer, equal_time=False))
    for variant, ap in (("none", 10.0), ("none, 12 epochs", 14.0), ("rdd", 13.0), ("rdd, 12 epochs", 15.0)):
        folder = write("small", variant, 0, ap)
    ahead = {r["method"]: r["delta"] for r in rows.rows_of("trial", folder) if r["metric"] == "moderate_map_3d" and r["n"]}
    assert ahead == {"none": None, "rdd": 3.0, "none, 12 epochs": 4.0, "rdd, 12 epochs": 1.0}


def test_a_class_has_percents_of_either_data_set_s_measure():
    strict = {"Car": {"AP_R40": {"3d": {"easy": 90.0, "moderate": 70.0, "hard": 60.0}}}, "Cyclist": {"AP_R40": {"3d": None}}}
    assert rows.classes({"last": {"strict": strict}}) == {"Car 3D": 70.0, "Cyclist 3D": 0.0}
    assert rows.classes({"last": {"mean_dist_aps": {"car": 0.625, "barrier": 0.0}}}) == {"car": 62.5, "barrier": 0.0}


def test_a_method_without_a_label_has_its_own_name(monkeypatch):
    monkeypatch.setattr(rows, "METHODS", (*rows.METHODS, "mine"))
    said = {name: rows.label_of({"student": "s", "method": name, "as_long_as": []}) for name in (
        "mine", "mine x10", "fg x10", "roi 3", "none, 7 epochs", "rdd, 12 epochs", "roi 3, equal share")}  # fmt: skip
    assert [text.removeprefix("`s` ") for text in said.values()] == [
        "+ mine", "+ mine x10", "+ FG x10", "+ RDD: roi 3", "alone, 7 epochs", "+ RDD (default), 12 epochs",
        "+ RDD: roi 3, equal share"]  # fmt: skip


@pytest.mark.parametrize("damage, said", [
    (lambda record: record.pop("teacher"), "found one without teacher"),
    (lambda record: [record.pop("macs"), record.pop("steps")], "found one without steps, macs"),
    (lambda record: record.pop("config"), "found KeyError.'config'"),
    (lambda record: record.update(seed=1), "of that name, found that of small-none-seed1"),
    (lambda record: record.update(variant="rdd, equal share"), "found that of small-rdd-equal-share-seed0"),
    (lambda record: record["scores"].clear(), "its scores are none .IndexError"),
    (lambda record: record["scores"][-1].pop("moderate_map_3d"), "with moderate_map_3d, found moderate_map_bev"),
    (lambda record: record["resampled"].clear(), "with moderate_map_3d and moderate_map_bev, found"),
])  # fmt: skip
def test_a_record_that_no_table_can_be_made_of_is_named(write, damage, said):
    path = write("small", "none", 0, 10.0) / "small-none-seed0.json"
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"small-none-seed0\.json: expected the record of a run.*{said}") as error:
        rows.rows_of("trial", path.parent)
    assert "\n" not in str(error.value)


def test_a_student_of_another_teacher_is_named(write):
    write("small", "none", 0, 10.0, teacher_weights=None)
    write("small", "rdd", 0, 12.0, teacher_weights="a")
    folder = write("big", "teacher", 0, 20.0)
    rows.rows_of("trial", folder)  # older records do not say which weights
    write("big", "teacher", 0, 20.0, weights="a")
    rows.rows_of("trial", folder)
    write("big", "teacher", 0, 20.0, weights="b")
    with pytest.raises(InputError, match=r"small-rdd-seed0\.json: this student had another teacher than .* of seed 0"):
        rows.rows_of("trial", folder)
