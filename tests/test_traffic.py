"""Roads and traffic of the simulated nuScenes: nobody drives through anybody, and everybody gives way as he should."""

import itertools
import math

import numpy as np
import pytest

from data.roads import make_road
from data.scenes import Ground
from data.shapes import PART, draw_size
from data.shapes_nuscenes import SHAPES, SIZES
from data.traffic import FOOT, MAIN, SIDE, STEP, WARM_UP, Mover, Path, drive, make_world, side_path
from tests.scenes import extent

FLAT = Ground(height=0.0)


@pytest.fixture(scope="module")
def worlds():
    return [make_world(np.random.default_rng((11, seed)), 101) for seed in range(6)]


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parts_stay_inside_the_box_that_is_labelled(name):
    rng = np.random.default_rng(1)
    for _ in range(60):
        size = draw_size(name, rng, SIZES)
        parts = np.array(SHAPES[name](*size, rng), PART)
        assert (parts["half"] > 0).all()
        low, high = extent(parts)
        half = np.array(size[:2]) / 2
        assert (low[:2] > -half - 0.025).all() and (high[:2] < half + 0.025).all(), (size, low, high)
        assert low[2] > -0.03 and high[2] < size[2] + 0.02, (size, low, high)
        assert high[2] > size[2] - 0.1 and (high - low)[0] > 0.4 * size[0]  # and fill it


def test_sizes_are_nuscenes():
    """The published anchors: length, width, height of the classes that are one category."""
    for name, anchor in (("car", (4.61, 1.95, 1.72)), ("truck", (6.74, 2.46, 2.73)), ("construction", (6.38, 2.73, 3.13)),
                         ("trailer", (12.01, 2.87, 3.82))):  # fmt: skip
        rng = np.random.default_rng(0)
        drawn = np.mean([draw_size(f"vehicle.{name}", rng, SIZES) for _ in range(2000)], axis=0)
        np.testing.assert_allclose(drawn, anchor, rtol=0.03)


# ------------------------------------------------------------------ whole worlds


def areas(world, step):
    shapely = pytest.importorskip("shapely")
    from shapely import affinity

    scene, out = world.scene(step), []
    for x, y, _, length, width, _, yaw in scene.boxes:
        area = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
        out.append(affinity.translate(affinity.rotate(area, yaw, (0, 0), use_radians=True), x, y))
    return scene, out


def test_nobody_is_inside_anybody_else(worlds):
    """Bicycles stand in their rack; else two footprints share a corner at most, and the ego none."""
    for world, step in itertools.product(worlds, (0, 50, 100)):
        scene, found = areas(world, step)
        x, y, yaw, _ = world.track[step, 0]
        for (a, one), (b, other) in itertools.combinations(enumerate(found), 2):
            if not any("rack" in scene.names[k] for k in (a, b)) and "bicycle" not in (scene.names[a].split(".")[-1]):
                shared = one.intersection(other).area
                assert shared <= 0.15 * min(one.area, other.area), (scene.names[a], scene.names[b], shared)
        local = (scene.boxes[:, 0] + 1j * scene.boxes[:, 1] - complex(x, y)) * np.exp(-1j * yaw)
        assert (np.maximum(np.abs(local.real) / 2.0, np.abs(local.imag) / 0.8) > 1).all(), "somebody in the ego"


def test_motion_is_smooth_and_the_track_is_the_velocity(worlds):
    for world in worlds:
        steps = np.diff(world.track[..., :2], axis=0)
        speed = np.hypot(steps[..., 0], steps[..., 1]) / STEP
        assert np.abs(speed - world.track[1:, :, 3]).max() < 1.5, "a jump"  # corners of a path are cut a little
        change = np.diff(world.track[..., 3], axis=0) / STEP
        assert change.min() > -8.5 and change.max() < 2
        assert world.track[..., 3].min() >= 0 and world.track[..., 3].max() < 18
        a, b = world.scene(50), world.scene(51)
        np.testing.assert_allclose(b.boxes[:, :2] - a.boxes[:, :2], a.velocity * STEP, atol=0.12)
        still = len(world.names)
        assert (a.boxes[:still] == b.boxes[:still]).all() and (a.velocity[:still] == 0).all()


def test_worlds_are_mixed(worlds):
    names = set().union(*({*world.names, *(m.name for m in world.movers[1:])} for world in worlds))
    assert len(names) >= 12
    moving = [(world.track[50, 1:, 3] > 0.2).mean() for world in worlds]
    assert 0.5 < np.mean(moving) < 0.99, "nobody stops, or all queue"
    boxes = [len(world.scene(50).boxes) for world in worlds]
    assert min(boxes) > 25


def test_a_world_is_a_function_of_the_generator():
    a, b, c = (make_world(np.random.default_rng(seed), 5) for seed in (1, 1, 2))
    assert a.track.tobytes() == b.track.tobytes() and a.parts.tobytes() == b.parts.tobytes()
    assert a.parts.tobytes() != c.parts.tobytes()


# ------------------------------------------------------------------ giving way


def straight(start, end) -> Path:
    n = int(math.dist(start, end)) + 1
    return Path(FLAT, np.linspace(start[0], end[0], n), np.linspace(start[1], end[1], n))


def somebody(path, s, wanted, rank=MAIN, group=0, length=4.5, width=1.9, **more) -> Mover:
    return Mover("vehicle.car", path, s, wanted, rank, (length, width, 1.6), np.zeros(0, PART), group=group, **more)


def test_paths_are_measured_in_metres():
    angle = np.linspace(0, np.pi / 2, 200)
    path = Path(FLAT, 10 * np.cos(angle), 10 * np.sin(angle))
    assert path.s[-1] == pytest.approx(5 * np.pi, rel=1e-4)
    x, y, yaw = path.at(np.array([2.5 * np.pi]))[0]  # half way round
    assert (x, y, yaw) == pytest.approx((10 / math.sqrt(2), 10 / math.sqrt(2), 3 * np.pi / 4), abs=1e-3)


def test_one_stops_behind_a_standing_car_and_follows_a_slow_one():
    lane = straight((0, 0), (300, 0))
    for speed in (0.0, 4.0):
        track = drive([somebody(lane, 60, speed), somebody(lane, 5, 11.0, group=1)], 400)
        gap = track[:, 0, 0] - track[:, 1, 0] - 4.5
        assert gap.min() > 0.8, "drove into it"
        assert track[-1, 1, 3] == pytest.approx(track[-1, 0, 3], abs=1.0) and gap[-1] < 15


def test_one_waits_at_a_red_light_until_it_is_green():
    track = drive([somebody(straight((0, 0), (300, 0)), 5, 10.0, stops=(50.0, 9.0))], 300)
    front, t = track[:, 0, 0] + 2.25, np.arange(300) * STEP
    assert front[t < 9].max() < 50.3 and track[t < 9][-1, 0, 3] < 0.5
    assert front[-1] > 70


def test_who_walks_across_waits_for_a_car_and_a_car_brakes_for_who_is_on_the_road():
    lane, across = straight((0, 0), (300, 0)), straight((60, -6), (60, 6))
    walker = dict(rank=FOOT, group=1, length=0.7, width=0.6)
    late = drive([somebody(lane, 40, 10.0), somebody(across, 0.5, 1.4, **walker)], 240)
    meeting = np.hypot(*(late[:, 0, :2] - late[:, 1, :2]).T)
    assert meeting.min() > 2.0 and late[-1, 1, 1] > 2, "never got across"
    assert late[:, 0, 3].min() > 5, "the car had no reason to stop"
    early = drive([somebody(lane, 20, 10.0), somebody(across, 5.2, 0.8, **walker)], 240)  # he is in the lane already
    meeting = np.maximum(np.abs(early[:, 0, 0] - early[:, 1, 0]) - 2.6, np.abs(early[:, 0, 1] - early[:, 1, 1]) - 1.25)
    assert meeting.min() > -0.1, "ran over him"


def test_one_stops_where_the_path_ends():
    track = drive([somebody(straight((0, 0), (60, 0)), 5, 9.0)], 300)
    assert 57 < track[-1, 0, 0] <= 60 and track[-1, 0, 3] < 0.3


def test_a_trailer_keeps_its_distance():
    lane = straight((0, 0), (300, 0))
    track = drive([somebody(lane, 30, 8.0), somebody(lane, 22, 8.0, towed_by=0)], 100)
    np.testing.assert_allclose(track[:, 0, 0] - track[:, 1, 0], 8.0, atol=1e-6)


def test_turns_end_on_the_right_hand_side():
    """Left, right and straight on, seen from above: who leaves the main road keeps right of the side road's middle."""
    for seed in range(30):
        road, _ = make_road(np.random.default_rng(seed), 10.0)
        if road.crossing is None:
            continue
        for turn, mirrored in itertools.product((-1, 0, 1), (False, True)):
            path = side_path(road, turn, mirrored)
            end = path.at(path.s[-1:])[0]
            u, d = road.ground.to_road(*end[:2])
            out = 1 if d > 0 else -1  # which way it leaves
            assert abs(d) > 40 and (u - road.crossing) * out == pytest.approx(1.9, abs=1.2 + 0.05 * abs(d))
            assert np.abs(np.diff(path.yaw)).max() < 0.5, "a kink"
            begin = road.ground.to_road(*path.xy[0])
            assert turn == 0 or begin[1] * (-1 if mirrored else 1) < 0, "starts in the oncoming lane"
        return
    raise AssertionError("no crossing in 30 roads")


def test_queues_have_formed_before_the_first_step():
    assert WARM_UP * STEP >= 2 and SIDE > FOOT and MAIN > SIDE
