"""Traffic: a street in which time passes.   (after: roads.py; next: simulate_nuscenes.py)

`make_world` furnishes a stretch of road and lets traffic loose on it: the car that carries the sensor (the ego), others in lanes,
crossing and turning, cyclists, people. Everybody has a path and goes along it as fast as it likes and the way ahead allows: one
brakes for what stands or moves within the strip that one is about to sweep, those who cross or turn also for where others will be
within two seconds, before a red light and at the end of the path. Who touches somebody all the same is taken out of the world.
`World.scene(step)` is what a scanner can see 20 times a second. Frame: that of the street, z up, metres, seconds.
dims: T steps · M movers (0 is the ego) · K places ahead of a mover · S objects that never move
"""

import math
from dataclasses import dataclass

import numpy as np

from data.roads import PAVEMENT, Road, furnish, make_road
from data.scenes import Ground, Scene, apart, placed
from data.shapes import PART, draw_size
from data.shapes_nuscenes import SHAPES, SIZES, ego

STEP = 0.05  # s, a turn of the scanner
WARM_UP = 60  # steps before the first that counts: queues have formed by then
FAR = 140.0  # m, how far the side roads go
EGO = (4.08, 1.73, 1.56)  # m
MAIN, SIDE, FOOT = 2, 1, 0  # who gives way to whom


class Path:
    """A line on the ground, by its length."""

    def __init__(self, ground: Ground, u: np.ndarray, d: np.ndarray) -> None:
        self.xy = np.array([ground.from_road(a, b)[:2] for a, b in zip(u, d)])  # (n, 2)
        steps = np.diff(self.xy, axis=0)
        self.s = np.r_[0, np.cumsum(np.hypot(*steps.T))]  # (n,)
        self.yaw = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        self.middle = (self.s[1:] + self.s[:-1]) / 2

    def at(self, s: np.ndarray) -> np.ndarray:
        """(k,) -> (k, 3) x, y, yaw; its ends beyond them."""
        x, y = (np.interp(s, self.s, column) for column in self.xy.T)
        return np.stack([x, y, np.interp(s, self.middle, self.yaw)], axis=-1)


@dataclass
class Mover:
    name: str  # of SHAPES
    path: Path
    s: float  # m along the path
    wanted: float  # m/s
    rank: int
    size: tuple[float, float, float]
    parts: np.ndarray
    stops: tuple[float, float] = (math.inf, 0.0)  # at this place of the path, until that time: a light, a bus stop
    towed_by: int = -1  # the mover whose trailer, or rear section, this is
    group: int = -1  # who moves as one


@dataclass
class World:
    """boxes (S, 7) and names of what never moves; movers with their tracks (T, M, 4): x, y, yaw, speed."""

    ground: Ground
    parts: np.ndarray  # (P,) PART of what never moves
    boxes: np.ndarray
    names: tuple[str, ...]
    movers: list[Mover]
    track: np.ndarray

    def scene(self, step: int) -> Scene:
        """The world at a step; objects: first those that never move, then the movers without the ego."""
        parts, boxes, velocity = [self.parts], [*self.boxes], [(0.0, 0.0)] * len(self.boxes)
        for k, (mover, (x, y, yaw, speed)) in enumerate(zip(self.movers, self.track[step].tolist())):
            z = float(self.ground.z(x, y))
            parts.append(placed(mover.parts, x, y, z, yaw, len(boxes) if k else -1))
            if k:
                yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
                boxes.append((x, y, z + mover.size[2] / 2, *mover.size, yaw))
                velocity.append((speed * math.cos(yaw), speed * math.sin(yaw)))
        names = (*self.names, *(mover.name for mover in self.movers[1:]))
        return Scene(self.ground, np.concatenate(parts), np.array(boxes).reshape(-1, 7), names, np.array(velocity).reshape(-1, 2))


def lane_path(road: Road, d: float, forward: bool) -> Path:
    """Along the road at d, in the direction of u or against it."""
    u = np.arange(road.low, road.high + 40, 1.0)
    return Path(road.ground, u if forward else u[::-1], np.full(len(u), d))


def lane_user(rng: np.random.Generator) -> str:
    """Who drives in a lane."""
    kinds = ("vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.bus.bendy", "with_rider.vehicle.motorcycle",
             "vehicle.construction")  # fmt: skip
    return str(rng.choice(kinds, p=(0.68, 0.13, 0.06, 0.03, 0.08, 0.02)))


def add_mover(movers: list[Mover], road: Road, standing: np.ndarray, name: str, path: Path, s: float, wanted: float, rank: int,
              stops: tuple[float, float] = (math.inf, 0.0), sweep: float = 0.0) -> bool:  # fmt: skip
    """Somebody new on a path, unless what stands is in the way of the first `sweep` metres, or the place is taken."""
    size = draw_size(name, road.rng, SIZES)
    for x, y, yaw in path.at(np.arange(s, s + sweep + 1, max(size[0] / 2, 1.0))):
        if not apart(np.array([x, y, size[0], size[1] + 0.2, yaw]), standing).all():
            return False
    taken = np.array([[*other.path.at(other.s)[:2], *other.size[:2], other.path.at(other.s)[2]] for other in movers])
    x, y, yaw = path.at(s)
    if len(taken) and not apart(np.array([x, y, size[0], size[1], yaw]), taken, 0.3).all():
        return False
    parts = np.array(SHAPES[name](*size, road.rng), PART)
    movers.append(Mover(name, path, s, wanted, rank, size, parts, stops, group=len(movers)))
    return True


def add_towed(movers: list[Mover], road: Road, standing: np.ndarray, name: str) -> None:
    """A trailer behind the last mover, or the second section of a bendy bus; without room for it the first one goes alone."""
    first, index = movers[-1], len(movers) - 1
    size = draw_size(name, road.rng, SIZES)
    back = (first.size[0] + size[0]) / 2 + 0.5
    if first.s > back and add_mover(movers, road, standing, name, first.path, first.s - back, first.wanted, first.rank):
        towed = movers[-1]
        towed.s, towed.towed_by, towed.group = first.s - (first.size[0] + towed.size[0]) / 2 - 0.5, index, first.group


def add_lanes(movers: list[Mover], road: Road, standing: np.ndarray) -> None:
    """Both directions, lane by lane, with gaps between the vehicles; cyclists beside them."""
    rng, street = road.rng, road.street
    for forward in (True, False):
        for lane in range(road.lanes):
            path = lane_path(road, (-1 if forward else 1) * (lane + 0.5) * road.lane, forward)
            start = road.low if forward else road.high + 40  # u where the path begins
            stops = (math.inf, 0.0) if road.crossing is None else (abs(road.crossing - start) - 7.0, road.red_until)
            s = rng.uniform(0, 30)
            while s < path.s[-1] - 10:
                name = lane_user(rng)
                wanted = rng.uniform(4, 13) if rng.random() < 0.9 else rng.uniform(0, 2)
                bus_stop = (s + rng.uniform(10, 60), 99.0) if "bus" in name and rng.random() < 0.5 else stops
                if add_mover(movers, road, standing, name, path, s, wanted, MAIN, bus_stop):
                    if name == "vehicle.bus.bendy":
                        add_towed(movers, road, standing, name)
                    elif name == "vehicle.truck" and rng.random() < 0.35:
                        add_towed(movers, road, standing, "vehicle.trailer")
                s += 14 + SIZES[name][0][0] + rng.exponential(260 / (street.driving + 2))
        for _ in range(rng.poisson(street.cycling * 0.35)):
            path = lane_path(road, (-1 if forward else 1) * road.strip, forward)
            name = "with_rider.vehicle.bicycle"
            add_mover(movers, road, standing, name, path, rng.uniform(0, path.s[-1]), rng.uniform(2, 6.5), SIDE, sweep=40)


def side_path(road: Road, turn: int, mirrored: bool) -> Path:
    """Across the main road at the crossing (turn 0), or from it to the right (-1) or left (1); mirrored: the other way."""
    shift = 1.9  # m from the side road's middle
    if turn == 0:
        d = np.arange(-FAR, FAR, 1.0)
        u = np.full(len(d), shift)
    else:
        lane = -0.5 * road.lane if turn > 0 else -(road.lanes - 0.5) * road.lane
        radius, u_end = (6.0, shift) if turn > 0 else (4.5, -shift)
        angle = np.linspace(0, np.pi / 2, 14)
        u = np.r_[np.arange(-60, u_end - radius, 1.0), u_end - radius + radius * np.sin(angle), np.full(int(FAR), u_end)]
        arc = lane + turn * radius * (1 - np.cos(angle))
        beyond = lane + turn * (radius + np.arange(1, FAR + 1))
        d = np.r_[np.full(len(u) - len(arc) - len(beyond), lane), arc, beyond]
    sign = -1 if mirrored else 1
    return Path(road.ground, road.crossing + sign * u, sign * d)


def add_crossing(movers: list[Mover], road: Road, standing: np.ndarray) -> None:
    """Who crosses the main road, or leaves it, at the crossing."""
    rng = road.rng
    for _ in range(rng.poisson(7)):
        turn, mirrored = int(rng.choice([0, 0, -1, 1])), rng.random() < 0.5
        path = side_path(road, turn, mirrored)
        name = str(rng.choice(["vehicle.car", "vehicle.truck", "with_rider.vehicle.motorcycle", "with_rider.vehicle.bicycle"],
                              p=(0.72, 0.08, 0.08, 0.12)))  # fmt: skip
        stops = (math.inf, 0.0)
        if turn == 0 and road.red_until == 0:  # the side road waits
            stops = (FAR - road.ground.half_road - 2.0, rng.uniform(0, 20))
        s = rng.uniform(0, 70) + (0 if turn else FAR - 75)
        add_mover(movers, road, standing, name, path, s, rng.uniform(3, 8), SIDE, stops, sweep=60)


def add_walkers(movers: list[Mover], road: Road, standing: np.ndarray, stretch: float) -> None:
    """Along the pavements, alone and in groups, and across the road."""
    rng, half = road.rng, road.ground.half_road
    for _ in range(rng.poisson(road.street.walking * 0.9 * stretch)):
        u, forward = rng.uniform(road.low, road.high), rng.random() < 0.5
        side, speed = rng.choice([-1, 1]), rng.uniform(0.7, 1.8)
        kind = "human.pedestrian." + str(rng.choice(["adult", "child", "construction_worker"], p=(0.88, 0.08, 0.04)))
        if rng.random() < 0.25:  # across
            d = np.arange(-half - 3.5, half + 3.5, 0.5)
            path = Path(road.ground, u + np.linspace(0, rng.normal(0, 2), len(d)), d * side)
            add_mover(movers, road, standing, kind, path, rng.uniform(0, 3.5 + half), speed, FOOT, sweep=2 * half)
            continue
        d, s = side * (half + rng.uniform(*PAVEMENT)), u - road.low if forward else road.high + 40 - u
        stops = (s + rng.uniform(1, 12), 99.0) if rng.random() < 0.2 else (math.inf, 0.0)
        for _ in range(1 + rng.poisson(0.5)):
            path = lane_path(road, d, forward)
            add_mover(movers, road, standing, kind, path, s, speed, FOOT, stops, sweep=speed * 14)
            d, s, speed = d + rng.choice([-0.8, 0.8]), s + rng.normal(0, 0.2), speed + rng.normal(0, 0.1)


def drive(movers: list[Mover], steps: int, ahead: int = 16) -> np.ndarray:
    """Let everybody move for a number of steps: (T, M, 4) x, y, yaw, speed. One looks at `ahead` places of the own path, as far
    as one needs for braking gently, and keeps a speed from which the free part of it is enough to stop at 2.5 m/s²."""
    size = np.array([m.size for m in movers])
    half, width = size[:, 0] / 2, size[:, 1]
    rank, group = np.array([m.rank for m in movers]), np.array([m.group for m in movers])
    ends = np.array([m.path.s[-1] for m in movers])
    wish, stop_at = np.array([m.wanted for m in movers]), np.array([m.stops for m in movers])
    towed = [(k, m.towed_by, movers[m.towed_by].s - m.s) for k, m in enumerate(movers) if m.towed_by >= 0]
    s, v = np.array([m.s for m in movers]), wish.copy()
    margin, keep = np.where(rank == FOOT, 0.05, 0.3), np.where(rank == FOOT, 0.3, 1.8)
    other = group[:, None] != group
    gives_way = other & (rank[:, None] < rank)
    track = np.zeros((steps, len(movers), 4))
    for t in range(steps):
        reach = (3 + 1.5 * v + v * v / 5)[:, None] * np.linspace(1 / ahead, 1, ahead)  # (M, K) m ahead of each nose
        asked = np.concatenate([s[:, None] + v[:, None] * [0, 1, 2], (s + half)[:, None] + reach], axis=1)
        found = np.stack([m.path.at(a) for m, a in zip(movers, asked)])  # (M, 3 + K, 3)
        track[t] = np.c_[found[:, 0], v]
        blocked = np.zeros(reach.shape, bool)
        for k, pairs in enumerate((other, gives_way, gives_way)):  # where the others are, and in one and two seconds
            x, y, yaw = found[:, k].T
            dx, dy = found[:, 3:, :1] - x, found[:, 3:, 1:2] - y  # (M, K, M)
            along = np.abs(dx * np.cos(yaw) + dy * np.sin(yaw)) < half + reach[:, :1, None] / 2 + 0.1
            across = np.abs(dy * np.cos(yaw) - dx * np.sin(yaw)) < (width[:, None, None] + width) / 2 + margin[:, None, None]
            blocked |= (along & across & pairs[:, None]).any(-1)
        room = np.where(blocked.any(1), reach[np.arange(len(s)), blocked.argmax(1)] - reach[:, 0] / 2 - keep, 1e3)
        light = stop_at[:, 0] - s - half
        room = np.minimum(room, ends - s)
        room = np.where((t * STEP < stop_at[:, 1]) & (light > -0.5), np.minimum(room, light), room)
        pace = wish * (1 + 0.2 * np.sin(0.6 * t * STEP + np.arange(len(s))))
        target = np.minimum(pace, np.sqrt(5 * np.maximum(room, 0)))
        v = np.maximum(np.clip(target, v - 8 * STEP, v + 1.6 * STEP), 0)
        v = np.minimum(v, (ends - s) / STEP)
        s = s + v * STEP
        for k, leader, back in towed:
            s[k], v[k] = s[leader] - back, v[leader]
    return track


def colliding(movers: list[Mover], track: np.ndarray) -> set[int]:
    """Movers that come closer to another one than their sizes allow, at any time; of two, the later one, and its group."""
    size, group, gone = np.array([m.size[:2] for m in movers]) - 0.1, np.array([m.group for m in movers]), set()
    for row in track[::3]:
        rects = np.c_[row[:, :2], size, row[:, 2]]
        for i in range(len(movers) - 1):
            if i not in gone:
                met = ~apart(rects[i], rects[i + 1 :]) & (group[i + 1 :] != group[i])
                gone |= {i + 1 + int(k) for k in np.flatnonzero(met)}
    groups = {movers[k].group for k in gone}
    return {k for k, m in enumerate(movers) if m.group in groups}


def make_world(rng: np.random.Generator, steps: int) -> World:
    """A furnished street and all its traffic over a number of steps: a function of the generator alone."""
    road, speed = make_road(rng, (steps + WARM_UP) * STEP)
    builder = furnish(road)
    standing = np.array(builder.footprints[1:])  # without the place that was kept for the ego
    path = lane_path(road, road.ground.offset, True)
    stops = (road.crossing - road.low - 7.0, road.red_until) if road.crossing is not None else (math.inf, 0.0)
    movers = [Mover("ego", path, -road.low, speed, MAIN, EGO, np.array(ego(), PART), stops, group=0)]
    add_lanes(movers, road, standing)
    if road.crossing is not None:
        add_crossing(movers, road, standing)
    add_walkers(movers, road, standing, (road.high - road.low) / 123)
    track = drive(movers, WARM_UP + steps)[WARM_UP:]
    gone = colliding(movers, track)
    kept = [k for k in range(len(movers)) if k not in gone]
    parts = np.concatenate(builder.parts)
    return World(road.ground, parts, np.array(builder.boxes).reshape(-1, 7), tuple(builder.names),
                 [movers[k] for k in kept], track[:, kept])  # fmt: skip
