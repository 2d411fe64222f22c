"""A line chart as numbers that the page draws: 530 × 296 units, the plot from (44, 12) to (504, 250)."""

import math


def short(number, unit=""):
    """1467205 → "1.47 M"; with the unit B "1.47 MB"."""
    scale, letter = next(((s, c) for s, c in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= s), (1, ""))
    return f"{number / scale:.3g} {letter}{unit}".strip()


def ticks(low, high):
    """About five round numbers that begin at or below `low` and end at or above `high`."""
    power = 10 ** math.floor(math.log10((high - low or 1) / 5))
    step = power * next(m for m in (1, 2, 5, 10) if (high - low or 1) <= 5 * power * m)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def chart(title, x_label, unit, names, lines, dots):
    """A figure with lines and dots, {name: [(x, y), …]}. names: all there may be, for their colours; `unit` is that of x."""
    points = [point for part in (*lines.values(), *dots.values()) for point in part]
    xs, ys = ticks(0, max(x for x, _ in points)), ticks(min(y for _, y in points), max(y for _, y in points))

    def at(x, y):
        return round(44 + 460 * x / xs[-1], 1), round(250 - 238 * (y - ys[0]) / (ys[-1] - ys[0]), 1)

    return {
        "kind": "chart",
        "title": title,
        "x_label": x_label,
        "x_ticks": [(at(x, ys[0])[0], short(x, unit)) for x in xs],
        "y_ticks": [(at(0, y)[1], f"{y:g}") for y in ys],
        "lines": [
            {
                "name": name,
                "colour": names.index(name) % 8,
                "points": " ".join(f"{x},{y}" for x, y in (at(*point) for point in line)),
                "dots": [(*at(x, y), f"{name}: {y:.4f}") for x, y in dots.get(name, ())],
            }
            for name, line in lines.items()
        ],
    }


def thin(points, most=300):
    """At most `most` points: the means of stretches of equal length."""
    size = -(-len(points) // most)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]
