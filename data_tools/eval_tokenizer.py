"""Measures tokenizers on a text: fertility, bytes a token, words kept whole, and how much of each vocabulary occurs.

    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer --input recipes/quickstart/corpus/az
    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer{-base,} --input runs/quickstart/clean/validation --json
    python data_tools/eval_tokenizer.py --config recipes/quickstart/fertility.yaml --check

Any `tokenizers` file will do: byte-level BPE, WordPiece, Unigram. The figures are pooled over all documents, and are only
comparable when counted by the same rules: those in RULES, printed with every table. With a recipe or --output_dir the
folder gets table.md, results.json and tokenizers.png; with neither the table, or with --json one object, is printed.
"""

import itertools
import json
import re
import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from dilqur.atomic import atomic_file, write_json
from dilqur.documents import expand, read
from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Documents, Stage, StageSettings, TokenizerPath, display_names
from dilqur.tokenizer import TextTokenizer

BATCH = 256  # documents handed to a tokenizer at a time
RULES = {
    "fertility": "tokens without special tokens / whitespace-separated words, punctuation left on the words",
    "bytes_per_token": "UTF-8 bytes of the text, white space included / tokens without special tokens",
    "words_kept_whole": "share of the whitespace-separated words that stand in the text as one token, alone or with the space before",
    "vocab_size": "number of ids, special tokens included",
    "vocab_share_used": "share of those ids that occur in this text",
}


@dataclass(kw_only=True)
class EvalTokenizerSettings(StageSettings):
    tokenizer: list[TokenizerPath] = field(metadata={"help": "folders with a tokenizer.json, or such files (.json, .json.gz)"})
    names: list[str] | None = field(default=None, metadata={"help": "what to call them in the table; their folders' names"})
    input: list[Documents] = field(metadata={"help": "files, folders or globs: text that no tokenizer was trained on"})
    text_field: str = field(default="text", metadata={"help": "key or column that holds the text"})
    sample_by: Literal["line", "paragraph", "document"] = field(default="line", metadata={"help": "one document of a .txt"})
    skip_bad_records: bool = field(default=False, metadata={"help": "skip and count broken JSON and UTF-8 instead of stopping"})
    json: bool = field(default=False, metadata={"help": "one JSON object on standard output"})


# -- one tokenizer ----------------------------------------------------------------------------------------------------


def words_kept_whole(encoding, text, unknown):
    """How many whitespace-separated words of `text` are one token. unknown: id of the unknown token, which keeps nothing."""
    starts, ends = zip(*encoding.offsets, strict=True) if encoding.offsets else ((), ())
    kept = 0
    for word in re.finditer(r"\S+", text):
        first, stop = bisect_right(ends, word.start()), bisect_left(starts, word.end())  # the tokens that touch the word
        if stop - first == 1 and encoding.ids[first] != unknown:
            kept += text[starts[first] : ends[first]].strip() == word.group()
    return kept


class Counter:
    """The sums for one tokenizer."""

    def __init__(self, path):
        self.tokenizer = TextTokenizer(path)
        model = json.loads(self.tokenizer.backend.to_str())["model"]
        self.unknown = model.get("unk_id", self.tokenizer.backend.token_to_id(model.get("unk_token") or ""))
        self.tokens = self.unknown_tokens = self.whole = 0
        self.occurs = np.zeros(self.tokenizer.size, bool)

    def add(self, texts):
        for text, encoding in zip(texts, self.tokenizer.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            self.tokens += len(encoding.ids)
            self.unknown_tokens += encoding.ids.count(self.unknown)
            self.whole += words_kept_whole(encoding, text, self.unknown)
            self.occurs[encoding.ids] = True

    def result(self, words, utf8_bytes):
        return {
            "fertility": round(self.tokens / words, 4), "bytes_per_token": round(utf8_bytes / self.tokens, 4),
            "words_kept_whole": round(self.whole / words, 4), "vocab_size": self.tokenizer.size,
            "vocab_share_used": round(float(self.occurs.mean()), 4), "tokens": self.tokens,
            "unknown_tokens": self.unknown_tokens, "tokenizer": str(self.tokenizer.path), "tokenizer_sha256": self.tokenizer.hash,
        }


# -- all of them ------------------------------------------------------------------------------------------------------


def names_of(paths, names):
    """{name: path}. The default name is the folder's; for a file of its own (gpt2.tokenizer.json.gz) what stands before the dot."""
    if names is None:
        shown = display_names([str(Path(p).parent) if Path(p).name == "tokenizer.json" else p for p in paths])
        names = [re.sub(r"(\.tokenizer)?\.json(\.gz)?$", "", name) for name in shown]
    if not len(set(names)) == len(names) == len(paths):
        raise InputError(f"--names: {len(names)} given ({', '.join(names)}) for {len(paths)} tokenizers: one each, all different")
    return dict(zip(names, paths, strict=True))


def table(results):
    """The results as Markdown, with the rules they were counted by."""
    lines = ["| tokenizer | fertility | bytes a token | words kept whole | vocabulary | of it occurs |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | {r['fertility']:.3f} | {r['bytes_per_token']:.3f} | {r['words_kept_whole']:.1%} | {r['vocab_size']:,} | "
              f"{r['vocab_share_used']:.1%} |" for name, r in results["tokenizers"].items()]
    lines += ["", f"{results['documents']:,} documents, {results['words']:,} words, {results['utf8_bytes']:,} bytes of UTF-8.", ""]
    lines += [f"- {name}: {rule}" for name, rule in RULES.items()]
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Fertility and bytes a token as bars, one a tokenizer, in a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.5 * len(results)), layout="constrained", sharey=True)
    for axis, key, title in zip(axes, ("fertility", "bytes_per_token"), ("tokens a word (fewer is better)", "bytes a token"), strict=True):
        bars = axis.barh(list(results), [r[key] for r in results.values()], color="#2a6f97")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # the first one on top
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
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

    skipped = []

    def bad(message):
        skipped.append(message)
        print(f"skipped: {message}", file=sys.stderr)

    results = {"documents": 0, "words": 0, "utf8_bytes": 0}
    documents = read(expand(settings.input), settings.text_field, settings.sample_by, bad if settings.skip_bad_records else None)
    with tqdm(desc=stage.name, unit="B", unit_scale=True, disable=None) as bar:
        while texts := [d.text for d in itertools.islice(documents, BATCH)]:
            size = sum(len(text.encode("utf-8")) for text in texts)
            results["documents"] += len(texts)
            results["words"] += sum(len(text.split()) for text in texts)
            results["utf8_bytes"] += size
            for counter in counters.values():
                counter.add(texts)
            bar.update(size)
    if not results["words"]:
        raise InputError(f"{' '.join(settings.input)}: no word in there: nothing to measure")

    measured = {name: counter.result(results["words"], results["utf8_bytes"]) for name, counter in counters.items()}
    results = {**results, "bad_records": len(skipped), "rules": RULES, "tokenizers": measured}
    if stage.folder:
        write_json(stage.folder / "results.json", results)
        with atomic_file(stage.folder / "table.md", "w", encoding="utf-8") as file:
            file.write(table(results))
        plot(measured, stage.folder / "tokenizers.png")
    stage.finish({"tokenizers": measured})
    print(json.dumps(results, ensure_ascii=False) if settings.json else table(results), end="\n" if settings.json else "")
    return None


if __name__ == "__main__":
    main()
