"""evaluate.py's command line: saved KITTI results, checkpoints. (What a detector scores is tested with the training.)"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
from cli import InputError
from config import Config, to_json
from data.kitti import read_objects
from detector import build
from presets import preset
from tests.scenes import assert_same, tiny_config
from tests.test_simulate_nuscenes import small  # noqa: F401 (a fixture)
from tests.test_train import root  # noqa: F401 (a fixture)
from weights import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
LABEL = "Car 0.00 0 -1.58 587.01 173.33 614.12 210.00 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"
RESULT = "Car -1 -1 -1.58 587.0 173.3 614.1 210.0 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59 0.9"


def score(gt: Path, results: Path, *options: str) -> None:
    evaluate.kitti_main(["--gt", str(gt), "--results", str(results), *options])


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three labelled frames and their results: one found, one not, one with nothing in it."""
    gt, results = tmp_path / "label_2", tmp_path / "results"
    gt.mkdir(), results.mkdir()
    for frame, label, result in (("000001", LABEL, RESULT), ("000002", LABEL, ""), ("000010", "", "")):
        (gt / f"{frame}.txt").write_text(label and label + "\n")
        (results / f"{frame}.txt").write_text(result and result + "\n")
    return gt, results


# ---- what it scores


def test_the_documented_command_on_real_detections(real_kitti, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    score(real_kitti / "training" / "label_2", real_kitti / "detections", "--json", str(out))
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "scoring the 5 frames" in printed and "3 frames have labels but no result" in printed
    assert "000000, 000003, 000134" in printed and "Fewer than 41 labels" in printed
    car = result["strict"]["Car"]
    assert car["AP_R11"]["3d"]["moderate"] == pytest.approx(14.7727, abs=5e-5)
    assert car["AP_R40"]["bev"]["hard"] == pytest.approx(9.1667, abs=5e-5)
    assert "8.2292" in printed and "14.7727" in printed
    assert result["strict"]["Cyclist"]["AP_R40"] == dict.fromkeys(("bbox", "bev", "3d", "aos"))
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]  # no temporary file is left


def test_json_is_the_official_evaluators_table(golden, tmp_path, capsys):
    case = golden / "kitti_eval" / "edge" / "no_alpha"
    score(case / "label_2", case / "pred", "--json", str(tmp_path / "scores.json"))
    found, expected = json.loads((tmp_path / "scores.json").read_text()), json.loads((case / "expected.json").read_text())
    rounded = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))
    assert rounded == json.loads(json.dumps(expected["expected"]), parse_float=lambda text: round(float(text), 4))


@pytest.mark.parametrize("layout", ["label_2", ".", "training/label_2"])
@pytest.mark.parametrize("data", ["", "data"])
def test_gt_and_results_in_their_usual_places(folders, tmp_path, capsys, layout, data):
    """A folder of labels, KITTI's root or its training folder; results in `data`, as the official kit writes them."""
    gt, results = folders
    root = tmp_path / "kitti"  # noqa: F811
    shutil.copytree(gt, root / layout if layout != "." else root)
    shutil.copytree(results, tmp_path / "out" / data)
    (tmp_path / "out" / "log.txt").write_text("no result file\n")
    score(root, tmp_path / "out")
    assert "scoring the 3 frames" in capsys.readouterr().out
    if layout == "training/label_2":
        score(root / "training", tmp_path / "out")
        assert "scoring the 3 frames" in capsys.readouterr().out


def test_frames_without_a_result_file_are_left_out_and_named(folders, capsys):
    gt, results = folders
    (results / "000002.txt").unlink()  # the frame in which nothing was found
    score(gt, results)
    printed = capsys.readouterr().out
    assert "scoring the 2 frames" in printed and "1 frames have labels but no result file: 000002" in printed
    assert ["Car", "labels", "that", "count", "0", "1", "1"] in [line.split() for line in printed.splitlines()]


def test_classes(folders, tmp_path, capsys):
    score(*folders, "--classes", "Cyclist,Car", "--json", str(tmp_path / "scores.json"))
    assert list(json.loads((tmp_path / "scores.json").read_text())["strict"]) == ["Cyclist", "Car"]
    assert "Pedestrian" not in capsys.readouterr().out


def test_case_of_a_class_does_not_matter_in_results(folders, tmp_path, capsys):
    gt, results = folders
    score(gt, results, "--json", str(tmp_path / "a.json"))
    (results / "000001.txt").write_text(RESULT.lower())
    score(gt, results, "--json", str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


# ---- a checkpoint


def saved(folder: Path, cfg: Config) -> str:
    save_checkpoint(folder / "last.pt", {"format": 1, "config": to_json(cfg), "model": build(cfg).state_dict(), "step": 3})
    return str(folder / "last.pt")


@pytest.fixture
def asked(root, monkeypatch) -> list[tuple]:  # noqa: F811
    """What `detect` was asked for: config, frames, batch size. It finds the labels of each frame, but of 000003 the first."""
    asked = []

    def detect(detector, dataset, device, batch_size, workers):
        asked.append((detector.cfg, dataset.ids, batch_size))
        found = {frame.id: (frame.boxes, np.array([0.9, 0.4]) - 0.01 * int(frame.id), frame.names) for frame in dataset}
        return {id: tuple(column[: 1 if id == "000003" else 2] for column in columns) for id, columns in found.items()}

    monkeypatch.setattr(evaluate, "detect", detect)
    for split, ids in (("train", "000001\n000003\n"), ("val", "000002\n")):
        (root / "ImageSets" / f"{split}.txt").write_text(ids)
    return asked


def test_a_checkpoint_exports_what_it_is_scored_by(root, asked, tmp_path, monkeypatch, capsys):  # noqa: F811
    cfg, out = tiny_config(data="kitti", root=str(root), fov_only=False), tmp_path / "new" / "export"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, cfg), "--frames", "000003,0,2", "--score-threshold", ".3",
                                      "--max-detections", "7", "--batch-size", "2", "--export", str(out),
                                      "--json", str(tmp_path / "scores.json")])  # fmt: skip
    evaluate.main()
    ids = ["000003", "000000", "000002"]
    assert asked == [(replace(cfg, score_threshold=0.3, max_detections=7), ids, 2)]
    printed = capsys.readouterr().out
    assert f"last.pt: {cfg.preset}, step 3, on 3 frames of {root} (given by --frames)" in printed
    assert ["Pedestrian", "labels", "that", "count", "3", "3", "3"] in [line.split() for line in printed.splitlines()]
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{id}.txt" for id in ids)
    for id in ids:
        label = read_objects(root / "training/label_2" / f"{id}.txt", scored=False)
        result = read_objects(out / f"{id}.txt", scored=True)
        assert result.type.tolist() == ["Car", "Pedestrian"][: 1 if id == "000003" else 2] and len(label) == 2
        assert result.location == pytest.approx(label.location[: len(result)], abs=1e-3)
        assert result.score == pytest.approx((np.array([0.9, 0.4]) - 0.01 * int(id))[: len(result)])
    score(root, out, "--json", str(tmp_path / "again.json"))
    scores, again = (json.loads((tmp_path / name).read_text()) for name in ("scores.json", "again.json"))
    assert_same(again, scores, 1e-4)  # the files have four decimals
    found = {name: row["AP_R40"]["3d"] for name, row in scores["strict"].items()}
    assert found == {"Car": dict.fromkeys(("easy", "moderate", "hard"), 5.0),  # three hits: three points of 41
                     "Pedestrian": dict.fromkeys(("easy", "moderate", "hard"), 2.5), "Cyclist": None}  # fmt: skip


def test_a_nuscenes_checkpoint_exports_what_it_is_scored_by(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """It finds the labels: every car counts. The exported file, scored by itself, has the same figures."""

    def detect(detector, dataset, device, batch_size, workers):
        frames = [dataset[i] for i in range(len(dataset))]
        return {f.id: (np.nan_to_num(f.boxes), np.linspace(0.9, 0.5, len(f.boxes)), f.names) for f in frames}

    monkeypatch.setattr(evaluate, "detect", detect)
    cfg = replace(preset("cp-voxel-xxs-cpu", "nuscenes"), data="nuscenes", root=str(small))
    out, scores, again = tmp_path / "export", tmp_path / "scores.json", tmp_path / "again.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, cfg), "--export", str(out), "--json", str(scores)])
    evaluate.main()
    found = json.loads(scores.read_text())
    assert found["mean_dist_aps"]["car"] == pytest.approx(1) and found["label_tp_errors"]["car"]["trans_err"] < 1e-3
    said = capsys.readouterr().out
    assert f"mAP {found['mean_ap']:.4f}    NDS {found['nd_score']:.4f}" in said
    assert re.search(r"^car +(1\.0000 +){5}0\.000", said, re.M)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "nuscenes", "--root", str(small), "--version", "v1.0-trainval", "--split",
                                      "val", "--results", str(out / "results.json"), "--json", str(again)])  # fmt: skip
    evaluate.main()
    assert json.loads(again.read_text()) == found

    monkeypatch.setattr("data.nuscenes.NuScenes.names", lambda *_: ())  # as of the test split: the file is what is wanted
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, cfg), "--export", str(tmp_path / "test")])
    evaluate.main()
    assert ": result files written; these frames have no labels to score them by" in capsys.readouterr().out
    assert (tmp_path / "test" / "results.json").read_text() == (out / "results.json").read_text()


@pytest.mark.parametrize(("options", "ids"), [([], ["000002"]), (["--split", "train"], ["000001", "000003"])])
def test_a_checkpoint_is_scored_on_the_split_asked_for(root, asked, tmp_path, monkeypatch, capsys, options, ids):  # noqa: F811
    cfg = tiny_config(data="kitti", root=str(tmp_path / "moved"), fov_only=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, cfg), "--root", str(root), *options])
    evaluate.main()
    assert asked == [(cfg, ids, 4)]
    assert f"on {len(ids)} frames of {root} (split {options[-1] if options else 'val'})" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


def test_of_kittis_test_split_the_files_are_written_and_nothing_is_scored(root, tmp_path, monkeypatch, capsys):  # noqa: F811
    (root / "training").rename(root / "testing")
    (root / "ImageSets" / "test.txt").write_text("000002\n")
    box = np.array([[15.0, 0.0, -1.0, 4.0, 1.8, 1.5, 0.0]], np.float32)
    monkeypatch.setattr(evaluate, "detect", lambda _, data, *__: {id: (box, np.array([0.9]), ("Car",)) for id in data.ids})
    cfg, out = tiny_config(data="kitti", root=str(root), fov_only=False), tmp_path / "out"
    words = ["evaluate.py", saved(tmp_path, cfg), "--split", "test"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InputError, match="--split test: KITTI's has no labels to score by; expected --export DIR"):
        evaluate.main()
    scores = tmp_path / "scores.json"
    monkeypatch.setattr(sys, "argv", [*words, "--export", str(out), "--json", str(scores)])
    evaluate.main()
    assert [path.name for path in out.iterdir()] == ["000002.txt"] and (out / "000002.txt").read_text().startswith("Car ")
    said = capsys.readouterr().out
    assert f"no labels to score them by, so no {scores}" in said and "AP_R40" not in said and not scores.exists()


# ---- what it refuses


BAD = [  # what to do to (gt, results), what the message says
    (lambda gt, results: (results / "000003.txt").write_text(RESULT), r"label file .* for each result.* 000003\.txt"),
    (lambda gt, results: [path.unlink() for path in results.iterdir()], r"results: expected result files NNNNNN\.txt"),
    (lambda gt, results: shutil.rmtree(results), r"results: expected result files"),
    (lambda gt, results: shutil.rmtree(gt), r"label_2: expected label files NNNNNN\.txt .*training/label_2"),
    (lambda gt, results: (results / "000001.txt").write_text(f"{RESULT}\n\n{LABEL}\n"), r"000001\.txt:3: expected 16 columns"),
    (lambda gt, results: (gt / "000001.txt").write_text(RESULT), r"label_2/000001\.txt:1: expected 15 columns"),
    (lambda gt, results: (results / "000001.txt").write_text(RESULT.replace("0.9", "nan")), r"000001\.txt:1.*score.*'nan'"),
    (lambda gt, results: (results / "000001.txt").write_text(RESULT.replace("46.70", "4x")), r"000001\.txt:1.*'4x'"),
    (lambda gt, results: (results / "000001.txt").write_text(RESULT.replace("Car", "Cars")), r"'Cars' \(did you mean Car\?\)"),
    (lambda gt, results: (gt / "000001.txt").write_text(LABEL.replace("Car", "Cra")), r"'Cra' \(did you mean Car\?\)"),
]


@pytest.mark.parametrize("damage, message", BAD)
def test_bad_input(folders, tmp_path, damage, message):
    damage(*folders)
    with pytest.raises(InputError, match=message) as error:
        score(*folders, "--json", str(tmp_path / "scores.json"))
    assert "\n" not in str(error.value) and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("options, message", [
    (["--classes", "Car,Pedestrain"], "did you mean Pedestrian"),
    (["--classes", ","], "at least one class"),
    (["--result", "x"], "did you mean --results"),
    (["--json"], "expected one argument"),
    (["more"], "unexpected argument 'more'"),
])  # fmt: skip
def test_bad_options(folders, options, message):
    with pytest.raises(InputError, match=message):
        score(*folders, *options)


def test_json_that_cannot_be_written(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "scores.json", tmp_path / "results"):  # below a file; a folder
        with pytest.raises(InputError, match="cannot be written"):
            score(*folders, "--json", str(out))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("options, message", [
    (["--batch-size", "0"], "--batch-size: expected a number from 1 on, found 0"),
    (["--batch-size", "-3"], "found -3"),
    (["--data", "kittii"], r"unknown data set 'kittii' \(did you mean kitti\?\)"),
    (["--data", "kitti"], "--data kitti: expected its --root too"),
])  # fmt: skip
def test_bad_options_with_a_checkpoint(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, tiny_config()), *options])
    with pytest.raises(InputError, match=message) as error:
        evaluate.main()
    assert "\n" not in str(error.value)


def test_export_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "detect", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(InputError, match="expected a folder to write in, found: "):
            evaluate.evaluate_detector(None, None, None, export=out)


# ---- as a program


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [["--help"], ["kitti", "--help"]])
def test_help_comes_without_torch(words):
    done = run("-X", "importtime", "evaluate.py", *words)
    assert done.returncode == 0 and "usage: evaluate.py" in done.stdout and "--json" in done.stdout
    assert not any(name in done.stderr for name in ("torch", "numpy", "matplotlib"))


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = run("evaluate.py", "kitti", "--gt", str(tmp_path), "--results", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
    assert run("evaluate.py", "kitti").returncode == 2 and run("evaluate.py").returncode == 2


@pytest.mark.parametrize("labelled", [True, False])
def test_an_export_of_nothing_is_a_file_all_the_same(small, tmp_path, monkeypatch, labelled):  # noqa: F811
    """Every frame of the split has its list in a submission, and be it empty."""
    nothing = (np.zeros((0, 9), np.float32), np.zeros(0, np.float32), ())
    monkeypatch.setattr(evaluate, "detect", lambda detector, dataset, *args: dict.fromkeys(dataset.ids, nothing))
    if not labelled:
        monkeypatch.setattr("data.nuscenes.NuScenes.names", lambda self, i: ())
    cfg = replace(preset("cp-voxel-xxs-cpu", "nuscenes"), data="nuscenes", root=str(small))
    out, scores = tmp_path / "export", tmp_path / "scores.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", saved(tmp_path, cfg), "--export", str(out), "--json", str(scores)])
    evaluate.main()
    lists = json.loads((out / "results.json").read_text())["results"]
    assert len(lists) == 4 and not any(lists.values())
    assert scores.exists() == labelled
    if labelled:
        found = json.loads(scores.read_text())
        assert found["nd_score"] == found["mean_ap"] == 0
