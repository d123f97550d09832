"""Training: exact resume, workers, processes, refusals, and one run that learns two frames by heart."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

import train as train_module
from baselines import METHODS
from cli import InputError
from config import from_json
from data import batch as batch_module
from data.kitti import objects_from_boxes, read_calibration, write_objects
from detector import build
from evaluate import detect, evaluate_detector, headline
from presets import PRESETS, READINGS, preset
from runs import RunFolder
from tests.scenes import tiny_config, tiny_frames
from train import check_finite, one_cycle, start_distilling, train
from weights import load_detector, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = """P0: 7.2e2 0 6.1e2 0 0 7.2e2 1.7e2 0 0 0 1 0
P1: 7.2e2 0 6.1e2 0 0 7.2e2 1.7e2 0 0 0 1 0
P2: 1.5e2 0 6.1e2 0 0 1.5e2 1.7e2 0 0 0 1 0
P3: 7.2e2 0 6.1e2 0 0 7.2e2 1.7e2 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 0.5
Tr_imu_to_velo: 1 0 0 0 0 1 0 0 0 0 1 0
"""  # a short focal length, so that objects a few metres ahead are in the image


@pytest.fixture()
def root(tmp_path) -> Path:
    """A KITTI root of four tiny frames."""
    root = tmp_path / "kitti"
    for folder in ("training/velodyne", "training/calib", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True)
    frames = tiny_frames(4)
    for frame in frames:
        frame.points.tofile(root / "training/velodyne" / f"{frame.id}.bin")
        calib = root / "training/calib" / f"{frame.id}.txt"
        calib.write_text(CALIBRATION)
        objects = objects_from_boxes(frame.boxes, frame.names, None, read_calibration(calib), (1242, 375))
        write_objects(root / "training/label_2" / f"{frame.id}.txt",
                      replace(objects, truncation=np.zeros(len(objects)), occlusion=np.zeros(len(objects), int)))  # fmt: skip
    for split in ("train", "val"):
        (root / "ImageSets" / f"{split}.txt").write_text("".join(f"{f.id}\n" for f in frames))
    return root


def config(root, **changes):
    return tiny_config(**{"data": "kitti", "root": str(root), "fov_only": False, "paste": (1, 1, 0), **changes})


def metrics(folder: Path, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == kind]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the same run, however it is run


@pytest.mark.parametrize(("method", "workers", "changes"), [("none", 2, {}), ("fg", 0, {"label_kd": True}), *(
    (method, 0, {}) for method in METHODS)])  # fmt: skip
def test_resuming_is_exact_whatever_the_number_of_workers(root, tmp_path, method, workers, changes):
    """k steps + resume + k steps = 2k steps, bit for bit: weights, adapters, optimiser and log; stop inside an epoch."""
    torch.set_num_threads(1)
    cfg = config(root, method=method, epochs=3, label_score=(0.05,), **changes)  # an untrained teacher is sure of nothing
    teacher = train_module_teacher(cfg) if method != "none" else None
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole, teacher)
    train(cfg, parts, teacher, workers=workers, stop_after=3)
    assert read_checkpoint(parts / "last.pt")["step"] == 3
    train(cfg, parts, teacher, workers=0)
    a, b = read_checkpoint(whole / "last.pt"), read_checkpoint(parts / "last.pt")
    assert a["step"] == b["step"] == 6
    assert same(a["model"], b["model"]) and same(a["distil"], b["distil"])
    for k, state in a["optimizer"]["state"].items():
        assert same(state, b["optimizer"]["state"][k])
    assert metrics(whole) == metrics(parts) and len(metrics(whole)) == 6
    assert metrics(whole, "eval") == metrics(parts, "eval")
    adapters = start_distilling(cfg, build(cfg), teacher, torch.device("cpu"))
    assert a["distil"].keys() == (adapters.state_dict().keys() if adapters else set())
    for name, start in adapters.named_parameters() if adapters else ():
        assert not torch.equal(a["distil"][name], start), f"{name} was not trained"


def train_module_teacher(cfg):
    return build(replace(cfg, width=(1.0, 1.0, 1.0), method="none"))


def test_an_evaluation_that_fails_costs_no_training(root, tmp_path, monkeypatch):
    """The checkpoint stands before it; the same command begins with the evaluation, and all ends as if nothing had been."""
    cfg = config(root, epochs=3, eval_every=2)
    train(cfg, tmp_path / "whole")
    real = RunFolder.evaluate
    for fails_at in (4, 6):
        def broken(self, step, *rest, fails_at=fails_at):
            if step == fails_at:
                real(self, step, *rest)  # and after the line in the log, before it is in the checkpoint
                content = read_checkpoint(self.path / "last.pt")
                torch.save({**content, "unevaluated": True}, self.path / "last.pt")
                raise InputError("a broken cloud")
            real(self, step, *rest)

        monkeypatch.setattr(RunFolder, "evaluate", broken)
        with pytest.raises(InputError, match="broken cloud"):
            train(cfg, tmp_path / "run")
        assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == fails_at
        monkeypatch.setattr(RunFolder, "evaluate", real)
    train(cfg, tmp_path / "run")
    a, b = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    assert same(a["model"], b["model"]) and a["best"] == b["best"] and not b["unevaluated"]
    for kind in ("train", "eval"):
        assert metrics(tmp_path / "run", kind) == metrics(tmp_path / "whole", kind)


def test_a_long_epoch_is_saved_in_between(root, tmp_path, monkeypatch):
    cfg = config(root, epochs=1)
    saved, real = [], RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda run, step, *name: saved.append((step, *name)) or real(run, step, *name))
    train(cfg, tmp_path / "whole")
    assert {step for step, *_ in saved} == {2}, "short epochs: at their ends"
    saved.clear()
    monkeypatch.setattr(train_module, "SAVE_EVERY", 0)
    train(cfg, tmp_path / "often")
    assert [step for step, *_ in saved][:2] == [1, 2]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "often")


def test_a_finished_run_is_not_trained_again(root, tmp_path):
    cfg = config(root)
    train(cfg, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(cfg, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_processes_that_stand_at_other_steps_say_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr("parallel.gather", lambda step: [step, 7])  # one of them on a disk of its own
    with pytest.raises(InputError, match="run: the processes found different checkpoints; --runs"):
        train(config(root), tmp_path / "run")


def test_a_run_is_for_one_process_at_a_time(root, tmp_path):
    """Of two, each would empty and write the other's files. What is left of a process that is gone is no lock."""
    other = ("import sys, fcntl; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); "
             "sys.stdin.read()")  # fmt: skip
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", other, str(tmp_path / "run" / "lock")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="run: another process is training this run"):
            train(config(root), tmp_path / "run", stop_after=1)
        assert not (tmp_path / "run" / "config.json").exists()
        process.stdin.close()
    train(config(root), tmp_path / "run", stop_after=1)
    train(config(root), tmp_path / "run", stop_after=2)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_a_run_goes_on_where_its_data_has_another_name_or_place(root, tmp_path, capsys):
    train(config(root), tmp_path / "run", stop_after=1)
    (tmp_path / "other name").symlink_to(root)
    train(config(tmp_path / "other name"), tmp_path / "run", stop_after=2)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    with pytest.raises(InputError, match="holds a run with root = .*other name, this one has .*copy"):
        train(config(copy), tmp_path / "run", stop_after=3)
    shutil.rmtree(root)
    train(config(copy), tmp_path / "run", stop_after=3)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_a_folder_of_another_run_is_refused(root, tmp_path):
    train(config(root), tmp_path / "run", stop_after=1)
    with pytest.raises(InputError, match="holds a run with lr = 0.003, this one has 0.001"):
        train(config(root, lr=0.001), tmp_path / "run")


def test_a_run_knows_its_teacher(root, tmp_path):
    cfg = config(root, method="rdd")
    teacher, other = train_module_teacher(cfg), build(config(root, seed=7)).eval()
    train(cfg, tmp_path / "run", teacher, stop_after=1)
    with pytest.raises(InputError, match="begun with another teacher"):
        train(cfg, tmp_path / "run", other)
    train(cfg, tmp_path / "run", teacher, stop_after=2)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_weights_that_the_last_update_broke_are_not_saved(root, tmp_path, monkeypatch):
    cfg = config(root)
    train(cfg, tmp_path / "run", stop_after=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(train_module, "one_cycle", lambda step, steps, peak: (math.inf, 0.9))
    with pytest.raises(InputError, match=r"step 2: the update made .* NaN or infinite; nothing was saved"):
        train(cfg, tmp_path / "run", stop_after=2)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_bfloat16_is_another_loss_and_float16_on_a_cpu_the_same(root, tmp_path):
    torch.set_num_threads(1)
    first = {}
    for amp in ("off", "float16", "bfloat16"):
        train(config(root, amp=amp), tmp_path / amp, stop_after=1)
        first[amp] = metrics(tmp_path / amp)[0]["loss"]
    assert first["float16"] == first["off"] != first["bfloat16"]
    assert first["bfloat16"] == pytest.approx(first["off"], rel=0.02)


def test_the_teacher_is_untouched_and_not_in_the_checkpoint(root, tmp_path):
    cfg = config(root, method="rdd")
    teacher = train_module_teacher(cfg)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    train(cfg, tmp_path / "run", teacher)
    assert same(teacher.state_dict(), before)
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    student, _ = load_detector(tmp_path / "run" / "last.pt")
    assert content["model"].keys() == student.state_dict().keys()
    record = metrics(tmp_path / "run")[0]
    for key in ("cls", "reg", "feat", "logit", "selected", "d_50", "pull_detection", "pull_feat", "pull_logit"):
        assert math.isfinite(record[key]), key


def test_kd_weight_scales_every_term_of_the_method_and_label_kd_what_the_detection_loss_is_told(root, tmp_path):
    torch.set_num_threads(1)
    first, teacher = {}, train_module_teacher(config(root))
    for name, changes in (("one", {}), ("three", {"kd_weight": 3.0}), ("labels", {"label_kd": True, "label_score": (0.05,)})):
        train(config(root, method="pp-logit", **changes), tmp_path / name, teacher, stop_after=1)
        first[name] = metrics(tmp_path / name)[0]
    for term, times in (("pp_cls", 3), ("pp_reg", 3), ("pull_pp_cls", 3), ("cls", 1), ("pull_detection", 1)):
        assert first["three"][term] == pytest.approx(times * first["one"][term], rel=1e-5) and first["one"][term] > 0, term
    assert first["labels"]["cls"] != first["one"]["cls"] and first["labels"]["pp_cls"] == first["one"]["pp_cls"]


def test_a_fading_weight_is_whole_at_the_first_step_and_falls_by_equal_parts(root, tmp_path):
    torch.set_num_threads(1)
    first, teacher = {}, train_module_teacher(config(root))
    for name, fade in (("constant", False), ("fading", True)):  # lr ~ 0: the steps differ in their frames only
        cfg = config(root, method="hinton", kd_fade=fade, lr=1e-12, log_every=1)
        train(cfg, tmp_path / name, teacher)
        first[name] = [m for m in metrics(tmp_path / name) if "hinton" in m]
    steps = len(first["fading"])
    assert steps == len(first["constant"]) > 2
    for k, (fading, constant) in enumerate(zip(first["fading"], first["constant"], strict=True)):
        assert fading["hinton"] == pytest.approx((1 - k / steps) * constant["hinton"], rel=1e-4) and constant["hinton"] > 0
        assert fading["cls"] == pytest.approx(constant["cls"], rel=1e-4)


def test_two_processes_have_the_curve_of_one(root, tmp_path):
    """torchrun on gloo: the same global batches and, to rounding, the same losses; distillation included. No threshold on a
    score, no share and no limit: there rounding would choose. And small steps: it grows with the learning rate."""
    options = ["--data", "kitti", "--root", str(root), "--runs", str(tmp_path), "--fov-only", "off", "--epochs", "3",
               "--point-range", "0,-4.8,-3,6.4,4.8,1", "--log-every", "1", "--eval-every", "9", "--seed", "3",
               "--proposal-score", "0", "--proposals", "288", "--select", "all", "--lr", "0.0001",
               "--student", "cp-voxel-xxs-cpu", "--teacher", str(tmp_path / "teacher" / "last.pt")]  # fmt: skip
    torch.set_num_threads(1)
    train(config(root, width=(1.0, 1.0, 1.0), epochs=1, paste=(0, 0, 0)), tmp_path / "teacher")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "train.py", *options, "--name", "one"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *options,
           "--name", "two"]  # fmt: skip
    for command in (one, two):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "teacher: moderate_map_3d" in done.stdout  # printed before distillation starts
        assert len(re.findall(r"^on \d+ cores, .*(?:no GPU|spconv), torch .*, float(?:32|16)$", done.stdout, re.MULTILINE)) == 1
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [r["step"] for r in a] == [r["step"] for r in b] == [1, 2, 3, 4, 5, 6]
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "cls", "reg", "feat", "logit", "grad_norm"):
            assert y[key] == pytest.approx(x[key], rel=1e-3), (x["step"], key)
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    one, two = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    cfg, teacher = from_json(one["config"]), load_detector(tmp_path / "teacher" / "last.pt")[0]
    psi = start_distilling(cfg, build(cfg), teacher, torch.device("cpu")).state_dict()
    for name, before in psi.items():  # its gradient is averaged over the processes too
        apart, moved = (two["distil"][name] - one["distil"][name]).norm(), (one["distil"][name] - before).norm()
        assert apart < 0.01 * moved, name


# ---------------------------------------------------------------- it learns


def test_a_student_learns_two_frames_by_heart_with_rdd(root, tmp_path):
    """End to end: teacher, RDD student, evaluation. KITTI caps AP at 2.5 with two labels a class: distances are the measure."""
    torch.set_num_threads(1)
    frames = ("000000", "000001")
    # 600 steps: the norms' running statistics (momentum 0.01) keep 5 % of their first value after 300, too much
    cfg = config(root, frames=frames, epochs=600, flip=False, rotation=0.0, scaling=0.0, eval_every=600)
    cfg = replace(cfg, paste=(0, 0, 0), log_every=50)
    teacher = train(replace(cfg, width=(0.5, 0.5, 0.5)), tmp_path / "teacher")
    student = train(replace(cfg, method="rdd"), tmp_path / "student", teacher)
    log = metrics(tmp_path / "student")
    assert log[-1]["feat"] < 0.7 * log[0]["feat"] and log[-1]["cls"] < 0.1 * log[0]["cls"]
    from data.kitti import Kitti

    dataset = Kitti(root, "train", frames, fov_only=False)
    result = evaluate_detector(student, dataset, torch.device("cpu"))
    found = detect(student, dataset, torch.device("cpu"))
    for k, id in enumerate(frames):  # every object has one of the three best detections of its class within a metre
        truth, (boxes, _, names) = dataset[k], found[id]
        for name, box in zip(truth.names, truth.boxes, strict=True):
            near = np.linalg.norm(boxes[np.array(names) == name][:3, :3] - box[:3], axis=1)
            assert len(near) and near.min() < 1.0, (id, name, near)
    assert set(headline(result)) == {"moderate_map_3d", "moderate_map_bev"}


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs torch 2.10")
def test_every_tensor_of_a_step_is_on_the_student_s_device(root, tmp_path):
    """On a device that is not the CPU: what was made on the CPU and never moved would end a run on a GPU."""
    ended = subprocess.run([sys.executable, "-m", "tests.pretend_gpu", root, tmp_path / "runs"], cwd=ROOT, capture_output=True,
                           text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("{'method': ") == 2 * len(METHODS) + 2 * 3 + 8
    assert metrics(tmp_path / "runs" / "student", "eval")[-1]["step"] == 4


# ---------------------------------------------------------------- small parts


def test_one_cycle_has_the_published_shape():
    rates = [one_cycle(s, 100, 3e-3) for s in range(101)]
    assert rates[0] == (pytest.approx(3e-4), 0.95) and rates[40] == (pytest.approx(3e-3), pytest.approx(0.85))
    assert rates[100] == (pytest.approx(3e-8), pytest.approx(0.95))
    lr = [r for r, _ in rates]
    assert lr[:41] == sorted(lr[:41]) and lr[40:] == sorted(lr[40:], reverse=True)
    reference = torch.optim.lr_scheduler.OneCycleLR
    p = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = reference(p, 3e-3, total_steps=101, pct_start=0.4 + 0.6 / 101, div_factor=10, final_div_factor=1e4)
    for step in range(100):
        assert p.param_groups[0]["lr"] == pytest.approx(rates[step][0], rel=0.02, abs=1e-7)
        p.step()
        schedule.step()


def test_a_loss_that_is_not_finite_stops_and_names_term_and_frames():
    terms = {"cls": torch.tensor(1.0), "reg": torch.tensor(float("nan"))}
    with pytest.raises(InputError, match="loss term 'reg' is nan on frames 000001, 000007"):
        check_finite(terms, ["000001", "000007"], 5)


def test_nan_loss_ends_the_run_and_keeps_the_checkpoint(root, tmp_path, monkeypatch):
    cfg = config(root, epochs=3)
    train(cfg, tmp_path / "run", stop_after=2)
    from detector import Detector

    monkeypatch.setattr(Detector, "loss", lambda *_: {"cls": torch.tensor(float("inf"), requires_grad=True)})
    with pytest.raises(InputError, match="'cls' is inf on frames 0000"):
        train(cfg, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def command(*words):
    return subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("words", "hint"), [
    ((), "nothing to train"), (("--teacher", "cp-voxle"), "did you mean cp-voxel"), (("--studnet",), "did you mean --student"),
    (("--student", "--method", "rdd"), "--method rdd: needs a --teacher"),
    (("--student", "--inherit"), "--inherit or --label-kd: needs a --teacher"),
    (("--student", "--label-kd"), "--inherit or --label-kd: needs a --teacher"),
    (("--student", "runs/none/last.pt"), "no such checkpoint"),
    (("--student", "--data", "kity"), "did you mean kitti"),
    (("--student", "--workers", "-1"), "--workers: expected a number from 0 on; found -1"),
    (("--student", "--stop-after", "0"), "--stop-after: expected a number from 1 on; found 0"),
    (("--teacher", "--student", "--teacher-epochs", "0"), "--teacher-epochs: expected a number from 1"),
    (("--student", "cp-voxel-xxs-cpu", "--data", "kitti", "--root", "/nowhere"), "expected a KITTI root"),
])  # fmt: skip
def test_wrong_commands_get_one_line_and_status_2(words, hint):
    done = command(*words)
    assert done.returncode == 2 and hint in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_print_config_shows_both_and_trains_nothing(tmp_path):
    done = command("--teacher", "--student", "--reading", "printed", "--print-config", "--runs", str(tmp_path))
    assert done.returncode == 0 and "preset cp-voxel-cpu" in done.stdout and "preset cp-voxel-xxs-cpu" in done.stdout
    assert not any(tmp_path.iterdir())


def options_of(*words):
    """What --print-config says of the teacher and of the student, {option: its text}."""
    shown = command(*words, "--print-config").stdout.split("preset ")[1:]
    return [dict(line.split(None, 1) for line in text.splitlines() if line.startswith("  ") and len(line.split(None, 1)) == 2)
            for text in shown]  # fmt: skip


@pytest.mark.parametrize(("reading", "expected"), [
    ("default", ("none", "top", "2.0", "False")), ("paper-weights", ("none", "top", "0.2", "True")),
    ("printed", ("softmax", "threshold", "0.2", "True")),
])  # fmt: skip
def test_a_reading_is_of_the_student(reading, expected):
    teacher, student = options_of("--teacher", "--student", "--reading", reading)
    assert tuple(student[name] for name in ("normalise", "select", "alpha1", "psi_norm")) == expected
    assert (teacher["method"], student["method"]) == ("none", "rdd")


@pytest.mark.parametrize(("words", "alpha1"), [((), 0.2), (("--reading", "default"), 0.2), (("--reading", "printed"), 0.2),
                                               (("--alpha1", "2"), 2.0)])  # fmt: skip
def test_an_anchor_head_has_its_own_alpha1(words, alpha1):
    assert {preset(name).alpha1 for name in PRESETS if preset(name).head == "anchor"} == {0.2}
    assert options_of("--teacher", "second", "--student", "second-s", *words)[1]["alpha1"] == str(alpha1)


@pytest.mark.parametrize(("teacher", "name", "head", "alpha1"), [
    ("second-cpu", "cp-voxel-cpu", "anchor", "0.2"), ("cp-voxel-cpu", "second-cpu", "center", "2.0"),
])  # fmt: skip
def test_the_default_reading_is_of_the_head_that_is_given(teacher, name, head, alpha1):
    _, student = options_of("--teacher", teacher, "--student", name, "--head", head, "--reading", "default")
    assert (student["head"], student["alpha1"]) == (head, alpha1)


def test_a_checkpoint_keeps_its_reading_unless_another_is_given(root, tmp_path):
    printed = config(root, **{**READINGS["printed"], "method": "rdd"})
    train(printed, tmp_path / "run", train_module_teacher(printed), stop_after=1)
    cases = {(): READINGS["printed"], ("--reading", "default"): READINGS["default"],
             ("--reading", "paper-weights"): READINGS["paper-weights"],
             ("--reading", "default", "--alpha1", "3.0"): {**READINGS["default"], "alpha1": 3.0}}  # fmt: skip
    for words, expected in cases.items():
        _, student = options_of("--teacher", "--student", str(tmp_path / "run" / "last.pt"), *words)
        assert {name: student[name] for name in expected} == {name: str(value) for name, value in expected.items()}, words


def test_options_of_the_model_are_the_student_s_and_a_teacher_may_have_its_own_epochs():
    words = ("--teacher", "second-cpu", "--student", "second-cpu", "--width", "0.5", "--lr", "0.002", "--epochs", "9")
    teacher, student = options_of(*words, "--teacher-epochs", "3")
    assert [teacher[k] for k in ("width", "lr", "epochs")] == ["(1.0, 1.0, 1.0)", "0.002", "3"]
    assert [student[k] for k in ("width", "lr", "epochs")] == ["(0.5, 0.5, 0.5)", "0.002", "9"]


def test_best_is_the_best_evaluation_also_after_a_stop(root, tmp_path, monkeypatch):
    scores = {2: 5.0, 4: 9.0, 6: 7.0}
    monkeypatch.setattr("runs.evaluate_detector", lambda *args, **words: {})
    for stop_after in (4, None):
        here = ({"moderate_map_3d": scores[k], "moderate_map_bev": 10 - scores[k]} for k in ((2, 4) if stop_after else (6,)))
        monkeypatch.setattr("runs.headline", lambda _, here=here: next(here))
        train(config(root, epochs=3, eval_every=1), tmp_path / "run", stop_after=stop_after)
    best, last = (read_checkpoint(tmp_path / "run" / f"{name}.pt") for name in ("best", "last"))
    assert (best["step"], best["best"], last["step"], last["best"]) == (4, 9.0, 6, 9.0)


@pytest.mark.parametrize("method", ["none", "rdd"])
def test_the_optimiser_is_told_what_the_options_and_the_schedule_say(root, tmp_path, monkeypatch, method):
    told, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args, **words):
        (group,) = optimizer.param_groups
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]))
        told.append((group["lr"], group["betas"], group["weight_decay"], float(norm)))
        return step(optimizer, *args, **words)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    cfg = config(root, method=method, epochs=3, clip=0.01, weight_decay=0.25, log_every=4, eval_every=2)
    teacher = None if method == "none" else train_module_teacher(cfg)
    train(cfg, tmp_path / "run", teacher, stop_after=3)
    train(cfg, tmp_path / "run", teacher)
    assert len(told) == 6
    for k, (lr, betas, decay, norm) in enumerate(told):
        expected_lr, beta1 = one_cycle(k, 6, cfg.lr)
        assert lr == expected_lr and betas == (beta1, 0.99) and decay == 0.25 and norm == pytest.approx(0.01, rel=1e-3)
    logged = [1, 5, 6] if method == "none" else [1, 2, 3, 4, 5, 6]  # pulls are measured about ten times a run
    assert [line["step"] for line in metrics(tmp_path / "run")] == logged
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [4, 6]


def test_seconds_leave_out_the_evaluations(root, tmp_path, monkeypatch):
    now, real = [0.0], RunFolder.evaluate
    monkeypatch.setattr("runs.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(train_module, "check_finite", lambda *args: now.__setitem__(0, now[0] + 1))

    def slow(self, *args):
        now[0] += 1000
        real(self, *args)

    monkeypatch.setattr(RunFolder, "evaluate", slow)
    train(config(root, epochs=3, eval_every=1), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["seconds"] == 6


def test_a_student_that_inherits_starts_from_its_teacher(root):
    cfg = config(root, method="hint", inherit=True, width=(0.5, 0.5, 0.5))
    teacher = train_module_teacher(replace(cfg, seed=9))  # of its own seed: equal seeds draw equal first channels
    for method in ("none", "hint"):
        student = build(replace(cfg, method=method))
        start_distilling(student.cfg, student, teacher, torch.device("cpu"))
        own, theirs = (model.encoder.conv_input.conv.weight for model in (student, teacher))
        assert own.shape[0] < theirs.shape[0] and torch.equal(own, theirs[: own.shape[0]])


@pytest.mark.parametrize(("changes", "what"), [
    ({"classes": ("Car",)}, "classes"), ({"tasks": (("Car",), ("Pedestrian", "Cyclist"))}, "task_classes"),
    ({"point_features": 3}, "point_features"), ({"head": "anchor"}, "head"),
])  # fmt: skip
def test_pairs_that_cannot_teach_are_refused(changes, what):
    a = tiny_config()
    with pytest.raises(InputError, match=f"differ in {what}"):
        train_module.check_pair(replace(a, **changes), a)


@pytest.mark.parametrize("method", ["hinton", "gid-f", "gid-l", "pp-logit", "rdd", "hint", "fg"])
def test_what_compares_anchor_with_anchor_needs_the_same_ones(method):
    student = replace(preset("second-s"), method=method)
    teacher = replace(student, anchors=((9.0, 1.6, 1.5, -1.8, 0.6, 0.45), *student.anchors[1:]))
    with nullcontext() if method in ("hint", "fg") else pytest.raises(InputError, match="differ in anchors"):
        train_module.check_pair(teacher, student)


@pytest.mark.parametrize(("changes", "hint"), [
    ({"classes": ("car", "Pedestrian", "Cyclist")}, "class 'car' .did you mean Car"),
    ({"point_features": 5}, "and 4 values a point; it has 5 values"),
    ({"classes": ("Car", "Van"), "paste": (1, 1)}, "expected classes of Car, Pedestrian, Cyclist .* class .Van."),
    ({"head": "anchor", "anchors": ((4.0, 1.6, 1.5, -1.8, 0.6, 0.45),)}, "1 anchors for 3 classes"),
    ({"voxel_size": (0.3, 0.2, 0.2)}, "expected a whole number"),
])  # fmt: skip
def test_a_preset_that_does_not_fit_is_refused_before_training(root, tmp_path, changes, hint):
    with pytest.raises(InputError, match=hint):
        train(config(root, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_width_makes_a_student_of_any_preset_with_a_folder_of_its_own():
    done = command("--teacher", "second-cpu", "--student", "second-cpu", "--width", "0.5", "--print-config")
    shown = done.stdout.split("preset ")[2]
    assert "width              (0.5, 0.5, 0.5)" in shown and "method             rdd" in shown
    cfg = replace(preset("second-cpu"), width=(0.5, 0.5, 0.5), method="rdd")
    assert train_module.run_name(cfg) == "sim-second-cpu-width0.5-rdd-seed0"
    assert train_module.run_name(preset("second-cpu")) == "sim-second-cpu-seed0"
    assert train_module.run_name(replace(preset("second-s-cpu"), method="rdd")) == "sim-second-s-cpu-rdd-seed0"


def test_a_checkpoint_s_data_set_is_taken_without_being_named(root, tmp_path):
    """A teacher trained on a KITTI root makes a KITTI student, not one that calls itself simulated; its classes stay its own."""
    train(config(root, epochs=1, fov_only=True), tmp_path / "teacher", stop_after=1)
    pair = ("--teacher", str(tmp_path / "teacher" / "last.pt"), "--student", "cp-voxel-xxs-cpu")
    assert command(*pair, "--print-config").stdout.count("data               kitti") == 2
    done = command(*pair, "--classes", "Car", "--paste", "1")
    assert done.returncode == 2 and "differ in classes" in done.stderr


def test_the_student_of_a_trained_teacher_has_its_scenes(root, tmp_path):
    """Not those in the default folder, which may be others, or made for the occasion."""
    train(config(root, epochs=1, frames=("000001", "000002"), sweeps=7), tmp_path / "teacher", stop_after=1)
    pair = ("--teacher", str(tmp_path / "teacher" / "last.pt"), "--student", "cp-voxel-xxs-cpu")
    teacher, student = options_of(*pair)
    for name in ("root", "frames", "version", "sweeps", "fov_only"):
        assert student[name] == teacher[name], name
    assert student["root"] == str(root) and student["fov_only"] == "False" and student["sweeps"] == "7"
    given = options_of(*pair, "--root", "elsewhere", "--fov-only", "--frames", "000003", "--sweeps", "1")[1]
    assert (given["root"], given["fov_only"], given["frames"], given["sweeps"]) == ("elsewhere", "True", "('000003',)", "1")
    root.rename(tmp_path / "moved")
    done = command(*pair, "--print-config")
    assert done.returncode == 2 and f"the teacher was trained on {root}, which is not there; expected the --root" in done.stderr
    assert options_of(*pair, "--root", str(tmp_path / "moved"))[1]["root"] == str(tmp_path / "moved")


def test_a_student_s_checkpoint_goes_on_with_its_own_method(root, tmp_path):
    teacher = train(config(root, epochs=1), tmp_path / "teacher", stop_after=1)
    train(config(root, epochs=1, method="hint"), tmp_path / "student", teacher, stop_after=1)
    pair = ("--teacher", str(tmp_path / "teacher" / "last.pt"), "--student", str(tmp_path / "student" / "last.pt"))
    assert "method             hint" in command(*pair, "--print-config").stdout
    assert "method             mimic" in command(*pair, "--method", "mimic", "--print-config").stdout
    alone = command(*pair[2:], "--print-config")
    assert alone.returncode == 2 and "--method hint: needs a --teacher" in alone.stderr


def test_a_loaded_teacher_is_scored_on_the_student_s_data_which_is_opened_once(root, tmp_path, monkeypatch, capsys):
    """Full nuScenes' tables take a minute and some GB to open, in every process."""
    train(config(root, epochs=1), tmp_path / "teacher", stop_after=1)
    opened, open_data = [], batch_module.open_data
    monkeypatch.setattr(batch_module, "open_data", lambda cfg, split: opened.append(split) or open_data(cfg, split))
    monkeypatch.setattr(sys, "argv", ["train.py", "--teacher", str(tmp_path / "teacher" / "last.pt"), "--student",
                                      str(tmp_path / "teacher" / "last.pt"), "--runs", str(tmp_path), "--name", "run",
                                      "--stop-after", "1"])  # fmt: skip
    capsys.readouterr()
    train_module.main()
    assert opened == ["train", "val"] and "teacher: moderate_map_3d 0.00" in capsys.readouterr().out
    train_module.main()  # a run that goes on, whose teacher has been scored
    assert opened == ["train", "val"] * 2 and "teacher: " not in capsys.readouterr().out


def test_what_stands_in_the_way_is_found_before_a_teacher_is_trained(root, tmp_path):
    """The student's folder is another run's, or the teacher's; the simulated root is mistyped; the runs folder cannot be made."""
    shared = ("--data", "kitti", "--root", str(root), "--fov-only", "off", "--runs", str(tmp_path), "--epochs", "1",
              "--point-range", "0,-4.8,-3,6.4,4.8,1")  # fmt: skip
    taken = tmp_path / "taken"
    train(config(root, epochs=1), taken, stop_after=1)
    done = command(*shared, "--teacher", "cp-voxel-cpu", "--student", "cp-voxel-xxs-cpu", "--name", "taken")
    assert done.returncode == 2 and "taken holds a run with paste" in done.stderr and "--teacher" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kitti", "taken"]  # no teacher was begun
    shutil.rmtree(*root.glob("objects-*"))
    done = command(*shared, "--teacher", "cp-voxel-xxs-cpu", "--name", "taken")
    assert done.returncode == 2 and "taken holds a run with paste" in done.stderr
    assert not list(root.glob("objects-*")), "no objects were cut out for it"
    done = command("--student", "--root", str(tmp_path / "nope"))
    assert done.returncode == 2 and "no such folder; make a simulated set there" in done.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the folder of the run cannot be made"):
        train(config(root), tmp_path / "file" / "run")


def test_the_simulated_nuscenes_is_made_on_first_use(tmp_path, monkeypatch):
    """A set of two small scenes instead of 32; its presets are nuScenes', its name its own; a step is trained on it."""
    import data.simulate_nuscenes as simulator

    real, made = simulator.simulate_nuscenes, []

    def small(root, workers):
        made.append(root)
        return real(root, 1, 1, workers=1, sweeps=1, samples=(2, 2), progress=False)

    monkeypatch.setattr(simulator, "simulate_nuscenes", small)
    monkeypatch.setitem(batch_module.DEFAULT_ROOT, "sim-nuscenes", tmp_path / "sets" / "sim-nuscenes")
    cfg, _ = train_module.resolve(train_module.DEFAULT, 1, "sim-nuscenes")
    assert (cfg.data, cfg.layout, cfg.preset, len(cfg.classes)) == ("sim-nuscenes", "nuscenes", "cp-voxel-xxs-cpu", 10)
    for _ in range(2):
        found = batch_module.prepare_data(cfg, 1)
    assert made == [tmp_path / "sets" / "sim-nuscenes"] and found.root == str(made[0])
    near = (-9.6, -19.2, -5.0, 9.6, 19.2, 3.0)
    cfg = replace(found, method="none", epochs=1, batch_size=2, sweeps=2, eval_every=1, point_range=near)
    train(cfg, tmp_path / "run")
    (scores,) = (record for record in metrics(tmp_path / "run", "eval"))
    assert {"nds", "map"} <= scores.keys()
    with pytest.raises(InputError, match="python -m data.simulate nuscenes --out nowhere"):
        batch_module.prepare_data(replace(cfg, root="nowhere"), 1)


def test_a_log_line_cut_in_two_does_not_stop_a_resume(root, tmp_path):
    cfg = config(root, epochs=2, log_every=1)
    train(cfg, tmp_path / "run", stop_after=2)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    train(cfg, tmp_path / "run")
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3, 4]
