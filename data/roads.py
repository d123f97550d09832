"""A road, and what stands along it and never moves.   (after: scenes.py, shapes_nuscenes.py; next: traffic.py)

The roads of the simulated nuScenes have marked lanes, a strip for cyclists, parking bays and a pavement that clutter keeps free:
traffic.py lets people and vehicles go there. The frame is the street's, z up; u runs along the road, d across it to the left.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from data.scenes import CLUTTER_NAMES, STREETS, Builder, Ground, Street, add_roadsides, make_ground
from data.shapes import draw_size
from data.shapes_nuscenes import SHAPES, SIZES

PAVEMENT = (1.1, 2.9)  # m from the kerb, where people walk and no clutter stands


@dataclass
class Road:
    """A street's cross section, and the crossing if there is one."""

    ground: Ground
    street: Street
    lanes: int  # in each direction
    lane: float  # m, width of one
    low: float  # the furnished stretch, m along it
    high: float
    crossing: float | None
    red_until: float  # s; the main road's light at the crossing
    rng: np.random.Generator

    @property
    def strip(self) -> float:
        """d of the cyclists."""
        return self.lanes * self.lane + 0.45


def make_road(rng: np.random.Generator, seconds: float) -> tuple[Road, float]:
    """A road, and how fast the ego would like to go on it, m/s."""
    street = STREETS[rng.choice(len(STREETS), p=(0.3, 0.15, 0.3, 0.1, 0.15))]
    speed = 0.0 if rng.random() < 0.15 else rng.uniform(3, 12)
    lanes, lane = 1 + int(street.half_road[1] >= 8 and rng.random() < 0.7), rng.uniform(3.2, 3.6)
    half = lanes * lane + 1.0 + (2.4 if street.parked > 0.1 else 0)
    crossing = rng.uniform(20, max(30, speed * seconds)) if rng.random() < 0.5 else None
    offset = -(rng.integers(lanes) + 0.5) * lane
    ground = replace(make_ground(street, rng), curvature=rng.normal(0, 0.0012), offset=offset, half_road=half, height=0.0)
    if crossing is not None:
        ground = replace(ground, curb=0.0)
    red = rng.uniform(0, seconds) if rng.random() < 0.5 else 0.0
    return Road(ground, street, lanes, lane, -75.0, 85.0 + speed * seconds, crossing, red, rng), speed


def furnish(road: Road) -> Builder:
    """Parked vehicles, road works, racks, people who stay, houses, trees, clutter."""
    rng, half, street = road.rng, road.ground.half_road, road.street
    builder = Builder(road.ground, rng, SIZES, SHAPES)
    if road.crossing is not None:  # kept free until everything stands
        x, y, yaw = road.ground.from_road(road.crossing, 0.0)
        side_road = (x, y, 300.0, 9.5, road.ground.heading + math.pi / 2)
        builder.footprints.append(side_road)
    stretch = (road.high - road.low) / 123  # rates are those of KITTI's scenes, which are 123 m long
    for side in (-1, 1):
        add_parked(builder, road, side)
        if rng.random() < 0.45:
            add_works(builder, road, side)
        if rng.random() < 0.45:  # a row of barriers along the kerb
            u = rng.uniform(road.low + 20, road.high - 40)
            for k in range(rng.integers(4, 14)):
                builder.add_object("movable_object.barrier", u + 2.9 * k, side * (half + 0.55), math.pi / 2 + rng.normal(0, 0.04))
    for _ in range(rng.poisson(0.6 * stretch)):
        add_rack(builder, rng.uniform(road.low, road.high), rng.choice([-1, 1]) * (half + rng.uniform(4, 5)))
    add_bystanders(builder, road, stretch)
    add_roadsides(builder, street, half, road.low - 5, road.high)
    for name, mean in zip(CLUTTER_NAMES, street.clutter):
        for _ in range(rng.poisson(mean * stretch)):
            at = rng.uniform(0.25, 0.9) if rng.random() < 0.35 else PAVEMENT[1] + 0.3 + rng.gamma(1.2, 1.8)
            turn = rng.choice([0, np.pi / 2, np.pi]) + rng.normal(0, 0.1)
            builder.add_clutter(name, rng.uniform(road.low, road.high), rng.choice([-1, 1]) * (half + at), turn)
    if road.crossing is not None:
        builder.footprints.remove(side_road)
    return builder


def add_parked(builder: Builder, road: Road, side: int) -> None:
    """A row beside the lanes, and two-wheelers at the kerb."""
    rng, half, density = road.rng, road.ground.half_road, road.street.parked * road.rng.uniform(0, 1.6)
    kinds = ("vehicle.car", "vehicle.truck", "vehicle.trailer", "vehicle.bus.rigid", "vehicle.construction")
    u = road.low + rng.uniform(0, 6)
    while u < road.high:
        name = str(rng.choice(kinds, p=(0.9, 0.06, 0.015, 0.015, 0.01)))
        if rng.random() < density:
            flip = math.pi if rng.random() < (0.1 if side < 0 else 0.85) else 0.0
            d = side * (half - 1.2 + rng.normal(0, 0.06) if road.street.parked > 0.1 else half + 1.6)
            builder.add_object(name, u + SIZES[name][0][0] / 2, d, flip + rng.normal(0, 0.025))
        u += SIZES[name][0][0] + rng.uniform(0.8, 2.5)
    for _ in range(rng.poisson(1.5)):
        u, kind = rng.uniform(road.low, road.high), str(rng.choice(["vehicle.motorcycle", "vehicle.bicycle"]))
        for k in range(rng.integers(1, 5)):
            turn = side * math.pi / 2 + rng.normal(0, 0.15)
            builder.add_object(kind, u + 1.0 * k, side * (half + 1.0 + PAVEMENT[1]), turn)


def add_works(builder: Builder, road: Road, side: int) -> None:
    """Road works on the shoulder: a row of cones or barriers, behind it a machine, workers, heaps."""
    rng, half = road.rng, road.ground.half_road
    u, length = rng.uniform(road.low + 25, road.high - 60), rng.uniform(12, 30)
    d = half - 1.9 if road.street.parked > 0.1 else half + 0.5
    if rng.random() < 0.7:
        builder.add_object("vehicle.construction", u + length / 2, side * (d + 2.6), rng.choice([0, np.pi]) + rng.normal(0, 0.3))
    name, step = ("movable_object.trafficcone", 2.2) if rng.random() < 0.6 else ("movable_object.barrier", 2.9)
    for at in np.arange(0, length, step):
        builder.add_object(name, u + at, side * d, math.pi / 2 + rng.normal(0, 0.06))
    for _ in range(rng.integers(1, 5)):
        builder.add_object("human.pedestrian.construction_worker", u + rng.uniform(0, length), side * (d + rng.uniform(0.9, 4)),
                           rng.uniform(-3, 3))  # fmt: skip
    for name, mean in (("movable_object.debris", 1.0), ("movable_object.trafficcone", 2.0)):
        for _ in range(rng.poisson(mean)):
            builder.add_object(name, u + rng.uniform(0, length), side * (d + rng.uniform(0.7, 4)), rng.uniform(-3, 3))


def add_rack(builder: Builder, u: float, d: float) -> None:
    """A rack with bicycles; of some racks the bicycles are labelled too, one by one."""
    if not builder.add_object("static_object.bicycle_rack", u, d, 0.0):
        return
    rng, row, length = builder.rng, len(builder.names) - 1, builder.boxes[-1][3]
    labelled = rng.random() < 0.3
    for at in np.arange(-length / 2 + 0.45, length / 2 - 0.4, 0.7):
        if rng.random() < 0.6:
            turn = math.pi / 2 + rng.choice([0, np.pi]) + rng.normal(0, 0.05)
            if labelled:
                builder.add_object("vehicle.bicycle", u + at, d, turn, check=False)
            else:
                x, y, yaw = builder.ground.from_road(u + at, d)
                size = draw_size("vehicle.bicycle", rng, SIZES)
                builder.put(SHAPES["vehicle.bicycle"](*size, rng), x, y, yaw + turn, owner=row)


def add_bystanders(builder: Builder, road: Road, stretch: float) -> None:
    """People who stand or sit, bins and heaps."""
    rng, half = road.rng, road.ground.half_road
    for _ in range(rng.poisson(road.street.walking * 0.25 * stretch)):
        u, d = rng.uniform(road.low, road.high), rng.choice([-1, 1]) * (half + rng.uniform(0.4, 6))
        for _ in range(1 + rng.poisson(0.8)):
            builder.add_object("human.pedestrian.adult", u, d, rng.uniform(-3, 3))
            u, d = u + rng.normal(0, 0.7), d + rng.normal(0, 0.7)
    means = {"sitting.human.pedestrian.adult": 1.2, "movable_object.pushable_pullable": 2.0, "movable_object.debris": 0.7,
             "movable_object.trafficcone": 1.0, "vehicle.trailer": 0.35}  # fmt: skip
    for name, mean in means.items():
        for _ in range(rng.poisson(mean * stretch)):
            side, away = rng.choice([-1, 1]), 5.5 if name == "vehicle.trailer" else rng.uniform(0.5, 5)
            turn = side * -np.pi / 2 if name.startswith("sitting") else rng.choice([0, np.pi])
            builder.add_object(name, rng.uniform(road.low, road.high), side * (half + away), turn + rng.normal(0, 0.1))
