"""What the pictures of all programs have in common."""

import warnings
from pathlib import Path

BLUE, RED = "#2a6f97", "#c1440e"


def open_pyplot():
    """matplotlib.pyplot for files alone, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["text.parse_math"] = False  # a $ in a word or a name is a dollar sign
    return pyplot


def bars_with_intervals(axis, names, values, intervals, **style):
    """A horizontal bar for each name, from below, with a line from end to end of its interval (None: without). Returns the bars."""
    ends = [interval or (value, value) for interval, value in zip(intervals, values, strict=True)]
    errors = [[max(0, value - low) for value, (low, _) in zip(values, ends, strict=True)]]
    errors += [[max(0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]
    bars = axis.barh(names, values, color=BLUE, xerr=errors, ecolor="black", **style)
    axis.spines[["top", "right"]].set_visible(False)
    return bars


def save(figure, path):
    """Write a figure as PNG, and let go of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure.savefig(Path(path), dpi=150)
    open_pyplot().close(figure)
