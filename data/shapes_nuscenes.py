"""nuScenes' kinds of objects out of the simple parts of shapes.py.   (after: shapes.py; next: roads.py)

One builder for each category, called with the length, width and height of the box that it has to fill; as there the origin is on
the ground under the box's centre, x forward, and what is built stays some cm inside. Barriers are wide and short: nuScenes
measures the width across the direction in which a barrier faces.
"""

from collections.abc import Callable

import numpy as np

from data.shapes import BALL, BOX, POST, Parts, bicycle, car, cyclist, limb, part, pedestrian, sitting, truck, van, wheels

# Length, width, height in m: mean, standard deviation. The means of the ten classes are nuScenes' own, as the published
# anchors have them (CBGS); how they split into sub-categories, with and without rider, and the spreads are ours.
SIZES = {
    "vehicle.car": ((4.61, 1.95, 1.72), (0.42, 0.14, 0.18)),
    "vehicle.truck": ((6.74, 2.46, 2.73), (1.6, 0.22, 0.55)),
    "vehicle.construction": ((6.38, 2.73, 3.13), (1.2, 0.3, 0.4)),
    "vehicle.bus.rigid": ((11.3, 2.94, 3.47), (1.2, 0.15, 0.25)),
    "vehicle.bus.bendy": ((9.2, 2.94, 3.4), (0.6, 0.1, 0.15)),  # each of its two sections is a box of its own
    "vehicle.trailer": ((12.0, 2.87, 3.82), (1.5, 0.2, 0.4)),
    "vehicle.motorcycle": ((2.10, 0.76, 1.25), (0.18, 0.10, 0.08)),
    "vehicle.bicycle": ((1.68, 0.60, 1.10), (0.12, 0.05, 0.05)),
    "with_rider.vehicle.motorcycle": ((2.10, 0.80, 1.62), (0.18, 0.10, 0.10)),
    "with_rider.vehicle.bicycle": ((1.72, 0.62, 1.74), (0.12, 0.08, 0.09)),
    "human.pedestrian.adult": ((0.73, 0.66, 1.77), (0.17, 0.12, 0.10)),
    "human.pedestrian.child": ((0.52, 0.50, 1.25), (0.08, 0.07, 0.12)),
    "human.pedestrian.construction_worker": ((0.75, 0.70, 1.75), (0.15, 0.10, 0.07)),
    "sitting.human.pedestrian.adult": ((0.80, 0.62, 1.27), (0.12, 0.08, 0.08)),
    "movable_object.barrier": ((0.49, 2.49, 0.98), (0.08, 0.45, 0.10)),
    "movable_object.trafficcone": ((0.40, 0.40, 1.06), (0.07, 0.07, 0.18)),
    "movable_object.debris": ((0.90, 0.80, 0.55), (0.25, 0.25, 0.15)),
    "movable_object.pushable_pullable": ((0.65, 0.60, 1.10), (0.10, 0.08, 0.10)),
    "static_object.bicycle_rack": ((5.0, 1.90, 1.30), (1.2, 0.08, 0.05)),
}  # fmt: skip


def car_or_van(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """nuScenes' cars are saloons, estates, and also vans and minibuses."""
    return (van if height > 1.85 else car)(length, width, height, rng)


def truck_or_pickup(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """A cab and a load; a short one has its bed open behind the cab."""
    if length > 5.9:
        return truck(length, width, height, rng)
    hl, hw, colour = length / 2 - 0.06, width / 2 - 0.06, rng.choice([0.05, 0.15, 0.35, 0.5])
    bed, waist = length * 0.38, height * 0.5
    return [
        part(BOX, (0, 0, (waist + 0.35) / 2), (hl, hw, (waist - 0.35) / 2), "paint", reflectance=colour),
        part(BOX, (hl * 0.15, 0, (waist + height) / 2 - 0.02), (hl * 0.36, hw * 0.95, (height - waist) / 2 - 0.02), "paint",
             taper=(0.4, 0.1, 0.1), reflectance=colour),
        part(BOX, (-hl + 0.06, 0, waist + 0.1), (0.05, hw, 0.15), "steel"),
        *[part(BOX, (-hl + bed / 2, side * (hw - 0.05), waist + 0.1), (bed / 2, 0.05, 0.15), "steel") for side in (-1, 1)],
        *wheels(length, width, 0.38, (-0.31, 0.32)),
    ]  # fmt: skip


def bus(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Long, upright, with a band of windows all around; the front is a little slanted and mostly glass."""
    hl, hw, colour = length / 2 - 0.06, width / 2 - 0.07, rng.choice([0.1, 0.3, 0.5])
    sill, lintel = height * 0.38, height * 0.75
    bands = [(0.35, sill, "paint", 1.0), (sill, lintel, "glass", 0.97), (lintel, height - 0.04, "paint", 1.0)]
    parts = [part(BOX, (0, 0, (low + high) / 2), (hl * size, hw * size, (high - low) / 2), what,
                  taper=(0.01, 0, 0.01), reflectance=colour if what == "paint" else None)
             for low, high, what, size in bands]  # fmt: skip
    for x in np.linspace(-0.96, 0.8, 6):  # the posts between the windows
        parts.append(part(BOX, (x * hl, 0, (sill + lintel) / 2), (0.08, hw, (lintel - sill) / 2), "paint", reflectance=colour))
    parts.append(part(BOX, (-hl + 0.05, 0, 0.6), (0.03, 0.3, 0.08), "plate"))
    return parts + wheels(length, width, 0.48, (-0.28, 0.3))


def trailer(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """A box or a flat bed with cargo on wheels at its rear; under its front there is air."""
    hl, hw, bed = length / 2 - 0.06, width / 2 - 0.08, rng.uniform(1.0, 1.25)
    parts = [part(BOX, (0, 0, bed - 0.1), (hl, hw, 0.12), "steel")]
    if rng.random() < 0.7:
        parts.append(part(BOX, (0, 0, (bed + height) / 2), (hl, hw, (height - bed) / 2 - 0.03), "paint",
                          reflectance=rng.uniform(0.2, 0.6)))  # fmt: skip
    else:
        parts += [part(BOX, (x * hl, 0, (bed + height) / 2), (hl * 0.28, hw * 0.8, (height - bed) / 2 - 0.03), "steel",
                       reflectance=rng.uniform(0.1, 0.4)) for x in (-0.6, 0.1)]  # fmt: skip
        parts.append(part(BOX, (hl - 0.1, 0, (bed + height) / 2 - 0.05), (0.06, hw, (height - bed) / 2 - 0.05), "steel"))
    parts.append(part(BOX, (hl * 0.45, 0, bed / 2), (0.08, hw * 0.6, bed / 2), "steel"))  # the legs it is parked on
    return parts + wheels(length, width, 0.5, (-0.42, -0.32, -0.22))


def construction(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """An excavator, or a wheel loader: cab to the rear, arm and shovel to the front."""
    hl, hw, yellow = length / 2 - 0.08, width / 2 - 0.1, rng.uniform(0.35, 0.5)
    deck, shovel = height * 0.35, rng.uniform(0.45, 0.7)
    parts = [
        part(BOX, (-hl * 0.35, 0, (deck + height * 0.6) / 2), (hl * 0.65, hw * 0.85, (height * 0.6 - deck) / 2), "paint",
             reflectance=yellow),
        part(BOX, (-hl * 0.2, hw * 0.4, (height * 0.6 + height) / 2 - 0.04), (hl * 0.25, hw * 0.42, height * 0.2 - 0.04), "glass",
             taper=(0.2, 0, 0.1)),
        part(BOX, (-hl * 0.2, hw * 0.4, height - 0.08), (hl * 0.25, hw * 0.42, 0.06), "paint", reflectance=yellow),
        part(BOX, (hl - shovel / 2, 0, height * 0.2), (shovel / 2, hw, height * 0.18), "steel", taper=(0.4, 0, 0)),
    ]  # fmt: skip
    if rng.random() < 0.6:  # tracks, and an arm that bends
        parts += [part(BOX, (-hl * 0.3, side * (hw - 0.25), deck / 2), (hl * 0.7, 0.24, deck / 2), "rubber") for side in (-1, 1)]
        elbow = (hl * 0.45, 0, height - 0.25)
        arms = [((hl * 0.1, 0, height * 0.5), elbow), (elbow, (hl - 0.3, 0, height * 0.4))]
    else:
        parts += wheels(length, width, min(0.7, deck), (-0.33, 0.12))
        arms = [((hl * 0.1, 0, height * 0.5), (hl - 0.35, 0, height * 0.4))]
    return parts + [limb(a, b, 0.16, "paint", yellow) for a, b in arms]


def motorcycle(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Wheels, tank and seat, handlebar and mirrors."""
    radius, hw = 0.3, width / 2 - 0.04
    axle = length / 2 - radius - 0.05
    colour = rng.choice([0.05, 0.2, 0.4])
    return [
        *[part(BALL, (x, 0, radius), (radius, 0.07, radius), "rubber") for x in (-axle, axle)],
        part(BALL, (0, 0, 0.5), (axle * 0.6, 0.17, 0.22), "steel"),
        part(BALL, (0.12, 0, 0.82), (0.3, 0.15, 0.14), "paint", reflectance=colour),
        part(BOX, (-0.4, 0, 0.80), (0.33, 0.13, 0.06), "cloth", reflectance=0.1),
        limb((axle, 0, radius), (axle - 0.28, 0, 1.0), 0.06, "steel", 0.3),
        part(BOX, (axle - 0.28, 0, 1.0), (0.03, hw, 0.03), "steel"),
        part(BOX, (axle - 0.24, 0, (1.0 + min(height, 1.4)) / 2 - 0.02), (0.04, 0.16, (min(height, 1.4) - 1.0) / 2), "glass"),
    ]  # fmt: skip


def motorcyclist(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    hw, cloth = min(width / 2 - 0.04, 0.3), rng.uniform(0.05, 0.4)
    hip, shoulder = 0.9, height - 0.32
    parts = motorcycle(length, width, 1.2, rng)
    for side in (-1, 1):
        parts.append(limb((-0.3, side * 0.16, hip), (0.1, side * 0.16, 0.4), 0.09, "cloth", cloth))
        parts.append(limb((-0.1, side * (hw - 0.07), shoulder - 0.05), (0.45, side * (hw - 0.07), 1.0), 0.06, "cloth", cloth))
    parts.append(part(BALL, (-0.2, 0, (hip + shoulder) / 2), (0.16, hw * 0.85, (shoulder - hip) / 2 + 0.12), "cloth", pitch=0.25,
                      reflectance=cloth))  # fmt: skip
    return [*parts, part(BALL, (-0.05, 0, height - 0.16), (0.14, 0.13, 0.14), "paint", reflectance=rng.choice([0.1, 0.5]))]


def parked_bicycle(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    bar = min(0.24, width / 2 - 0.03)
    frame = [p for p in bicycle(length) if p[3][1] < 0.2]
    shade = rng.uniform(0.15, 0.4)
    return [*frame, part(BOX, (length / 2 - 0.56, 0, height - 0.07), (0.03, bar, 0.03), "steel", reflectance=shade)]


def worker(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """A pedestrian in a vest that shines, with a helmet."""
    hw, depth = min(width / 2 - 0.04, 0.3), min(0.15, length / 2 - 0.05)
    vest = part(BALL, (0, 0, height * 0.66), (depth, hw * 0.85, height * 0.16), "plate")
    return [*pedestrian(length, width, height, rng), vest]


def barrier(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Concrete or water-filled plastic, wider at its foot; or a board on two feet."""
    hl, hw = length / 2 - 0.03, width / 2 - 0.03
    if rng.random() < 0.7:
        return [part(BOX, (0, 0, height / 2 - 0.01), (hl, hw, height / 2 - 0.02), "stone", taper=(0.65, 0.65, 0.02),
                     reflectance=rng.uniform(0.2, 0.5))]  # fmt: skip
    feet = [part(BOX, (0, y * hw, height * 0.3), (hl, 0.04, height * 0.3), "steel", taper=(0.8, 0.8, 0)) for y in (-0.8, 0.8)]
    return [*feet, part(BOX, (0, 0, height * 0.75), (0.04, hw, height * 0.22), "plate", reflectance=rng.uniform(0.4, 0.8))]


def cone(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """A foot and a cone with a bright collar; or a delineator post."""
    hl, hw = length / 2 - 0.02, width / 2 - 0.02
    foot = part(BOX, (0, 0, 0.04), (hl, hw, 0.04), "rubber")
    body, post = (0, 0, height / 2 - 0.01), rng.random() < 0.25
    if post:
        return [foot, part(POST, body, (0.07, 0.07, height / 2 - 0.02), "plate", reflectance=0.7)]
    collar = part(BOX, (0, 0, height * 0.62), (hl * 0.5, hw * 0.5, height * 0.1), "plate", taper=(0.3, 0.3, 0.3))
    return [foot, part(BOX, body, (hl * 0.85, hw * 0.85, height / 2 - 0.02), "paint", taper=(0.85, 0.85, 0.85)), collar]


def debris(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Bags and boxes in a heap."""
    hl, hw = length / 2 - 0.03, width / 2 - 0.03
    shade = rng.uniform(0.05, 0.4)
    return [part(BALL, (-hl * 0.3, 0, height * 0.45), (hl * 0.65, hw, height * 0.45), "cloth", reflectance=shade),
            part(BOX, (hl * 0.5, 0, height * 0.4), (hl * 0.45, hw * 0.8, height * 0.4), "stone")]  # fmt: skip


def wheelie_bin(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    hl, hw, shade = length / 2 - 0.03, width / 2 - 0.03, rng.uniform(0.1, 0.3)
    return [part(BOX, (0, 0, height / 2), (hl * 0.9, hw * 0.9, height / 2 - 0.06), "paint", taper=(-0.08, -0.08, -0.08),
                 reflectance=shade),
            part(BOX, (0, 0, height - 0.05), (hl, hw, 0.04), "paint", reflectance=shade)]  # fmt: skip


def ego() -> Parts:
    """The car that carries the scanner, seen from above: 4.08 x 1.73 m, the scanner 0.35 m above its roof, 0.41 m behind the
    middle. It shades the rays that go down by more than 22 degrees."""
    cabin = part(BOX, (-0.4, 0, 1.2), (1.5, 0.82, 0.29), "paint", taper=(0.6, 0.6, 0.3), reflectance=0.1)
    return [part(BOX, (0, 0, 0.5), (2.0, 0.84, 0.33), "paint", taper=(0.05, 0.02, 0.02), reflectance=0.3), cabin]


def rack(length: float, width: float, height: float, _rng: np.random.Generator) -> Parts:
    """Hoops across a rail; traffic.py parks the bicycles in it."""
    hl, count = length / 2 - 0.1, max(int(length / 0.7), 3)
    hoops = [part(BOX, (x, 0, 0.42), (0.03, 0.3, 0.4), "fence") for x in np.linspace(-hl, hl, count)]
    poles = [part(POST, (side * hl, -width / 2 + 0.1, height / 2), (0.04, 0.04, height / 2 - 0.03), "steel") for side in (-1, 1)]
    return [part(BOX, (0, 0, 0.05), (hl, 0.05, 0.04), "steel"), *hoops, *poles]


SHAPES: dict[str, Callable[..., Parts]] = {
    "vehicle.car": car_or_van, "vehicle.truck": truck_or_pickup, "vehicle.construction": construction, "vehicle.bus.rigid": bus,
    "vehicle.bus.bendy": bus, "vehicle.trailer": trailer, "vehicle.motorcycle": motorcycle, "vehicle.bicycle": parked_bicycle,
    "with_rider.vehicle.motorcycle": motorcyclist, "with_rider.vehicle.bicycle": cyclist, "human.pedestrian.adult": pedestrian,
    "human.pedestrian.child": pedestrian, "human.pedestrian.construction_worker": worker,
    "sitting.human.pedestrian.adult": sitting, "movable_object.barrier": barrier, "movable_object.trafficcone": cone,
    "movable_object.debris": debris, "movable_object.pushable_pullable": wheelie_bin, "static_object.bicycle_rack": rack,
}  # fmt: skip
