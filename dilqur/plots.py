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


def save(figure, path):
    """Write a figure as PNG, and let go of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure.savefig(Path(path), dpi=150)
    open_pyplot().close(figure)
