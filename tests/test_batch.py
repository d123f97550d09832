"""Batches: order, augmentation, sharing among processes, classes that are no targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cli import InputError
from data import Frame
from data.augment import ObjectDatabase, flip_x, flip_y, paste, rotate, scale, shift
from data.batch import (
    TrainingFrames,
    collate,
    copies,
    load,
    object_database,
    open_data,
    report_dropped,
    steps_per_epoch,
    training_batches,
)
from tests.scenes import tiny_config, tiny_frame, tiny_frames


def ids(batches):
    return [batch.ids for batch in batches]


@pytest.fixture()
def frames():
    return TrainingFrames(tiny_frames(7), tiny_config(batch_size=2, seed=4), None)


def test_every_epoch_has_an_order_of_its_own_without_repeats(frames):
    order = ids(training_batches(frames, 0, 6))
    assert [len(b) for b in order] == [2] * 6
    first, second = sum(order[:3], []), sum(order[3:], [])
    assert len(set(first)) == len(set(second)) == 6 and first != second


def test_starting_in_the_middle_gives_the_same_batches_bit_for_bit(frames):
    whole, rest = list(training_batches(frames, 0, 6)), list(training_batches(frames, 2, 6, workers=1))
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.ids == b.ids and torch.equal(a.points, b.points)
        assert all(torch.equal(x, y) for x, y in zip(a.boxes, b.boxes, strict=True))


def test_two_processes_share_every_global_batch(frames):
    whole = ids(training_batches(frames, 0, 3))
    halves = [ids(training_batches(frames, 0, 3, rank=r, world=2)) for r in (0, 1)]
    for step in range(3):
        assert sorted(halves[0][step] + halves[1][step]) == sorted(whole[step])


def test_a_frame_that_a_pass_draws_again_is_augmented_anew():
    """As class balancing draws them; and whatever the workers and the first step."""

    class Repeating(TrainingFrames):
        def order(self, epoch):  # noqa: ARG002
            return np.array([2, 5, 2, 2])

    training = Repeating(tiny_frames(7), tiny_config(batch_size=2, seed=4), None)
    scans = [batch.points[batch.points[:, 0] == b, 1:].numpy() for batch in training_batches(training, 0, 2) for b in (0, 1)]
    for scan, (index, copy) in zip(scans, ((2, 0), (5, 0), (2, 1), (2, 2)), strict=True):
        assert np.array_equal(scan, training[0, index, copy].points)
    assert not any(np.array_equal(scans[a], scans[b]) for a, b in ((0, 2), (0, 3), (2, 3)))
    (again,) = training_batches(training, 1, 2, workers=1)
    assert np.array_equal(again.points[:, 1:].numpy(), np.concatenate(scans[2:]))


def test_copies_count_how_often_an_index_has_come_before():
    indices = np.random.default_rng(0).integers(6, size=40)
    expected = [list(indices[:n]).count(index) for n, index in enumerate(indices)]
    assert copies(indices).tolist() == expected and max(expected) > 3 and len(copies(indices[:0])) == 0


def test_another_seed_is_another_order(frames):
    other = TrainingFrames(frames.frames, replace(frames.cfg, seed=5), None)
    assert ids(training_batches(frames, 0, 3)) != ids(training_batches(other, 0, 3))


# ------------------------------------------------------------------ augmentation: which options reach which function

STILL = {"flip": False, "flip_x": False, "rotation": 0.0, "scaling": 0.0, "translation": 0.0}  # a factor of 1 is drawn too
AUGMENTED = {
    "nothing": ({}, lambda f, rng: f),
    "mirror y": ({"flip": True}, lambda f, rng: flip_y(f, rng)),
    "mirror x, shift": ({"flip_x": True, "translation": 0.5}, lambda f, rng: shift(scale(flip_x(f, rng), rng, 1, 1), rng, 0.5)),
    "turn, size": ({"rotation": 0.3, "scaling": 0.05}, lambda f, rng: scale(rotate(f, rng, 0.3), rng, 0.95, 1.05)),
    "all": ({"flip": True, "flip_x": True, "rotation": 0.3, "scaling": 0.05, "translation": 0.5},
            lambda f, rng: shift(scale(rotate(flip_x(flip_y(f, rng), rng), rng, 0.3), rng, 0.95, 1.05), rng, 0.5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return ObjectDatabase.build(tmp_path_factory.mktemp("database") / "objects", tiny_frames(6), ("Car", "Pedestrian"))


def equal(a: Frame, b: Frame) -> bool:
    return a.names == b.names and np.array_equal(a.points, b.points) and np.array_equal(a.boxes, b.boxes)


@pytest.mark.parametrize("case", AUGMENTED)
def test_a_training_frame_is_augmented_by_the_options_of_its_config(case):
    """Over some epochs, so that each mirror is once drawn and once not; frame 1 of two, so that the index counts."""
    (changes, twin), frames = AUGMENTED[case], tiny_frames(2)
    training = TrainingFrames(frames, tiny_config(**{**STILL, **changes}, seed=4), None)
    got = [training[epoch, 1, 0] for epoch in range(8)]
    for epoch, frame in enumerate(got):
        assert equal(frame, twin(frames[1], np.random.default_rng((4, epoch, 1)))), epoch
    assert {equal(frame, frames[1]) for frame in got} == {"nothing": {True}, "mirror y": {True, False}}.get(case, {False})


def test_objects_of_the_database_are_pasted_first_as_many_as_the_config_says_of_each_class(database):
    """Into a scene without objects; and without a database nothing is pasted."""
    frame = replace(tiny_frame(9), boxes=np.zeros((0, 7), np.float32), names=())
    for counts, names in (((1, 2, 0), {"Car", "Pedestrian"}), ((0, 1, 0), {"Pedestrian"}), ((0, 0, 1), set())):
        cfg, wanted = tiny_config(**{**STILL, "flip": True}, paste=counts), dict(zip(("Car", "Pedestrian", "Cyclist"), counts))
        for epoch in range(4):
            rng, got = np.random.default_rng((0, epoch, 0)), TrainingFrames([frame], cfg, database)[epoch, 0, 0]
            assert equal(got, flip_y(paste(frame, rng, database, wanted), rng)) and set(got.names) == names
            assert TrainingFrames([frame], cfg, None)[epoch, 0, 0].names == ()


@pytest.mark.parametrize("cap", [{}, {"max_voxels": 50}, {"max_points": 3}], ids=["none", "voxels", "points"])
def test_under_a_cap_points_are_shuffled_last_so_that_it_cuts_what_was_pasted_no_more_than_the_rest(database, cap):
    frame = replace(tiny_frame(9), boxes=np.zeros((0, 7), np.float32), names=())
    got = TrainingFrames([frame], tiny_config(**STILL, paste=(1, 1, 0), **cap), database)[3, 0, 0]
    rng = np.random.default_rng((0, 3, 0))
    expected = scale(paste(frame, rng, database, {"Car": 1, "Pedestrian": 1}), rng, 1, 1)
    assert len(expected.points) > len(frame.points)
    if cap:
        in_order, expected = expected, replace(expected, points=rng.permutation(expected.points))
        assert not np.array_equal(got.points, in_order.points)
    assert equal(got, expected)


def test_collate_numbers_scans_and_leaves_other_classes_out():
    frame = replace(tiny_frame(1), names=("Van", "Pedestrian"))
    empty = Frame("e", np.zeros((0, 4), np.float32), np.zeros((0, 7), np.float32), ())
    batch = collate([tiny_frame(0), empty, frame], tiny_config())
    assert batch.points.shape[1] == 5 and set(batch.points[:, 0].tolist()) == {0.0, 2.0}
    assert [k.tolist() for k in batch.labels] == [[0, 1], [], [1]]
    assert torch.equal(batch.boxes[2], torch.from_numpy(frame.boxes[1:]))
    assert len(batch) == 3 and batch.to(torch.device("cpu")).ids == batch.ids


def test_dropped_points_are_reported_once(capsys):
    batch, told = collate([replace(tiny_frame(0), dropped=3)], tiny_config()), set()
    report_dropped(batch, told)
    report_dropped(batch, told)
    said = capsys.readouterr()
    assert (said.out + said.err).count("frame 000000: 3 points are NaN or infinite") == 1


def test_refusals():
    with pytest.raises(InputError, match="more than the 3 training frames"):
        steps_per_epoch(3, 4)
    with pytest.raises(InputError, match="frame 000000: expected 5 values a point, found 4"):
        collate(tiny_frames(1), tiny_config(point_features=5))
    with pytest.raises(InputError, match="without velocities, and 4 values a point; it has velocities"):
        open_data(tiny_config(velocity=True, code_weights=(1.0,) * 10), "train")


# ---------------------------------------------------------------- the objects to paste


class Listed(list):
    ids = ("a", "b")


def test_objects_are_cut_out_once_by_the_first_process_for_which_the_others_wait(tmp_path, monkeypatch):
    import data.batch as module

    frames, cfg = Listed(tiny_frames(6)), tiny_config(root=str(tmp_path), paste=(1, 1, 0))
    waited = []

    def first_process(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            monkeypatch.setenv("LOCAL_RANK", "0")
            object_database(cfg, frames, tmp_path / "runs")
            monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(module.time, "sleep", first_process)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(object_database(cfg, frames, tmp_path / "runs")) > 0 and len(waited) == 2
    monkeypatch.setattr(ObjectDatabase, "build", None)
    assert len(object_database(cfg, frames, tmp_path / "runs")) > 0, "the second time they are there"
    assert object_database(replace(cfg, paste=(0, 0, 0)), frames, tmp_path) is None


def test_objects_of_other_classes_are_cut_out_for_themselves(tmp_path):
    frames, cfg = Listed(tiny_frames(6)), tiny_config(root=str(tmp_path), paste=(1,))
    for name in ("Car", "Pedestrian", "Car"):
        assert set(object_database(replace(cfg, classes=(name,)), frames, tmp_path).names) == {name}


def test_objects_in_the_spare_folder_are_those_of_their_root(tmp_path):
    """Two sets that cannot be written to, whose frames have the same names: KITTI, and a corrupted copy of it."""
    sizes = []
    for name, offset in (("one", 0.0), ("other", 1.0)):
        (tmp_path / name).write_text("a root in which no folder can be made")
        frames = Listed([replace(frame, boxes=frame.boxes + np.float32([0, 0, 0, offset, 0, 0, 0])) for frame in tiny_frames(6)])
        database = object_database(tiny_config(root=str(tmp_path / name), paste=(1, 1, 0)), frames, tmp_path / "runs")
        sizes.append(database.boxes[:, 3].max())
    assert sizes[1] == pytest.approx(sizes[0] + 1)


def test_objects_of_data_that_cannot_be_written_to_are_kept_in_the_spare_folder(tmp_path):
    (tmp_path / "file").write_text("a root in which no folder can be made")
    frames, cfg = Listed(tiny_frames(6)), tiny_config(root=str(tmp_path / "file"), paste=(1, 1, 0))
    first, again = (object_database(cfg, frames, tmp_path / "runs") for _ in range(2))
    assert np.array_equal(first.points, again.points) and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_frame_is_one_line_whoever_reads_it(workers):
    class Broken(list):
        def __getitem__(self, i):
            raise InputError(f"{i}.bin: expected 16 bytes a point, found 3: broken?")

    state = torch.get_rng_state()
    with pytest.raises(InputError, match=r"^3\.bin: expected 16 bytes a point, found 3: broken\?$"):
        list(load(Broken(range(9)), [[3, 4], [5]], tiny_config(), workers))
    assert torch.equal(torch.get_rng_state(), state)
