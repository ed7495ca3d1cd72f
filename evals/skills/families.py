"""`functions-told` and `functions-stripped`: small regression problems, once with their story and once as bare numbers.

After Qian et al. 2024 (arXiv 2410.04541): what a model makes of a pattern in numbers, and what it adds when it is told what
they mean. An item shows five pairs (x, y) of one function and asks for y at a sixth x. Both files hold the same numbers under the
same ids, so that items pair. There is no noise: y is the law's value, rounded to the printed digits. Twenty-four laws are
the clusters, ten items each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skillkit import draw, shuffled

PER_FAMILY = 10
SHOWN = 5


@dataclass(frozen=True)
class Family:
    """One law: `story` and `line` tell it, `law(x, *parameters)` is rounded to `digits` decimals."""

    name: str
    story: str
    line: str
    xs: Sequence[float]
    law: Callable[..., float]
    parameters: Sequence[tuple[float, ...]] = ((),)
    digits: int = 0


def income_tax(income: float, allowance: float) -> float:
    """Nothing up to the allowance, 20 % of the next 20, 40 % of what lies above."""
    return 0.2 * min(max(income - allowance, 0), 20) + 0.4 * max(income - allowance - 20, 0)


FAMILIES = (
    Family("travel", "A train runs at a constant speed.", "After {x} h it has gone {y} km.",
           range(1, 13), lambda x, v: v * x, [(v,) for v in (45, 60, 72, 80, 95, 110)]),
    Family("rectangle", "Rectangles of the same width are cut from a sheet.", "With a length of {x} cm the area is {y} square cm.",
           range(3, 21), lambda x, w: w * x, [(w,) for w in (4, 6, 7, 9, 12)]),
    Family("square", "Square tiles come in several sizes.", "A tile with a side of {x} cm has an area of {y} square cm.",
           range(3, 21), lambda x: x * x),
    Family("fahrenheit", "Temperatures are converted from degrees Celsius to degrees Fahrenheit.", "{x} C is {y} F.",
           range(-15, 45, 3), lambda x: (9 * x + 160) / 5, digits=1),
    Family("sales-tax", "A shop adds the same rate of sales tax to every price.", "A net price of {x} euros is {y} euros with tax.",
           range(10, 130, 10), lambda x, r: x * (100 + r) / 100, [(r,) for r in (5, 8, 12, 19, 25)], 2),
    Family("pendulum", "Pendulums of several lengths swing freely.", "A length of {x} cm gives a period of {y} s.",
           range(20, 320, 20), lambda x: 2 * math.pi * math.sqrt(x / 981), digits=2),
    Family("cooling", "A cup of tea cools down in a room of 20 C.", "After {x} min the tea has {y} C.",
           range(0, 60, 4), lambda x, t, k: 20 + (t - 20) * math.exp(-x / k), [(t, k) for t in (80, 90) for k in (15, 20, 30)], 1),
    Family("interest", "Money is left in a savings account with compound interest.", "After {x} years the account holds {y} euros.",
           range(2, 21), lambda x, p, r: p * (1 + r / 100) ** x, [(p, r) for p in (100, 500) for r in (4, 6, 9)]),
    Family("fall", "A stone falls from rest.", "After {x} s it has fallen {y} m.",
           [n / 2 for n in range(1, 17)], lambda x: 4.905 * x * x, digits=1),
    Family("ohm", "Resistors are connected to the same battery.", "With {x} ohms the current is {y} amperes.",
           (2, 3, 4, 5, 6, 8, 10, 12, 15, 20), lambda x, v: v / x, [(v,) for v in (6, 9, 12, 24)], 2),
    Family("body-mass", "People of the same weight have their body-mass index computed.", "At a height of {x} cm the index is {y}.",
           range(150, 206, 4), lambda x, w: w / (x / 100) ** 2, [(w,) for w in (55, 65, 75, 90)], 1),
    Family("shipping", "A parcel costs a base fee and a price for each kg.", "Shipping {x} kg costs {y} euros.",
           range(1, 16), lambda x, a, b: a + b * x, [(4, 1.5), (5, 0.8), (6, 2.5), (3, 1.2), (8, 0.5)], 2),
    Family("circle", "Round tables come in several sizes.", "A table with a radius of {x} cm has an area of {y} square cm.",
           range(20, 95, 5), lambda x: math.pi * x * x),
    Family("cube", "Boxes in the shape of a cube are filled with water.", "A box with an edge of {x} cm holds {y} cubic cm.",
           range(2, 16), lambda x: x**3),
    Family("braking", "A car brakes as hard as it can.", "At {x} km/h it needs {y} m to stop.",
           range(20, 150, 10), lambda x, f: (x / 3.6) ** 2 / (2 * 9.81 * f), [(f,) for f in (0.4, 0.6, 0.8)], 1),
    Family("decay", "A radioactive sample decays.", "After {x} days it weighs {y} grams.",
           range(0, 26, 2), lambda x, m, h: m * 2 ** (-x / h), [(m, h) for m in (80, 200) for h in (4, 6, 9)], 1),
    Family("tank", "A full tank is emptied through a tap at a constant rate.", "After {x} minutes it holds {y} litres.",
           range(0, 28, 2), lambda x, v, r: v - r * x, [(200, 7), (150, 4), (300, 11), (120, 3)]),
    Family("journey", "Cyclists ride the same road from one town to the other.", "At {x} km/h the ride takes {y} hours.",
           (8, 10, 12, 15, 16, 18, 20, 24, 25, 30), lambda x, d: d / x, [(d,) for d in (30, 48, 60, 90)], 2),
    Family("energy", "A ball moves, and its kinetic energy is measured.", "At {x} m/s it has {y} joules.",
           range(2, 20), lambda x, m: m * x * x / 2, [(m,) for m in (0.4, 1, 3, 5)], 1),
    Family("wheel", "A Ferris wheel turns evenly, one turn in 12 min; the ride begins at the bottom.",
           "After {x} min the seat is {y} m high.",
           range(0, 25), lambda x, r: r + 2 - r * math.cos(math.pi * x / 6), [(r,) for r in (20, 30, 45)], 1),
    Family("lamp", "A lamp shines on a wall, and the brightness is measured.", "At {x} m it is {y} lux.",
           (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10), lambda x, i: i / (x * x), [(i,) for i in (200, 450, 800, 1500)], 1),
    Family("throw", "A ball is thrown straight up from the ground.", "After {x} s it is {y} m high.",
           [n / 4 for n in range(1, 16)], lambda x, v: v * x - 4.905 * x * x, [(v,) for v in (20, 24, 30)], 1),
    Family("income-tax", "Income tax: nothing up to an allowance, then rates that rise.",
           "On an income of {x} thousand the tax is {y} thousand.",
           range(5, 80, 5), income_tax, [(a,) for a in (8, 10, 12)], 1),
    Family("decibel", "Sound levels are computed from the ratio to the weakest sound that can be heard.",
           "A ratio of {x} is {y} decibels.",
           (2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000), lambda x: 10 * math.log10(x), digits=1),
)  # fmt: skip


def rows(told: bool) -> list[dict[str, object]]:
    """Every item of all families, with its story or as bare pairs."""
    return [item(family, number, told) for family in FAMILIES for number in range(PER_FAMILY)]


def item(family: Family, number: int, told: bool) -> dict[str, object]:
    """One problem: prompt, answer and the numbers that a scorer needs."""
    query, shown, answer = problem(family, number)
    line = family.line if told else "x = {x}, y = {y}"
    lines = [family.story] if told else []
    lines += [line.format(x=plain(x), y=plain(y)) for x, y in shown]
    lines.append(line.partition("{y}")[0].rstrip().format(x=plain(query)))
    return {
        "id": f"functions-{FAMILIES.index(family) * PER_FAMILY + number:05d}",
        "cluster": family.name,
        "prompt": "\n".join(lines),
        "answer": plain(answer),
        "query": query,
        "shown": [[x, y] for x, y in shown],
    }


def problem(family: Family, number: int) -> tuple[float, list[tuple[float, float]], float]:
    """Query x, shown pairs and the query's y. Within a family no query comes twice with the same parameters.

    A draw whose shown y are all alike is drawn again: the error is measured in their range.
    """
    queries = shuffled([float(x) for x in family.xs], family.name, "query")
    query = queries[number % len(queries)]
    parameters = family.parameters[(number + draw(family.name)) % len(family.parameters)]
    others = [float(x) for x in family.xs if x != query]
    for turn in range(100):
        xs = shuffled(others, family.name, number, turn)[:SHOWN]
        shown = [(x, value(family, x, parameters)) for x in xs]
        if len({y for _, y in shown}) > 1:
            return query, shown, value(family, query, parameters)
    raise ValueError(f"{family.name}: no draw with two different y")


def value(family: Family, x: float, parameters: tuple[float, ...]) -> float:
    """The law's value, rounded as it is printed. A billionth is added first: a tie falls upwards on every machine."""
    return round(float(family.law(x, *parameters)) + 1e-9, family.digits)


def plain(number: float) -> str:
    """A number as a person writes it: no trailing zeros, no exponent."""
    return f"{number:.4f}".rstrip("0").rstrip(".")
