"""stops.py: a run trained in slices is the run trained at once, and what its command takes is checked."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import train as loop
from cli import InputError
from detector import build
from presets import READINGS
from stops import look, open_teacher, stop_steps, stops, student_config
from tests.scenes import tiny_config
from tests.test_train import config, root, same, train_module_teacher  # noqa: F401 (root is a fixture)
from weights import read_checkpoint


@pytest.fixture()
def pair(root):  # noqa: F811
    torch.set_num_threads(1)
    cfg = config(root, method="rdd", epochs=3)  # 4 frames in batches of 2: 6 steps
    return cfg, train_module_teacher(cfg)


def weights(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def test_slices_are_the_run_trained_at_once(pair, tmp_path):
    cfg, teacher = pair
    whole = loop.train(cfg, tmp_path / "whole", teacher)
    found = list(stops(cfg, tmp_path / "slices", teacher, [1, 4, 6]))
    assert [stop.step for stop in found] == [1, 4, 6]
    assert same(weights(found[-1].detector), weights(whole))
    assert same(found[-1].distil, read_checkpoint(tmp_path / "whole" / "last.pt")["distil"])
    at_4 = loop.train(cfg, tmp_path / "to-4", teacher, stop_after=4)
    assert same(weights(found[1].detector), weights(at_4)) and not same(weights(found[0].detector), weights(at_4))
    assert all(not stop.detector.training for stop in found)
    assert not any(p.requires_grad for stop in found for p in stop.detector.parameters())


def test_a_stop_is_kept_and_a_killed_command_goes_on(pair, tmp_path, monkeypatch):
    cfg, teacher = pair
    first = next(stops(cfg, tmp_path / "run", teacher, [2, 4, 6]))
    rest = list(stops(cfg, tmp_path / "run", teacher, [2, 4, 6]))
    assert same(weights(rest[0].detector), weights(first.detector)) and [stop.step for stop in rest] == [2, 4, 6]
    monkeypatch.setattr(loop, "train", lambda *args, **options: pytest.fail("nothing is left to train"))
    again = list(stops(cfg, tmp_path / "run", teacher, [2, 4, 6]))
    assert all(same(weights(a.detector), weights(b.detector)) for a, b in zip(rest, again, strict=True))
    with pytest.raises(InputError, match="at step 6 and kept nothing at step 3; pass the --stops it was made with"):
        next(stops(cfg, tmp_path / "run", teacher, [3, 6]))
    with pytest.raises(InputError, match="holds a run with lr"):
        next(stops(replace(cfg, lr=1e-4), tmp_path / "run", teacher, [2]))


def test_a_kept_stop_is_not_handed_out_under_another_teacher(pair, tmp_path, monkeypatch):
    """All stops are there, so nothing is trained, and nothing else would see that the pair is another."""
    cfg, teacher = pair
    list(stops(cfg, tmp_path / "run", teacher, [2, 4]))
    other = train_module_teacher(cfg)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    monkeypatch.setattr(loop, "train", lambda *args, **options: pytest.fail("nothing is left to train"))
    with pytest.raises(InputError, match="stop-2.pt: learned from another teacher than --teacher"):
        next(stops(cfg, tmp_path / "run", other, [2, 4]))
    assert [stop.step for stop in stops(cfg, tmp_path / "run", teacher, [2, 4])] == [2, 4]


def test_without_a_method_there_is_nothing_of_its_own(pair, tmp_path):
    cfg = replace(pair[0], method="none")
    (stop,) = stops(cfg, tmp_path / "run", None, [1])
    assert stop.distil == {} and look(tmp_path / "run" / "last.pt").step == 1


def test_steps_are_at_equal_distances_and_end_with_the_run(pair):
    cfg, _ = pair
    assert stop_steps(cfg, 1) == [6] and stop_steps(cfg, 3) == [2, 4, 6] and stop_steps(cfg, 4) == [1, 3, 4, 6]
    for wrong in (0, 7):
        with pytest.raises(InputError, match=f"--stops {wrong}: expected 1 to 6, the steps of the run"):
            stop_steps(cfg, wrong)


def test_the_students_config_is_its_preset_on_the_teachers_data(tmp_path):
    teacher = tiny_config(data="kitti", root=str(tmp_path), frames=("000001",), fov_only=False)
    cfg = student_config("cp-voxel-xxs-cpu", Namespace(reading="printed", workers=0, root="there", epochs=2), teacher)
    assert (cfg.data, cfg.root, cfg.method, cfg.epochs, cfg.normalise) == ("kitti", "there", "rdd", 2, "softmax")
    cfg = student_config("cp-voxel-xxs-cpu", Namespace(reading=None, workers=0, fov_only=True), teacher)
    assert (cfg.root, cfg.frames, cfg.fov_only) == (str(tmp_path), ("000001",), True)
    nuscenes = student_config("cp-voxel-xxs-cpu", Namespace(reading="default", workers=0, data="nuscenes"), teacher)
    assert nuscenes.data == "nuscenes" and len(nuscenes.classes) == 10 and nuscenes.normalise == "none"
    with pytest.raises(InputError, match="unknown preset 'cp-voxel-xx-cpu' .did you mean cp-voxel-xxs-cpu"):
        student_config("cp-voxel-xx-cpu", Namespace(reading="default", workers=0), teacher)


def test_a_checkpoint_is_looked_at_as_it_was_trained_unless_a_reading_is_given(pair, tmp_path):
    cfg, teacher = replace(pair[0], **READINGS["printed"]), pair[1]
    list(stops(cfg, tmp_path / "run", teacher, [1]))
    for reading, normalise in ((None, "softmax"), ("default", "none")):
        given = Namespace(reading=reading, workers=0)
        assert student_config(str(tmp_path / "run" / "last.pt"), given, cfg).normalise == normalise


def test_a_teacher_is_a_checkpoint(pair, tmp_path):
    list(stops(pair[0], tmp_path / "run", pair[1], [1]))
    teacher = open_teacher(str(tmp_path / "run" / "last.pt"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert weights(teacher).keys() == weights(build(pair[0])).keys()
    with pytest.raises(InputError, match="train one first: python train.py --teacher cp-voxel-cpu"):
        open_teacher("cp-voxel-cpu")
    with pytest.raises(InputError, match="no such checkpoint"):
        open_teacher(str(tmp_path / "nowhere.pt"))
