"""The pictures of eval_tokenizer: bars of tokenizers side by side, words cut into their tokens, a curve over vocabulary sizes."""

from dilqur.common.plots import RED, bars_with_intervals, open_pyplot, save

BOXES = ("#bcd9ea", "#f6cfa8", "#c7e3c0", "#e8c6df", "#e9e2a6")  # one after the other, as tokens come


def plot_bars(measured, path):
    """Fertility and bytes per token with their intervals, a bar each of {name: figures}, in a PNG."""
    shown = {"fertility": "tokens per word (fewer is better)", "bytes_per_token": "bytes per token (more is better)"}
    size = (10, 1.2 + 0.5 * len(measured))
    figure, axes = open_pyplot().subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        values = [r[key] or 0 for r in measured.values()]
        bars = bars_with_intervals(axis, list(measured), values, [r["intervals"][key] for r in measured.values()])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()  # the first one on top
    save(figure, path)


def plot_splits(splits, path, columns=3):
    """{word: {tokenizer: its pieces}} as coloured boxes, a row a word and a panel a tokenizer, in a PNG. All at one scale."""
    names = list(next(iter(splits.values())))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    width = max(sum(len(piece) + 0.4 for piece in s[name]) for s in splits.values() for name in names)
    size = (1.3 + 0.12 * max(width, 12) * columns, rows * (0.6 + 0.36 * len(splits)))
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis in axes.flat:
        axis.set(xlim=(0, max(width, 12)), ylim=(len(splits) - 0.5, -0.5), xticks=[])
        axis.set_yticks(range(len(splits)), splits)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        axis.set_title(name, loc="left")
        for row, s in enumerate(splits.values()):
            x = 0
            for number, piece in enumerate(s[name]):
                length = len(piece) + 0.3
                colour = BOXES[number % len(BOXES)]
                axis.add_patch(pyplot.Rectangle((x, row - 0.38), length, 0.76, facecolor=colour))
                at = (x + length / 2, row)
                axis.text(*at, piece, ha="center", va="center_baseline", family="monospace", size=10)
                x += length + 0.1
    save(figure, path)


def plot_sweeps(sweeps, path):
    """Fertility against vocabulary size, a line for each of [{"names", "vocab_sizes", "fertility", "intervals", "knee"}], in a
    PNG; the knee marked."""
    figure, axis = open_pyplot().subplots(figsize=(8, 5), layout="constrained")
    for sweep in sweeps:
        sizes, values = sweep["vocab_sizes"], sweep["fertility"]
        (line,) = axis.plot(sizes, values, marker="o")
        if all(sweep["intervals"]):
            axis.fill_between(sizes, *zip(*sweep["intervals"], strict=True), color=line.get_color(), alpha=0.2)
        for name, *point in zip(sweep["names"], sizes, values, strict=True):
            axis.annotate(name, point, xytext=(4, 6), textcoords="offset points")
        if sweep["knee"]:
            at = sweep["names"].index(sweep["knee"])
            axis.axvline(sizes[at], color=RED, linestyle="--", linewidth=1)
            axis.annotate("knee", (sizes[at], max(values)), xytext=(4, 0), textcoords="offset points", color=RED)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({size for sweep in sweeps for size in sweep["vocab_sizes"]}))
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axis.tick_params(axis="x", rotation=45)
    axis.set(xlabel="vocabulary (bytes and merges)", ylabel="tokens per word")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
