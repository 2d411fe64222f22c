"""The picture of eval_encoder: a bar with its interval for each encoder, and lines over how often a word was seen."""

from dilqur.common.plots import bars_with_intervals, open_pyplot, save


def plot_scores(result, path):
    """Scores with their intervals, each seed a dot, of an eval_encoder result; for masked words also by frequency, in a PNG."""
    models = result["models"]
    panels = 2 if "in_group" in result else 1
    size = (6 * panels, max(3.5 * (panels - 1), 1.4 + 0.5 * len(models)))
    figure, axes = open_pyplot().subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    bars = axes[0, 0]
    values = [f["score"] for f in models.values()]
    bars_with_intervals(bars, list(models), values, [f["interval"] for f in models.values()], alpha=0.85)
    for row, figures in enumerate(models.values()):
        seeds = figures.get("scores", [])
        bars.plot(seeds, [row] * len(seeds), "o", color="black", markersize=3)
        bars.text(0.01 * max(values), row, f"{figures['score']:.3f}", va="center", color="white", weight="bold")
    bars.set_title(f"{result['metric']}, 95 % intervals")
    bars.invert_yaxis()  # the first one on top
    if panels == 2:
        lines = axes[0, 1]
        for name, figures in models.items():
            shown = [(key, share) for key, share in figures["by_frequency"].items() if share is not None]
            lines.plot(*zip(*shown, strict=True), marker="o", label=name)
        lines.set_title("words guessed, by how often they were seen")
        lines.tick_params(axis="x", rotation=20)
        lines.legend(frameon=False)
        lines.spines[["top", "right"]].set_visible(False)
    save(figure, path)
