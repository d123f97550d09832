"""Batches: order, sharing among processes, classes that are no targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cli import InputError
from data import Frame
from data.batch import TrainingFrames, collate, report_dropped, steps_per_epoch, training_batches
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


def test_another_seed_is_another_order(frames):
    other = TrainingFrames(frames.frames, replace(frames.cfg, seed=5), None)
    assert ids(training_batches(frames, 0, 3)) != ids(training_batches(other, 0, 3))


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
