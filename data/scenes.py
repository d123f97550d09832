"""Scenes: streets with traffic and clutter, before a sensor looks at them.   (after: shapes.py; next: scanner.py)

A scene is a list of parts, the labelled objects that own some of them, and an uneven ground. It knows
nothing of scanners, images or file layouts. The frame is the LiDAR's at the moment of the scan: x forward,
y left, z up, the ground under the sensor at z = -1.73 m (KITTI's mounting height).

What makes it hard on purpose: look-alikes (poles, trunks, bins, hydrants, signs, parked bicycles for people
and cyclists; bushes, dumpsters, walls for cars), rows of parked cars whose two headings differ only in the
slope of the windscreen, oncoming and turning traffic, groups of people, and objects hidden behind all of
these.
dims: P parts · M labelled objects
"""

import math
from dataclasses import dataclass, field

import numpy as np

from data.shapes import BALL, BOX, CLUTTER, OBJECTS, PART, SIZES, draw_size, part


@dataclass
class Ground:
    """A road (coordinates u along, d across it) through uneven, sloped ground; the pavement is higher."""

    heading: float = 0.0  # of the road at the sensor
    curvature: float = 0.0
    offset: float = 0.0  # d of the sensor: it drives on the right
    half_road: float = 4.0
    curb: float = 0.0
    slope: tuple[float, float] = (0.0, 0.0)
    waves: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 4), np.float32)
    )  # amplitude, kx, ky, phase
    height: float = -1.73
    reflectance: tuple[float, float] = (0.27, 0.33)  # road, beside the road

    def to_road(self, x, y):
        """(x, y) -> (u, d); the road is the parabola d = 0."""
        c, s = math.cos(self.heading), math.sin(self.heading)
        u, v = c * x + s * y, -s * x + c * y
        return u, v + self.offset - self.curvature / 2 * u * u

    def from_road(self, u: float, d: float) -> tuple[float, float, float]:
        """(u, d) -> x, y and the road's heading there."""
        v = d - self.offset + self.curvature / 2 * u * u
        c, s = math.cos(self.heading), math.sin(self.heading)
        return c * u - s * v, s * u + c * v, self.heading + math.atan(self.curvature * u)

    def z(self, x, y):
        """Height of the ground at (x, y), arrays or numbers."""
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        z = self.height + self.slope[0] * x + self.slope[1] * y
        for amplitude, kx, ky, phase in self.waves:
            z = z + amplitude * (np.sin(kx * x + ky * y + phase) - np.float32(math.sin(phase)))
        if self.curb:
            _, d = self.to_road(x, y)
            z = z + self.curb * np.clip((np.abs(d) - self.half_road) / 0.15, 0, 1)
        return z


@dataclass
class Scene:
    """Everything a scanner can see. boxes (M, 7) and velocity (M, 2) m/s, both in the LiDAR frame."""

    ground: Ground
    parts: np.ndarray  # (P,) PART
    boxes: np.ndarray  # (M, 7) float64
    names: tuple[str, ...]
    velocity: np.ndarray


@dataclass(frozen=True)
class Street:
    """One kind of place: what stands and moves there. Rates are means over the whole scene."""

    half_road: tuple[float, float]  # m
    setback: tuple[float, float]  # of the buildings from the kerb, m
    built: float  # share of the roadside with buildings
    parked: float  # chance that a parking bay is taken
    driving: float
    walking: float
    cycling: float
    clutter: tuple[float, ...]  # one rate for each of CLUTTER_NAMES


CLUTTER_NAMES = ("tree", "pole", "bin", "bush", "hedge", "wall", "dumpster", "bicycle", "bench")
STREETS = (
    Street((3.2, 5.0), (3, 6), 0.9, 0.55, 2.5, 9, 6.5, (6, 10, 9, 7, 3, 5, 3, 6, 3)),  # town
    Street((3.0, 4.0), (6, 14), 0.6, 0.4, 2.5, 7, 5.5, (18, 8, 7, 22, 14, 9, 3, 3, 1)),  # suburb
    Street((5.0, 9.0), (5, 15), 0.7, 0.3, 7, 8, 7.5, (10, 16, 7, 12, 6, 6, 4, 3, 2)),  # avenue
    Street((3.5, 8.0), (12, 30), 0.25, 0.05, 7, 4, 6, (24, 7, 3, 34, 14, 12, 2, 1, 1)),  # country road
    Street((3.0, 5.0), (4, 9), 0.85, 0.15, 1, 16, 9, (8, 11, 11, 8, 3, 6, 3, 8, 7)),  # pedestrian zone
)
BEHIND, AHEAD = -45.0, 78.0  # the stretch of road that is furnished, m along it


def apart(one: np.ndarray, others: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """(5,) and (n, 5) rectangles x, y, length, width, yaw -> (n,) bool: they are apart if an axis of one separates them."""
    x, y, length, width, yaw = one
    away = others[:, :2] - (x, y)
    reach = math.hypot(length, width) / 2 + margin + np.hypot(others[:, 2], others[:, 3]) / 2
    found = (away**2).sum(1) >= reach**2
    others, away = others[~found], away[~found]
    separate = np.zeros(len(others), bool)
    turn = others[:, 4] - yaw
    c, s = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    for angle, mine in ((yaw, True), (others[:, 4], False)):
        for k, axis in enumerate((angle, angle + np.pi / 2)):
            distance = np.abs(away[:, 0] * np.cos(axis) + away[:, 1] * np.sin(axis))
            own, other = ((length, width), (others[:, 2], others[:, 3]))[:: 1 if mine else -1]
            shadow = other[k] * c + other[1 - k] * s
            separate |= distance > (own[k] + shadow) / 2 + margin
    found[~found] = separate
    return found


def placed(parts: np.ndarray, x: float, y: float, z: float, yaw: float, owner: int = -1) -> np.ndarray:
    """Parts (P,) of a thing at the origin, moved to (x, y, z) and turned."""
    rows = parts.copy()
    c, s = math.cos(yaw), math.sin(yaw)
    rows["centre"] = rows["centre"] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)
    rows["centre"] += np.array([x, y, z], np.float32)
    rows["yaw"] += yaw
    rows["owner"] = owner
    return rows


class Builder:
    """Puts things on the ground one after another, so that no two footprints overlap."""

    def __init__(self, ground: Ground, rng: np.random.Generator, sizes: dict = SIZES, shapes: dict = OBJECTS) -> None:
        self.ground, self.rng, self.sizes, self.shapes = ground, rng, sizes, shapes
        # x, y, length, width, yaw; first the car that carries the sensor, with the distance it keeps
        self.footprints = [(2.0, 0.0, 12.0, 2.0, 0.0)]
        self.parts: list[np.ndarray] = []
        self.boxes: list[tuple] = []
        self.names: list[str] = []
        self.velocity: list[tuple] = []

    def is_free(self, x: float, y: float, length: float, width: float, yaw: float, margin: float = 0.15) -> bool:
        """No overlap with what stands already."""
        return bool(apart(np.array([x, y, length, width, yaw]), np.array(self.footprints), margin).all())

    def put(self, parts: list[tuple], x: float, y: float, yaw: float, owner: int = -1) -> None:
        """Move parts from their thing's frame to the ground at (x, y)."""
        self.parts.append(placed(np.array(parts, dtype=PART), x, y, self.ground.z(x, y), yaw, owner))

    def add_object(self, name: str, u: float, d: float, turn: float, speed: float = 0.0, check: bool = True) -> bool:
        """A labelled object at (u, d) of the road, turned against it. False if the place is taken (and `check` is on)."""
        x, y, heading = self.ground.from_road(u, d)
        yaw = heading + turn
        length, width, height = draw_size(name, self.rng, self.sizes)
        if check and not self.is_free(x, y, length, width, yaw):
            return False
        self.footprints.append((x, y, length, width, yaw))
        self.put(self.shapes[name](length, width, height, self.rng), x, y, yaw, owner=len(self.names))
        yaw = (yaw + np.pi) % (2 * np.pi) - np.pi
        self.boxes.append((x, y, float(self.ground.z(x, y)) + height / 2, length, width, height, yaw))
        self.names.append(name)
        self.velocity.append((speed * math.cos(yaw), speed * math.sin(yaw)))
        return True

    def add_clutter(self, name: str, u: float, d: float, turn: float) -> None:
        x, y, heading = self.ground.from_road(u, d)
        (length, width), parts = CLUTTER[name](self.rng)
        if self.is_free(x, y, length, width, heading + turn):
            self.footprints.append((x, y, length, width, heading + turn))
            self.put(parts, x, y, heading + turn)

    def add_woods(self, u: float, d: float, length: float) -> None:
        """A dense edge of trees behind everything else: a camera rarely sees the horizon."""
        x, y, yaw = self.ground.from_road(u, d)
        yaw += self.rng.normal(0, 0.2)
        if self.is_free(x, y, length, 5, yaw):
            count = max(int(length / 3.5), 1)
            at = (np.arange(count) + 0.5) / count * length - length / 2
            size = self.rng.uniform((2, 1.5, 2), (3.5, 3.5, 5), (count, 3))
            rows = zip(at, self.rng.normal(0, 1.2, count), size, strict=True)
            self.put([part(BALL, (a, b, h[2] * 0.8), h, "leaf") for a, b, h in rows], x, y, yaw)

    def add_block(self, u: float, d: float, length: float, depth: float, height: float) -> None:
        """A building, its foundation in the ground, with bays or balconies on the side of the road."""
        x, y, yaw = self.ground.from_road(u, d)
        if not self.is_free(x, y, length, depth, yaw):
            return
        self.footprints.append((x, y, length, depth, yaw))
        shade = self.rng.uniform(0.2, 0.4)
        parts = [
            part(
                BOX,
                (0, 0, height / 2 - 1),
                (length / 2, depth / 2, height / 2 + 1),
                "facade",
                reflectance=shade,
            )
        ]
        for _ in range(self.rng.integers(0, 4)):
            at = (
                self.rng.uniform(-0.45, 0.45) * length,
                -math.copysign(depth / 2, d),
                self.rng.uniform(0.5, 4),
            )
            parts.append(
                part(BOX, at, (self.rng.uniform(0.4, 1.5), 0.25, self.rng.uniform(0.5, 1.2)), "facade")
            )
        self.put(parts, x, y, yaw)


def make_ground(street: Street, rng: np.random.Generator) -> Ground:
    half = rng.uniform(*street.half_road)
    count = 4
    length = rng.uniform(12, 70, count)
    direction = rng.uniform(0, 2 * np.pi, count)
    k = 2 * np.pi / length
    amplitude = rng.uniform(0.0, 0.0022, count) * length  # long waves may be higher: the slopes stay alike
    waves = np.stack(
        [amplitude, k * np.cos(direction), k * np.sin(direction), rng.uniform(0, 6.3, count)], axis=1
    )
    return Ground(
        heading=rng.normal(0, 0.06),
        curvature=rng.normal(0, 0.003),
        offset=-half * rng.uniform(0.3, 0.6),
        half_road=half,
        curb=rng.choice([0, 0.1, 0.14]),
        slope=tuple(rng.normal(0, 0.006, 2)),
        waves=waves.astype(np.float32),
        reflectance=(rng.uniform(0.16, 0.32), rng.uniform(0.22, 0.38)),
    )


def add_traffic(builder: Builder, street: Street, half: float) -> None:
    """Parked rows, traffic of both directions, a crossing; who drives is a car, a van or a truck."""
    rng = builder.rng
    kinds, share = ("Car", "Van", "Truck"), (0.90, 0.07, 0.03)
    for side in (-1, 1):
        angled = rng.random() < 0.15
        bay, turn = (2.6, rng.choice([-1, 1]) * rng.uniform(0.9, 1.57)) if angled else (6.0, 0.0)
        density = street.parked * rng.uniform(0, 1.6)
        for u in np.arange(BEHIND + rng.uniform(0, bay), AHEAD, bay):
            if rng.random() < density:
                flip = math.pi if rng.random() < (0.5 if angled else 0.15 if side < 0 else 0.75) else 0.0
                d = side * (half + (2.2 if angled else -0.2 + rng.normal(0, 0.15)))
                builder.add_object(
                    str(rng.choice(kinds, p=share)),
                    u + rng.uniform(-0.5, 0.5),
                    d,
                    turn + flip + rng.normal(0, 0.03),
                )
    crossing = rng.uniform(10, 45) if rng.random() < 0.5 else None
    for _ in range(rng.poisson(street.driving)):
        name, u = str(rng.choice(kinds, p=(0.85, 0.08, 0.07))), rng.uniform(BEHIND, AHEAD)
        if crossing is not None and rng.random() < 0.45:  # on the side road, or turning into it
            turn = (
                rng.choice([-1, 1]) * (np.pi / 2 + rng.normal(0, 0.08))
                if rng.random() < 0.6
                else rng.uniform(-np.pi, np.pi)
            )
            builder.add_object(
                name, crossing + rng.uniform(-4, 4), rng.uniform(-22, 22), turn, rng.uniform(2, 8)
            )
            continue
        lane = rng.choice([-1, 1])
        turn = (0.0 if lane < 0 else math.pi) + rng.normal(0, 0.05)
        builder.add_object(name, u, lane * half * rng.uniform(0.3, 0.6), turn, rng.uniform(0, 14))


def add_people(builder: Builder, street: Street, half: float) -> None:
    """Walkers alone and in groups, riders in the road and on the pavement, some people sitting."""
    rng = builder.rng

    def along() -> float:
        """Position along the road: most are ahead and near enough to be told apart."""
        u = 4 + 56 * rng.beta(1.3, 2.2)
        return -u if rng.random() < 0.25 else u

    for _ in range(rng.poisson(street.walking * 0.6)):
        u, crosses = along(), rng.random() < 0.2
        d = rng.uniform(-half, half) if crosses else rng.choice([-1, 1]) * (half + rng.uniform(0.6, 3.5))
        turn = rng.choice([0, np.pi]) + (np.pi / 2 if crosses else 0) + rng.normal(0, 0.35)
        for _ in range(1 + rng.poisson(0.7)):
            builder.add_object("Pedestrian", u, d, turn + rng.normal(0, 0.25), rng.uniform(0, 1.7))
            u, d = u + rng.normal(0, 0.6), d + rng.choice([-1, 1]) * rng.uniform(0.7, 1.0)
    for _ in range(rng.poisson(street.cycling)):
        u, side = along(), rng.choice([-1, 1])
        d = side * (half + rng.uniform(-1.5, 0.2) if rng.random() < 0.65 else half + rng.uniform(0.6, 3))
        turn = (
            (0.0 if side < 0 else math.pi)
            + rng.normal(0, 0.12)
            + rng.choice([0, np.pi, np.pi / 2], p=[0.7, 0.2, 0.1])
        )
        builder.add_object("Cyclist", u, d, turn, rng.uniform(1, 7))
    for _ in range(rng.poisson(0.8)):
        side = rng.choice([-1, 1])
        builder.add_object(
            "Person_sitting",
            along(),
            side * (half + rng.uniform(1, 4)),
            -side * np.pi / 2 + rng.normal(0, 0.3),
        )


def add_roadsides(builder: Builder, street: Street, half: float, low: float, high: float) -> None:
    """Houses on both sides, from `low` to `high` along the road, and the edge of a wood behind them."""
    rng = builder.rng
    for side in (-1, 1):
        u = low - 20
        while u < high + 10:
            length, depth = rng.uniform(7, 28), rng.uniform(6, 14)
            if rng.random() < street.built:
                d = side * (half + rng.uniform(*street.setback) + depth / 2)
                builder.add_block(u + length / 2, d, length, depth, rng.uniform(3, 14))
            u += length + (rng.uniform(2, 9) if rng.random() < 0.4 else 0.1)
        u = low - 10
        while u < high + 10:
            length = rng.uniform(8, 30)
            builder.add_woods(u + length / 2, side * (half + rng.uniform(street.setback[0] + 4, 40)), length)
            u += length * rng.uniform(0.7, 1.5)


def make_scene(rng: np.random.Generator) -> Scene:
    """A street of one kind with everything on it: a function of the generator alone."""
    street = STREETS[rng.choice(len(STREETS), p=(0.25, 0.25, 0.2, 0.15, 0.15))]
    ground = make_ground(street, rng)
    builder, half = Builder(ground, rng), ground.half_road
    add_traffic(builder, street, half)
    add_people(builder, street, half)
    add_roadsides(builder, street, half, BEHIND, AHEAD)
    if rng.random() < 0.6:  # the road turns away behind the houses or trees
        end, across = rng.uniform(55, AHEAD), rng.uniform(-6, 6)
        builder.add_block(
            end, across, 8, 30, rng.uniform(4, 12)
        ) if rng.random() < 0.5 else builder.add_woods(end, across, 30)
    for name, mean in zip(CLUTTER_NAMES, street.clutter, strict=True):
        for _ in range(rng.poisson(mean)):
            u, side = rng.triangular(BEHIND, 8, AHEAD), rng.choice([-1, 1])
            d = side * (half + 0.3 + rng.gamma(1.2, 2.0))
            builder.add_clutter(name, u, d, rng.choice([0, np.pi / 2, np.pi]) + rng.normal(0, 0.1))
    parts = np.concatenate(builder.parts) if builder.parts else np.zeros(0, PART)
    return Scene(
        ground,
        parts,
        np.array(builder.boxes).reshape(-1, 7),
        tuple(builder.names),
        np.array(builder.velocity).reshape(-1, 2),
    )
