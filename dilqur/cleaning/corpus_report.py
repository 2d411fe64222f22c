"""What cleaning did to a corpus, to read and to look at: report.json, report.md and lengths.png."""

import numpy as np

from dilqur.common.atomic import atomic_file, write_json

EXAMPLES = 5  # documents shown for each reason
BINS = 120  # lengths in characters, five bins to a doubling: up to 2²⁴


def length_bins(lengths):
    """int64 array of shape (BINS,): how many of `lengths` (characters) fall in each bin of a logarithmic scale."""
    bins = (np.log2(np.maximum(1, np.asarray(lengths, np.float64))) * 5).astype(np.int64)
    return np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)


def write_report(report, folder):
    """report: as clean_corpus collects it. Writes the three files into `folder`."""
    plain = {
        **report,
        "sources": {
            name: {**part, "read": part["read"].tolist(), "kept": part["kept"].tolist()}
            for name, part in report["sources"].items()
        },
    }
    write_json(folder / "report.json", plain)
    with atomic_file(folder / "report.md", "w", encoding="utf-8") as file:
        file.write(markdown(report))
    plot(report["sources"], folder / "lengths.png")


def markdown(report):
    """The report as text: counts by source, what was done to documents, and examples for each reason."""
    names, counts = list(report["sources"]), report["counts"]
    parts = [part["counts"] for part in report["sources"].values()]
    lines = [
        "# What cleaning did", "",
        f"| | {' | '.join(names)} | all |", "|---|" + "---:|" * (len(names) + 1),
        _row("documents read", [p["read"] for p in parts]),
        _row("kept for training", [p["kept_train"] for p in parts]),
        _row("kept for validation", [p["kept_validation"] for p in parts]),
        *(_row(f"dropped: {reason}", [p[reason] for p in parts]) for reason in report["dropped"]),
        _row("bytes kept", [p["bytes_train"] + p["bytes_validation"] for p in parts]), "",
    ]  # fmt: skip
    share = (counts["kept_train"] + counts["kept_validation"]) / max(1, counts["read"])
    lines += [f"{share:.1%} of the documents that were read are kept. ![lengths](lengths.png)", ""]
    if report["done"]:
        lines += [
            "Found in the documents: " + ", ".join(f"{name} {n:,}" for name, n in report["done"].items()) + ".",
            "",
        ]
    for reason in report["dropped"]:
        examples = [e for part in report["sources"].values() for e in part["examples"].get(reason, ())][:EXAMPLES]
        if examples:
            lines += [f"## {reason}", ""]
            lines += [f"- `{where}`: {' '.join(text.split())[:160]}" for where, text in examples] + [""]
    return "\n".join(lines)


def _row(title, values):
    return f"| {title} | " + " | ".join(f"{value:,}" for value in (*values, sum(values))) + " |"


def plot(sources, path):
    """How long the documents are, read and kept, one panel a source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = 2 ** (np.arange(BINS + 1) / 5)
    figure, axes = pyplot.subplots(
        len(sources), 1, figsize=(8, 2.6 * len(sources)), layout="constrained", squeeze=False
    )
    for axis, (name, part) in zip(axes[:, 0], sources.items(), strict=True):
        axis.stairs(part["read"], edges, label="read", color="#9aa5b1", fill=True, alpha=0.5)
        axis.stairs(part["kept"], edges, label="kept", color="#2a6f97", linewidth=1.6)
        used = np.flatnonzero(part["read"])
        axis.set_xlim(edges[used[0]] / 1.5, edges[used[-1] + 1] * 1.5) if len(used) else None
        axis.set(xscale="log", xlabel="characters", ylabel="documents", title=name)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
