"""Tables: means, intervals with a known answer, dashes, and a README that is out of step."""

import json
import re
from dataclasses import replace

import pytest

import rows
import table
from benchmarks import Row
from cli import InputError
from fair import longer_variant
from suites import SUITES, Suite


def cells(text, label):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    head = text.splitlines()[0]
    return dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)), strict=True))


def test_rows_are_means_over_seeds_all_seeds_are_shown_and_what_nobody_ran_is_a_dash(write):
    for seed, ap in ((0, 10.0), (1, 20.0)):
        folder = write("small", "none", seed, ap)
        write("small", "rdd", seed, ap + 5 + seed, price=1.55 if seed == 0 else None)
    write("big", "teacher", 0, 50.0)
    text = table.suite_table("trial", folder)
    alone, rdd, hint = (cells(text, f"`small` {word}") for word in ("alone", "+ RDD (default)", "+ Hint"))
    cost = [alone[column] for column in ("params", "GMACs", "of teacher", "steps", "price")]
    assert cost == ["1 k", "2.00", "0.25", "10", "1"] and rdd["price"] == "1.55"
    assert alone["mAP 3D"] == "15.0 ± 7.1" and alone["mAP BEV"] == "30.0 ± 14.1" and alone["mAP 3D of each"] == "10.0, 20.0"
    assert alone["Car 3D"] == "15.0" and alone["Cyclist 3D"] == "0.0", "a class without a result counts as 0"
    assert rdd["mAP 3D"].startswith("20.5") and rdd["seeds"] == "2"
    ahead, low, high = map(float, re.findall(r"[-+][\d.]+", next(rdd[name] for name in rdd if name.startswith("vs. alone"))))
    assert low < ahead == 11.0 < high  # of the last metric, mAP BEV
    assert cells(text, "teacher `big`")["mAP 3D"] == "50.0", "one seed has no spread"
    assert set(hint.values()) <= {"`small` + Hint", "—", ""}


def test_two_rows_are_compared_on_the_seeds_that_both_have(write, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    for seed in range(3):
        folder = write("small", "rdd", seed, 12.0 + seed)
        if seed:
            write("small", "hint", seed, 10.0)
    write("small", "none", 0, 10.0)
    write("big", "teacher", 2, 20.0)
    (tmp_path / "results" / "trial").symlink_to(folder)
    first, second = table.compare("trial", "small", "rdd", "hint").splitlines()
    assert first.startswith("mAP 3D: rdd - hint = +3.5 [") and first.endswith("seeds 1, 2")
    assert second.startswith("mAP BEV: rdd - hint = +7.0 [")
    assert table.compare("trial", "small", "none", "hint").splitlines()[0] == "mAP 3D: none - hint = —, seeds —"
    assert table.compare("trial", "small", "rdd", "teacher").splitlines()[0] == "mAP 3D: rdd - teacher = -6.0, seeds 2"
    for words, said in ((("trial", "small", "rdd", "hunt"), "no run 'hunt' of 'small' .did you mean hint"),
                        (("trial", "smal", "rdd", "hint"), "no run 'rdd' of 'smal'"), (("trail", *"abc"), "did you mean trial")):
        with pytest.raises(InputError, match=said):
            table.compare(*words)


def test_the_student_alone_in_equal_time_says_whose_time_it_had(write, monkeypatch):
    write("small", "none", 0, 10.0)
    folder = write("small", "rdd", 0, 12.0, price=1.55)
    assert "the time of" not in table.suite_table("trial", folder)
    write("small", "hint", 0, 12.0, price=1.45)
    for seed in (0, 1):
        write("small", longer_variant(12), seed, 11.0 + seed)  # 8 * 1.5, to a quarter of 8
    row = cells(table.suite_table("trial", folder), "`small` alone, 12 epochs: the time of RDD (default), Hint")
    assert row["mAP 3D of each"] == "11.0, 12.0"
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], variants=SUITES["trial"].variants | {"fg": {}, "mimic": {}}))
    for method in ("fg", "mimic"):
        write("small", method, 0, 12.0, price=1.5)
    assert "`small` alone, 12 epochs: the time of 4 methods |" in table.suite_table("trial", folder)


def test_a_variant_at_equal_share_stands_under_its_own_and_shares_are_means(write, monkeypatch):
    write("small", "none", 0, 10.0, shares={})
    for seed, share in ((0, 0.25), (1, 0.75)):
        folder = write("small", "rdd", seed, 12.0, shares={"feat": share, "logit": 0.001})
    write("small", "hint", 0, 12.0, price=1.5, price_kept=1.125, shares={"hint": 2.0})
    write("small", "hint, equal share", 0, 13.0, shares={"hint": 0.5})
    assert "equal share" not in table.suite_table("trial", folder), "only where the suite asks for it"
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], equal_share=True))
    text = table.suite_table("trial", folder)
    lines = {row.split("|")[1].strip(): cells(text, row.split("|")[1].strip()) for row in text.splitlines()[2:]}
    assert list(lines)[-2:] == ["`small` + Hint", "`small` + Hint, equal share"] and len(lines) == 5
    shares = {label: row["share of the gradient"] for label, row in lines.items()}
    assert shares["`small` + RDD (default)"] == "feat 0.500, logit 0.001"
    assert shares["`small` + Hint, equal share"] == "hint 0.500"
    assert shares["`small` alone"] == "—" and lines["`small` + Hint"]["price"] == "1.50 (1.12)"
    short = cells(table.suite_table("trial", folder, short=True), "`small` + Hint")
    assert short["price"] == "1.50 (1.12)" and "share of the gradient" not in short, "the suite asks for equal time"
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], equal_time=False))
    short = cells(table.suite_table("trial", folder, short=True), "`small` + RDD (default)")
    assert short["share of the gradient"] == shares["`small` + RDD (default)"] and "price" not in short, "it does not"


def test_a_student_that_nobody_ran_is_one_line_of_dashes(write, monkeypatch):
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], pairs=(("big", "tiny"), ("big", "small"))))
    write("big", "teacher", 0, 50.0)
    text = table.suite_table("trial", write("small", "none", 0, 10.0))
    labels = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert labels == ["`tiny`", "teacher `big`", "`small` alone", "`small` + RDD (default)", "`small` + Hint"]
    assert set(cells(text, "`tiny`").values()) == {"`tiny`", "—"}


def test_a_short_table_has_only_what_somebody_ran(write, monkeypatch):
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], pairs=(("big", "tiny"), ("big", "small"))))
    for name, variant, ap in (("big", "teacher", 50.0), ("small", "none", 10.0), ("small", "rdd", 12.0)):
        folder = write(name, variant, 0, ap, price=1.5)
    text, whole = (table.suite_table("trial", folder, short=short) for short in (1, 0))
    labels = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert labels == ["teacher `big`", "`small` alone", "`small` + RDD (default)"], "no tiny, no Hint"
    short, long = (cells(t, "`small` + RDD (default)") for t in (text, whole))
    assert list(short) == ["model", "MACs of teacher", "price", "mAP 3D", "vs. alone [95 %]", "seeds", "mAP 3D of each"]
    assert short["MACs of teacher"] == long["of teacher"] != "—"
    assert all(short[k] == long[k] for k in ("price", "mAP 3D", "seeds", "mAP 3D of each"))
    assert "+2.0" in short["vs. alone [95 %]"]
    assert len(table.suite_table("trial", folder, short=2).splitlines()) == 2, "of one seed each"
    for name, variant in (("big", "teacher"), ("small", "none")):
        write(name, variant, 1, 11.0)
    labels = [line.split("|")[1].strip() for line in table.suite_table("trial", folder, short=2).splitlines()[2:]]
    assert labels == ["teacher `big`", "`small` alone"]


def test_many_classes_have_a_table_of_their_own(write):
    levels = {f"C{k}": {"AP_R40": {"3d": {"easy": 0.0, "moderate": 10.0 * k, "hard": 0.0}}} for k in range(6)}
    for seed in (0, 1):
        folder = write("small", "none", seed, 10.0, last={"strict": levels})
    assert "C5" not in table.suite_table("trial", folder)
    text = table.class_table("trial", folder)
    assert len(text.splitlines()) == 3, "a row that nobody ran has no classes"
    means = {f"C{k} 3D": f"{10 * k:.1f}" for k in range(6)}
    assert cells(text, "`small` alone") == {"model": "`small` alone", **means, "seeds": "2"}


def test_classes_of_a_teacher_of_two_students_stand_once(write, monkeypatch):
    monkeypatch.setitem(SUITES, "trial", replace(SUITES["trial"], pairs=(("big", "small"), ("big", "tiny"))))
    for student, variant in (("big", "teacher"), ("small", "none"), ("tiny", "none")):
        folder = write(student, variant, 0, 10.0)
    told = [line.split(" | ")[0] for line in table.class_table("trial", folder).splitlines()[2:]]
    assert told == ["| teacher `big`", "| `small` alone", "| `tiny` alone"]


def test_rows_for_machines(write, tmp_path, monkeypatch):
    folder = write("small", "none", 0, 10.0)
    for module in (rows, table):
        monkeypatch.setattr(module, "SUITES", {"trial": SUITES["trial"]})
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("no table\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "trial").symlink_to(folder)
    monkeypatch.setattr("sys.argv", ["table.py", "--json", str(tmp_path / "rows.txt")])
    table.main()
    told = json.loads((tmp_path / "rows.txt").read_text())
    keys = {"suite", "teacher", "student", "method", "metric", "mean", "std", "n", "values", "delta", "low", "high", "macs_ratio",
            "as_long_as"}  # fmt: skip
    assert all(set(row) == keys for row in told)
    assert {(r["method"], r["metric"]): r["mean"] for r in told}["none", "moderate_map_bev"] == 20.0


def test_files_of_results_that_are_cut_or_missing_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    with pytest.raises(InputError, match=r"sheet\.json: cannot be read \(No such file"):
        table.sheet_table()
    (tmp_path / "results").mkdir()
    for text, said in (('{"boxes": {"rows": [', "expected JSON, found"), ('{"boxes": {}}', "KeyError"), ("[1]", "Error")):
        for name, read in (("sheet", table.sheet_table), ("bench", table.bench_table), ("bench", table.goals_table)):
            (tmp_path / "results" / f"{name}.json").write_text(text)
            with pytest.raises(InputError, match=rf"{name}\.json: .*{said}") as error:
                read()
            assert "\n" not in str(error.value)


def test_json_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "SUITES", {})
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["table.py", "--json", str(tmp_path / "file" / "rows.json")])
    with pytest.raises(InputError, match=r"rows\.json: cannot be written"):
        table.main()


def test_the_paper_s_figures_stand_in_their_own_column(write, monkeypatch):
    monkeypatch.setitem(SUITES, "trial", Suite("sim", (("second", "second-s-cpu"),), SUITES["trial"].variants, {"": 1}, {}))
    text = table.suite_table("trial", write("other", "none", 0, 1.0))
    row = cells(text, "`second-s-cpu` + RDD (default)")
    assert row["paper"] == "68.2" and row["mAP 3D"] == "—"
    assert cells(text, "`second-s-cpu` + Hint")["paper"] == "—"


def test_benchmarks_say_what_was_not_measured_and_how_the_rest_was(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    assert len(table.bench_table().splitlines()) == 2, "nothing measured yet: no row"
    (tmp_path / "results").mkdir()
    measured = [Row("boxes", "1000 | pairs", 0.0123, "shapely", 1.5, 121.95, 20.0), Row("gpu", "a step", None, unit="GB")]
    record = {"command": "python -m benchmarks", "date": "2026-01-02", "machine": "2 cores"}
    records = {name: record | {"rows": [vars(row)]} for name, row in zip(("boxes", "gpu"), measured, strict=True)}
    (tmp_path / "results" / "bench.json").write_text(json.dumps(records))
    _, _, first, second, _, said = table.bench_table().splitlines()
    assert first == "| boxes | 1000 \\| pairs | 12.3 ms | shapely | 1.5 s | 121.95 | 20.00 |  |"
    assert second == "| gpu | a step | not measured | — | — | — | — |  |"
    assert said == "`python -m benchmarks`, 2026-01-02, 2 cores."
    assert table.goals_table().splitlines()[2:] == ["| boxes | shapely | 1 | 121.95 | 121.95 | 121.95 | 20.00 | 1 |"]


def test_fill_replaces_tables_and_nothing_else():
    text = "a\n<!-- table readings -->\nout of date\n<!-- end -->\nb\n"
    filled = table.fill(text)
    assert filled.startswith("a\n<!-- table readings -->\n| ")
    assert filled.endswith("\n<!-- end -->\nb\n") and "out of date" not in filled
    assert table.fill(filled) == filled
    with pytest.raises(InputError, match="unknown table 'nothing'"):
        table.fill("<!-- table nothing --><!-- end -->")
