"""Measures tokenizers on a text: fertility, bytes a token, words kept whole, and how much of each vocabulary occurs.

    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer --input recipes/quickstart/corpus/az
    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer* --input recipes/quickstart/corpus/az
    python data_tools/eval_tokenizer.py --config recipes/quickstart/fertility.yaml --check

Any file of the `tokenizers` library will do: byte-level BPE, WordPiece, Unigram. The figures are pooled over all
documents and printed with the rules they were counted by: fertility moves by 0.2 to 0.3 with the rule alone. With a
recipe or --output_dir its folder gets table.md, results.json and tokenizers.png; with neither they are only printed.
"""

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dilqur.atomic import atomic_files, write_json
from dilqur.documents import ReadingSettings, read_input
from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Documents, Stage, StageSettings, TokenizerPath, display_names
from dilqur.tokenizer import TextTokenizer
from dilqur.whole_words import words_kept_whole

BATCH = 256  # documents handed to a tokenizer at a time
RULES = {
    "fertility": "tokens without special tokens / whitespace-separated words, punctuation left on the words",
    "bytes_per_token": "UTF-8 bytes of the text, white space included / tokens without special tokens",
    "words_kept_whole": "share of the whitespace-separated words that are one token where they stand in the text, "
    "with or without the space before",
    "vocab_size": "number of ids, special tokens included",
    "vocab_share_used": "share of those ids that occur in this text",
}


@dataclass(kw_only=True)
class EvalTokenizerSettings(StageSettings, ReadingSettings):
    tokenizer: list[TokenizerPath] = field(metadata={"help": "folders with a tokenizer.json, or such files"})
    names: list[str] | None = field(default=None, metadata={"help": "what to call them; none: their folders' names"})
    input: list[Documents] = field(metadata={"help": "files, folders or globs: text that no tokenizer was trained on"})
    json: bool = field(default=False, metadata={"help": "one JSON object on standard output"})


# -- one tokenizer ----------------------------------------------------------------------------------------------------


class Counter:
    """The sums for one tokenizer."""

    def __init__(self, path):
        self.tokenizer = TextTokenizer(path)
        self.backend = self.tokenizer.backend
        model = json.loads(self.backend.to_str())["model"]
        self.unknown = model.get("unk_id", self.backend.token_to_id(model.get("unk_token") or ""))
        self.tokens = self.unknown_tokens = self.whole = 0
        self.occurs = np.zeros(self.tokenizer.size, bool)

    def add(self, texts):
        for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            self.tokens += len(encoding.ids)
            self.unknown_tokens += encoding.ids.count(self.unknown)
            self.whole += words_kept_whole(encoding, text, self.unknown)
            self.occurs[encoding.ids] = True

    def result(self, words, utf8_bytes):
        return {
            "fertility": round(self.tokens / words, 4),
            "bytes_per_token": round(utf8_bytes / self.tokens, 4),
            "words_kept_whole": round(self.whole / words, 4),
            "vocab_size": self.tokenizer.size,
            "vocab_share_used": round(float(self.occurs.mean()), 4),
            "tokens": self.tokens,
            "unknown_tokens": self.unknown_tokens,
            "tokenizer": str(self.tokenizer.path),
            "tokenizer_sha256": self.tokenizer.hash,
        }


# -- all of them ------------------------------------------------------------------------------------------------------


def names_of(paths, names):
    """{name: path}. By default the name of the folder, or of the file (gpt2.tokenizer.json.gz) up to the dot."""
    if names is None:
        shown = display_names([str(Path(p).parent) if Path(p).name == "tokenizer.json" else p for p in paths])
        names = [re.sub(r"(\.tokenizer)?\.json(\.gz)?$", "", name) for name in shown]
    if not len(set(names)) == len(names) == len(paths):
        raise InputError(f"--names: {', '.join(names)} for {len(paths)} tokenizers: give each one, all different")
    return dict(zip(names, paths, strict=True))


def table(results):
    """The results as Markdown, with the rules they were counted by."""
    lines = [
        "| tokenizer | fertility | bytes a token | words kept whole | vocabulary | of it occurs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in results["tokenizers"].items():
        lines.append(
            f"| {name} | {r['fertility']:.3f} | {r['bytes_per_token']:.3f} | {r['words_kept_whole']:.1%} "
            f"| {r['vocab_size']:,} | {r['vocab_share_used']:.1%} |"
        )
    size = f"{results['documents']:,} documents, {results['words']:,} words, {results['utf8_bytes']:,} bytes of UTF-8."
    return "\n".join([*lines, "", size, "", *(f"- {name}: {rule}" for name, rule in RULES.items()), ""])


def plot(measured, path):
    """Fertility and bytes a token as bars, one a tokenizer, in a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"fertility": "tokens a word (fewer is better)", "bytes_per_token": "bytes a token (more is better)"}
    height = 1.2 + 0.5 * len(measured)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        bars = axis.barh(list(measured), [r[key] for r in measured.values()], color="#2a6f97")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # the first one on top
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@program
def main():
    settings = parse(EvalTokenizerSettings, __doc__)
    stage = Stage(settings, __file__, prints_only_without_folder=True)
    stage.refuse_finished()
    counters = {name: Counter(path) for name, path in names_of(settings.tokenizer, settings.names).items()}
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()

    count = {"documents": 0, "words": 0, "utf8_bytes": 0}
    documents, skipped = read_input(settings)
    with tqdm(desc=stage.name, unit="B", unit_scale=True, disable=None) as bar:
        while texts := [d.text for d in itertools.islice(documents, BATCH)]:
            size = sum(len(text.encode("utf-8")) for text in texts)
            count["documents"] += len(texts)
            count["words"] += sum(len(text.split()) for text in texts)
            count["utf8_bytes"] += size
            for counter in counters.values():
                counter.add(texts)
            bar.update(size)
    if not count["words"]:
        raise InputError(f"{' '.join(settings.input)}: no word in there: nothing to measure")

    measured = {name: counter.result(count["words"], count["utf8_bytes"]) for name, counter in counters.items()}
    results = {**count, "bad_records": skipped.count, "rules": RULES, "tokenizers": measured}
    if stage.folder:
        with atomic_files(stage.folder) as part:
            write_json(part / "results.json", results)
            (part / "table.md").write_text(table(results), encoding="utf-8")
            plot(measured, part / "tokenizers.png")
    stage.finish({"tokenizers": measured})
    print(json.dumps(results, ensure_ascii=False) if settings.json else table(results))
    return None


if __name__ == "__main__":
    main()
