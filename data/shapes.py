"""Shapes: road users and street furniture out of simple convex parts.   (next: scenes.py)

A part is a tapered box, an ellipsoid or an eight-sided post with a material. Each builder returns the parts
of one thing in that thing's own frame: origin on the ground under its centre, x forward. The labelled ones
fill the box whose length, width and height they are given, and stay some cm inside it, because annotators
draw boxes around the points and not through them. Front and rear differ, so a heading can be learnt.
"""

import math
from collections.abc import Callable

import numpy as np

BOX, BALL, POST = 0, 1, 2  # tapered box; ellipsoid; eight-sided prism about z
PART = np.dtype(
    [
        ("shape", "i4"),
        ("owner", "i4"),  # row of the labelled object, -1 for the scenery
        ("centre", "f4", 3),
        ("half", "f4", 3),  # half lengths along the part's own axes, m
        ("yaw", "f4"),
        ("pitch", "f4"),  # the part's top leans forward by this angle, after that yaw turns it
        (
            "taper",
            "f4",
            3,
        ),  # share of hx, hx, hy that the top loses: front, rear, both sides (BOX only)
        ("reflectance", "f4"),
        ("gap", "f4"),  # share of the rays that pass as if the part were not there: glass, fences
        ("density", "f4"),  # vegetation: mean number of leaves met per metre; 0 = solid
    ]
)
MATERIALS = {  # reflectance (also the mean intensity), gap, density
    "paint": (0.35, 0, 0), "glass": (0.05, 0.7, 0), "rubber": (0.08, 0, 0), "plate": (0.95, 0, 0),
    "steel": (0.32, 0, 0), "spokes": (0.25, 0.3, 0), "cloth": (0.30, 0, 0), "skin": (0.35, 0, 0),
    "facade": (0.30, 0.02, 0), "stone": (0.32, 0, 0), "bark": (0.28, 0, 0), "fence": (0.28, 0.6, 0),
    "leaf": (0.30, 0, 1.2), "hedge": (0.28, 0, 5.0),
}  # fmt: skip
SIZES = {  # length, width, height: mean and standard deviation over KITTI's training labels, m
    "Car": ((3.88, 1.63, 1.53), (0.43, 0.10, 0.14)),
    "Van": ((5.08, 1.90, 2.21), (0.66, 0.17, 0.32)),
    "Truck": ((10.1, 2.58, 3.25), (2.8, 0.22, 0.45)),
    "Pedestrian": ((0.84, 0.66, 1.76), (0.23, 0.14, 0.11)),
    "Person_sitting": ((0.80, 0.59, 1.27), (0.15, 0.09, 0.08)),
    "Cyclist": ((1.76, 0.60, 1.74), (0.18, 0.12, 0.09)),
}
Parts = list[tuple]


def part(shape, centre, half, material, yaw=0.0, pitch=0.0, taper=(0, 0, 0), reflectance=None) -> tuple:
    """One row of `PART`, not yet owned."""
    mean, gap, density = MATERIALS[material]
    return (
        shape,
        -1,
        centre,
        half,
        yaw,
        pitch,
        taper,
        mean if reflectance is None else reflectance,
        gap,
        density,
    )


def draw_size(name: str, rng: np.random.Generator, sizes: dict = SIZES) -> tuple[float, float, float]:
    """Length, width, height of a new object: a normal distribution cut at two standard deviations."""
    mean, std = sizes[name]
    return tuple(m + s * float(np.clip(rng.normal(), -2, 2)) for m, s in zip(mean, std, strict=True))


# ---- labelled objects


def wheels(length: float, width: float, radius: float, at: tuple[float, ...]) -> Parts:
    y = width / 2 - 0.10
    return [
        part(BALL, (x * length, side * y, radius), (radius, 0.09, radius), "rubber")
        for x in at
        for side in (-1, 1)
    ]


def car(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Body, cabin of glass under a roof, wheels, number plates. Front and rear differ."""
    hl, hw = length / 2 - 0.05, width / 2 - 0.05
    colour = rng.choice([0.008, 0.04, 0.15, 0.32, 0.5], p=[0.2, 0.2, 0.2, 0.25, 0.15]) * rng.uniform(0.8, 1.2)
    waist = height * rng.uniform(0.54, 0.62)
    rear = rng.choice(
        [-0.97, -0.9, -0.68], p=[0.35, 0.35, 0.3]
    )  # estate, hatchback, saloon: where the cabin starts
    front = rng.uniform(0.28, 0.46)
    slope = (rng.uniform(0.55, 0.9), {-0.97: 0.12, -0.9: 0.3, -0.68: 0.55}[float(rear)], 0.14)
    middle, reach = (front + rear) / 2 * hl, (front - rear) / 2 * hl
    roof = height - 0.09  # the glass ends here, and its top is the roof's outline
    low = 0.17
    parts = [
        part(
            BOX,
            (0, 0, (low + waist) / 2),
            (hl, hw, (waist - low) / 2),
            "paint",
            taper=(0.08, 0.04, 0.06),
            reflectance=colour,
        ),
        part(
            BOX, (middle, 0, (waist + roof) / 2), (reach, hw * 0.94, (roof - waist) / 2), "glass", taper=slope
        ),
    ]
    left, right = middle - reach * (1 - slope[1]), middle + reach * (1 - slope[0])
    top = ((right + left) / 2, 0, roof + 0.02), ((right - left) / 2, hw * 0.94 * (1 - slope[2]), 0.05)
    parts.append(part(BOX, *top, "paint", taper=(0.15, 0.1, 0.1), reflectance=colour))
    for x in (left, left + (right - left) * 0.55):  # the pillars beside the windows
        size = (0.07, hw * 0.94, (roof - waist) / 2)
        parts.append(
            part(BOX, (x, 0, (waist + roof) / 2), size, "paint", taper=(0, 0, 0.14), reflectance=colour)
        )
    for x in (-hl, hl):
        parts.append(part(BOX, (x * 0.985, 0, 0.45), (0.02, 0.25, 0.06), "plate"))
    return parts + wheels(length, width, 0.30, (-0.31, 0.33))


def van(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    hl, hw, colour = length / 2 - 0.05, width / 2 - 0.06, rng.choice([0.1, 0.35, 0.5, 0.55])
    nose = rng.uniform(0.12, 0.22) * hl * 2  # length of the bonnet
    waist, cargo = height * 0.5, hl - nose / 2
    return [
        part(BOX, (0, 0, 0.2 + waist / 2), (hl, hw, waist / 2), "paint", taper=(0.05, 0, 0.02),
             reflectance=colour),
        part(BOX, (-nose / 2, 0, (waist + height) / 2), (cargo, hw, (height - waist) / 2 - 0.03), "paint",
             taper=(rng.uniform(0.15, 0.35), 0.03, 0.08), reflectance=colour),
        part(BOX, (hl - nose - 0.2, 0, height * 0.68), (0.25, hw * 0.96, height * 0.13), "glass",
             taper=(0.5, 0, 0.05)),
        *wheels(length, width, 0.34, (-0.30, 0.32)),
    ]  # fmt: skip


def truck(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    hl, hw, colour = length / 2 - 0.06, width / 2 - 0.06, rng.choice([0.15, 0.35, 0.5])
    cab, bed = rng.uniform(1.9, 2.4), rng.uniform(0.9, 1.2)
    load = length - 0.12 - cab - rng.uniform(0.3, 0.7)  # the gap behind the cab
    cab_top = height * rng.uniform(0.75, 0.98)
    return [
        part(BOX, (hl - cab / 2, 0, (cab_top + 0.5) / 2), (cab / 2, hw * 0.96, (cab_top - 0.5) / 2), "paint",
             taper=(0.12, 0, 0.03), reflectance=colour),
        part(BOX, (-hl + load / 2, 0, (bed + height) / 2), (load / 2, hw, (height - bed) / 2 - 0.04), "paint",
             reflectance=rng.uniform(0.2, 0.6)),
        part(BOX, (0, 0, 0.75), (hl, 0.4, 0.15), "steel"),
        *wheels(length, width, 0.5, (-0.40, -0.28, 0.36)),
    ]  # fmt: skip


def limb(start, end, radius: float, material: str, reflectance: float) -> tuple:
    """An ellipsoid between two points of the x-z plane at the same y: legs, arms, frame tubes."""
    (x0, y, z0), (x1, _, z1) = start, end
    reach = math.hypot(x1 - x0, z1 - z0) / 2
    centre = ((x0 + x1) / 2, y, (z0 + z1) / 2)
    return part(
        BALL, centre, (radius, radius, reach + radius / 2), material,
        pitch=math.atan2(x0 - x1, z0 - z1), reflectance=reflectance,
    )  # fmt: skip


def pedestrian(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    """Two legs in a stride that fills the box's length, torso, two arms, head; some carry a bag."""
    trousers, shirt = rng.uniform(0.08, 0.5, 2)
    stride = max(length / 2 - 0.12, 0.02) * rng.uniform(0.5, 1)
    swing = rng.choice([-1, 1])
    hip, shoulder = height * 0.5, height * 0.82
    hw = min(width / 2 - 0.04, 0.30)
    depth = min(0.13, length / 2 - 0.05)
    parts = [
        limb((0, side * 0.1, hip), (side * swing * stride, side * 0.1, 0.07), 0.09, "cloth", trousers)
        for side in (-1, 1)
    ]
    for side in (-1, 1):
        hand = (-side * swing * stride * 0.6, side * (hw - 0.06), hip * 0.95)
        parts.append(limb((0, side * (hw - 0.06), shoulder - 0.05), hand, 0.06, "cloth", shirt))
    parts.append(
        part(BALL, (0, 0, height * 0.64), (depth, hw * 0.8, height * 0.215), "cloth", reflectance=shirt)
    )
    parts.append(part(BALL, (0.02, 0, height - 0.14), (0.10, 0.085, 0.125), "skin"))
    if rng.random() < 0.3 and depth > 0.1 and length > 0.7:
        parts.append(part(BOX, (-depth - 0.05, 0, height * 0.7), (0.09, 0.15, 0.2), "cloth", reflectance=0.2))
    return parts


def sitting(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    trousers, shirt = rng.uniform(0.08, 0.5, 2)
    hw, hl = min(width / 2 - 0.04, 0.27), length / 2 - 0.06
    parts = [
        limb((-hl + 0.15, s * 0.12, 0.48), (hl - 0.08, s * 0.12, 0.48), 0.08, "cloth", trousers)
        for s in (-1, 1)
    ]
    parts += [
        limb((hl - 0.08, s * 0.12, 0.46), (hl - 0.06, s * 0.12, 0.06), 0.07, "cloth", trousers)
        for s in (-1, 1)
    ]
    parts.append(
        part(BALL, (-hl + 0.15, 0, height * 0.6), (0.14, hw, height * 0.26), "cloth", reflectance=shirt)
    )
    return [*parts, part(BALL, (-hl + 0.17, 0, height - 0.14), (0.10, 0.085, 0.12), "skin")]


def bicycle(length: float) -> Parts:
    """Two wheels, frame, handlebar; without a rider it is clutter that looks like a cyclist."""
    radius, axle = 0.33, length / 2 - 0.38
    parts = [part(BALL, (x, 0, radius), (radius, 0.035, radius), "spokes") for x in (-axle, axle)]
    tubes = [
        ((-axle, 0, radius), (-0.12, 0, 0.75)),
        ((-0.12, 0, 0.72), (axle - 0.12, 0, 0.8)),
        ((-0.05, 0, 0.3), (axle - 0.12, 0, 0.78)),
        ((axle, 0, radius), (axle - 0.15, 0, 0.95)),
    ]
    parts += [limb(a, b, 0.04, "steel", 0.25) for a, b in tubes]
    return [*parts, part(BOX, (axle - 0.18, 0, 0.97), (0.03, 0.24, 0.03), "steel")]


def cyclist(length: float, width: float, height: float, rng: np.random.Generator) -> Parts:
    trousers, shirt = rng.uniform(0.08, 0.5, 2)
    hw = min(width / 2 - 0.03, 0.26)
    lean, pedal = rng.uniform(0.1, 0.4), rng.uniform(-1, 1)
    hip, shoulder, head = (-0.2, 0.9), (-0.2 + lean, height * 0.8), height - 0.14
    bar = length / 2 - 0.56
    parts = [p for p in bicycle(length) if p[3][1] < 0.2]  # the handlebar, narrowed to the box, comes below
    parts.append(part(BOX, (bar, 0, 0.97), (0.03, min(0.24, width / 2 - 0.03), 0.03), "steel"))
    for side in (-1, 1):
        foot = (0.0 + 0.12 * side * pedal, side * 0.1, 0.3 + 0.12 * side)
        parts.append(limb((hip[0], side * 0.1, hip[1]), foot, 0.09, "cloth", trousers))
        wrist = (bar, side * (hw - 0.05), 1.0)
        parts.append(limb((shoulder[0], side * (hw - 0.05), shoulder[1] - 0.05), wrist, 0.06, "cloth", shirt))
    middle, tilt = (hip[1] + shoulder[1]) / 2, math.atan2(lean, shoulder[1] - hip[1])
    torso = (0.15, hw * 0.9, math.hypot(lean, shoulder[1] - hip[1]) / 2 + 0.08)
    parts.append(part(BALL, (hip[0] + lean / 2, 0, middle), torso, "cloth", pitch=tilt, reflectance=shirt))
    return [*parts, part(BALL, (shoulder[0] + 0.08, 0, head), (0.10, 0.085, 0.12), "skin")]


OBJECTS = {
    "Car": car,
    "Van": van,
    "Truck": truck,
    "Pedestrian": pedestrian,
    "Person_sitting": sitting,
    "Cyclist": cyclist,
}


# ---- scenery: its footprint (length, width) and its parts


def tree(rng):
    radius, height = rng.uniform(0.08, 0.28), rng.uniform(4.5, 9)
    bare = rng.uniform(1.6, 3)
    parts = [
        part(POST, (0, 0, bare / 2), (radius, radius, bare / 2 + 0.6), "bark", pitch=rng.normal(0, 0.04))
    ]
    for _ in range(rng.integers(2, 4)):
        size = rng.uniform(0.9, 2.4, 3)
        at = (*rng.normal(0, 0.6, 2), bare + size[2] * 0.8 + rng.uniform(0, height - bare) * 0.4)
        parts.append(part(BALL, at, size, "leaf"))
    return (2 * radius + 0.3, 2 * radius + 0.3), parts


def pole(rng):
    radius, height = rng.uniform(0.04, 0.15), rng.uniform(2.2, 8)
    parts = [part(POST, (0, 0, height / 2), (radius, radius, height / 2), "steel")]
    if rng.random() < 0.6:  # a traffic sign, sometimes as low as a head
        size = rng.uniform(0.2, 0.45)
        parts.append(part(BOX, (0.05, 0, rng.uniform(1.5, min(height, 2.8))), (0.02, size, size), "plate"))
    return (0.4, 0.4), parts


def bin_or_hydrant(rng):
    radius, height = rng.uniform(0.12, 0.32), rng.uniform(0.6, 1.7)
    parts = [part(POST, (0, 0, height / 2), (radius, radius * rng.uniform(0.8, 1.2), height / 2), "stone")]
    if rng.random() < 0.5:
        parts.append(part(BALL, (0, 0, height), (radius * 0.8, radius * 0.8, 0.14), "stone"))
    return (0.7, 0.7), parts


def bush(rng):
    length, width, height = rng.uniform(0.5, 4), rng.uniform(0.5, 1.8), rng.uniform(0.6, 2.2)
    parts = []
    for _ in range(rng.integers(1, 5)):
        at = (
            rng.uniform(-0.3, 0.3) * length,
            rng.uniform(-0.2, 0.2) * width,
            height * rng.uniform(0.35, 0.6),
        )
        parts.append(part(BALL, at, (length * 0.33, width * 0.4, height * 0.45), "hedge"))
    return (length, width), parts


def hedge(rng):
    length, width, height = rng.uniform(3, 14), rng.uniform(0.5, 1.3), rng.uniform(0.8, 2.2)
    return (length, width), [part(BOX, (0, 0, height / 2), (length / 2, width / 2, height / 2), "hedge")]


def wall(rng):
    length, height = rng.uniform(2, 12), rng.uniform(0.5, 2)
    material = rng.choice(["stone", "fence"])
    return (length, 0.3), [part(BOX, (0, 0, height / 2), (length / 2, 0.1, height / 2 + 0.1), material)]


def dumpster(rng):
    """Car-sized boxes: containers, dumpsters, cabinets."""
    length, width, height = rng.uniform(0.7, 4.6), rng.uniform(0.5, 1.9), rng.uniform(1, 1.9)
    slope = rng.uniform(0, 0.3, 3)
    shade = rng.uniform(0.1, 0.5)
    box = part(
        BOX, (0, 0, height / 2), (length / 2, width / 2, height / 2), "steel", taper=slope, reflectance=shade
    )
    return (length, width), [box]


def bike_stand(rng):
    return (1.7, 0.7), bicycle(rng.uniform(1.6, 1.9))


def bench(_rng):
    seat = part(BOX, (0, 0, 0.42), (0.25, 0.8, 0.03), "bark")
    return (0.7, 1.7), [seat, part(BOX, (-0.28, 0, 0.6), (0.03, 0.8, 0.2), "bark")]


CLUTTER: dict[str, Callable] = {
    "tree": tree, "pole": pole, "bin": bin_or_hydrant, "bush": bush, "hedge": hedge, "wall": wall,
    "dumpster": dumpster, "bicycle": bike_stand, "bench": bench,
}  # fmt: skip
