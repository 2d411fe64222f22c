"""Measures tokenizers on sets of documents: tokens per word by three rules, bytes per token, use of the vocabulary, parity.

    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer --input recipes/quickstart/corpus/az
    python data_tools/eval_tokenizer.py --tokenizer runs/quickstart/tokenizer* --input recipes/quickstart/corpus/az/*
    python data_tools/eval_tokenizer.py --config recipes/quickstart/fertility.yaml --check

Any file of the `tokenizers` library will do: byte-level BPE, WordPiece, Unigram; a folder of several (a sweep of vocabulary sizes)
stands for all of them. Every item of --input is a document set; a recipe may name them instead, and give translations, to
measure what the language costs beside another:

    document_sets: [{name: law, input: [data/law]}, {name: web, input: [data/web]}]
    parallel: [{name: flores, input: flores/az.txt, reference: flores/en.txt}]     # line n is the translation of line n

All figures are given for each set and pooled over all documents, with 95 % intervals, and the rules they were counted by. With
a recipe or --output_dir its folder gets table.md, results.json, tokenizers.png, splits.png (how words split) and, of three or more
sizes of one training, sweep.png; with neither they are only printed.
"""

import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Required

import numpy as np
from pydantic import Field
from tqdm import tqdm
from typing_extensions import TypedDict

from dilqur.common.atomic import atomic_files, write_json
from dilqur.common.bootstrap import divide, interval, resampled_ratios
from dilqur.common.errors import InputError
from dilqur.common.paths import COMPRESSIONS, FORMATS, expand, tokenizer_paths
from dilqur.data.documents import ReadingSettings, Skipped, read
from dilqur.evals.model_names import display_names
from dilqur.pipeline.inputs import Documents, TokenizersPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.fertility import RULES, Batch, Counter, SetCounts, rounded
from dilqur.tokenizer.sweep import knee, nested_families
from dilqur.tokenizer.table import table
from dilqur.tokenizer.word_splits import CANDIDATES, WordCounts, WordSplitter, choose_words, costly_words

# documents, and characters, handed to a tokenizer at a time: `tokenizers` takes a hundred times the memory of a text
BATCH, BATCH_CHARACTERS = 256, 1 << 20
TIMED_CHARACTERS, ROUNDS = 1 << 18, 5
ENDING = re.compile(rf"(?i)({'|'.join(map(re.escape, FORMATS))})?({'|'.join(map(re.escape, COMPRESSIONS))})?$")


class DocumentSet(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    name: Required[str]
    input: Required[list[Documents]]


class Parallel(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    name: Required[str]
    input: Required[Documents]
    reference: Required[Documents]


@dataclass(kw_only=True)
class EvalTokenizerSettings(StageSettings, ReadingSettings):
    tokenizer: list[TokenizersPath] = setting("folders with a tokenizer.json, such files, or sweeps")
    names: list[str] | None = setting("what to call them; none: their folders' names", default=None)
    input: list[Documents] | None = setting(
        "text no tokenizer was trained on; each file, folder or glob is a document set", default=None
    )
    document_sets: list[DocumentSet] | None = setting("instead: {name: …, input: […]}", default=None)
    parallel: list[Parallel] | None = setting(
        "{name: …, input: …, reference: …}: files whose lines translate each other", default=None
    )
    sample_words: list[str] | None = setting(
        "words to show split; none: frequent ones of the text, short and long", default=None
    )
    seed: Annotated[int, Field(ge=0)] = setting("of the draws that the intervals come from", default=42)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)


# -- what is measured, on what ----------------------------------------------------------------------------------------


def names_of(stated, names):
    """{name: path} of all tokenizers. By default the name of the folder, or of the file (gpt2.tokenizer.json.gz) up to the dot."""
    paths = [path for item in stated for path in tokenizer_paths(item)]
    if not paths:
        raise InputError("tokenizer: an empty list: nothing to measure")
    if names is None:
        shown = display_names([str(Path(p).parent) if Path(p).name == "tokenizer.json" else p for p in paths])
        names = [re.sub(r"(\.tokenizer)?\.json(\.gz)?$", "", name) for name in shown]
    if not len(set(names)) == len(names) == len(paths) or "" in names:
        raise InputError(f"--names: {', '.join(names)} for {len(paths)} tokenizers: give each one, all different")
    return dict(zip(names, paths, strict=True))


def sets_of(settings):
    """{name: files} of the document sets. InputError where a name or a file is in two of them."""
    if bool(settings.input) == bool(settings.document_sets):
        raise InputError("give either --input or, in a recipe, document_sets (a list of {name, input})")
    stated = [(s["name"], s["input"]) for s in settings.document_sets or []]
    if settings.input:
        whole = {path if set("*?[") & set(path) else name: path for name, path in display_names(settings.input).items()}
        short = {ENDING.sub("", name) or name: path for name, path in whole.items()}
        stated = [(name, [path]) for name, path in (short if len(short) == len(whole) else whole).items()]
    sets, owners = {}, {}
    for name, paths in stated:
        if not name.strip() or name in sets:
            raise InputError(f"document_sets: the name {name!r} must not be empty, and must be there only once")
        if not paths:
            raise InputError(f"document_sets: {name}: its input is an empty list")
        sets[name] = expand(paths)
        for file in sets[name]:
            if (owner := owners.setdefault(Path(file).resolve(), name)) != name:
                raise InputError(f"{file}: is in two document sets, {owner} and {name}: take it out of one of them")
    return sets


def pairs_of(parallel, text_field):
    """(texts, reference texts), which translate each other line by line. InputError where they do not stand side by side."""
    name, stated = parallel["name"], [parallel["input"], parallel["reference"]]
    mine, other = (list(read(expand([path]), text_field)) for path in stated)
    if not mine or len(mine) != len(other):
        raise InputError(
            f"parallel: {name}: {len(mine)} lines in {stated[0]}, {len(other)} in {stated[1]}: every line needs its translation"
        )
    for a, b in zip(mine, other, strict=True):
        if a.line != b.line:
            raise InputError(
                f"parallel: {name}: {a.where} would translate {b.where}: a line before is empty in one only"
            )
    return [d.text for d in mine], [d.text for d in other]


def check(settings):
    """({document set: files}, {parallel set: its texts}, {tokenizer: Counter}). Raises InputError."""
    names = [p["name"] for p in settings.parallel or []]
    if len(set(names)) < len(names):
        raise InputError(f"parallel: the names {', '.join(names)} must be distinct")
    if settings.sample_words is not None and not settings.sample_words:
        raise InputError("sample_words: an empty list; leave the key out, and words of the text are shown")
    if wrong := [word for word in settings.sample_words or [] if len(word.split()) != 1 or word.strip() != word]:
        raise InputError(f"sample_words: {wrong[0]!r} is not a word: one without white space is")
    pairs = {p["name"]: pairs_of(p, settings.text_field) for p in settings.parallel or []}
    counters = {name: Counter(path) for name, path in names_of(settings.tokenizer, settings.names).items()}
    return sets_of(settings), pairs, counters


def batches(files, settings, skipped, words, bar):
    """Yield the documents of `files` as Batches, counting their words."""
    on_error = skipped if settings.on_error == "skip" else None
    texts = (document.text for document in read(files, settings.text_field, settings.sample_by, on_error))
    while True:
        some, size = [], 0
        while size < BATCH_CHARACTERS and len(some) < BATCH and (text := next(texts, None)) is not None:
            some.append(text)
            size += len(text)
        if not some:
            return
        yield (batch := Batch(some))
        words.add(itertools.chain.from_iterable(batch.stripped))
        bar.update(int(batch.sums[:, -1].sum()))


def parity(texts, reference, counters, seed):
    """Tokens of the language / tokens of the reference for the same content, pooled over the pairs: the premium (Petrov et al.
    2023, "Language model tokenizers introduce unfairness between languages", arXiv 2305.15425), and the same of UTF-8 bytes."""
    both = [np.array([[len(text.encode("utf-8")) for text in side]]) for side in (texts, reference)]
    for counter in counters.values():
        for i, side in enumerate((texts, reference)):
            both[i] = np.vstack([both[i], counter.lengths(side)])
    (mine, other), (sums, reference_sums) = both, (side.sum(1) for side in both)
    draws = resampled_ratios(mine.T, other.T, seed)
    figures = {
        name: {
            "premium": rounded(divide(sums[i], reference_sums[i])),
            "interval": rounded(interval(draws[:, i])),
            "tokens": int(sums[i]),
            "reference_tokens": int(reference_sums[i]),
        }
        for i, name in enumerate(counters, 1)
    }
    return {"pairs": len(texts), "byte_premium": rounded(divide(sums[0], reference_sums[0])), "tokenizers": figures}


def sweep_of(family, counters, measured):
    """The curve of one training cut at several sizes, {"names", "vocab_sizes", "fertility", "intervals"}, with its "knee", a name or
    None, and "knee_depth"."""
    curve = {
        "names": family,
        "vocab_sizes": [counters[name].backend.get_vocab_size(with_added_tokens=False) for name in family],
        "fertility": [measured[name]["fertility"] for name in family],
        "intervals": [measured[name]["intervals"]["fertility"] for name in family],
    }
    at, depth = knee(curve["vocab_sizes"], curve["fertility"]) or (None, None)
    return {**curve, "knee": None if at is None else family[at], "knee_depth": depth and round(depth, 4)}


def encode_speed(sets, settings, counters):
    """{name: MB of UTF-8 a second of one thread} on the beginning of every set: the median of ROUNDS, in each of which every
    tokenizer has its turn."""
    texts, seconds = [], {name: [] for name in counters}
    for files in sets.values():
        room = TIMED_CHARACTERS // len(sets)
        for document in read(files, settings.text_field, settings.sample_by, on_error=lambda message: None):
            texts.append(document.text[:room])
            room -= len(texts[-1])
            if not room:
                break
    for _ in range(ROUNDS):
        for name, counter in counters.items():
            started = time.perf_counter()
            for text in texts:  # one at a time: a batch would take all cores
                counter.lengths([text])
            seconds[name].append(time.perf_counter() - started)
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    return {name: round(size / float(np.median(taken)), 3) for name, taken in seconds.items()}


# -- the program ------------------------------------------------------------------------------------------------------


@program(EvalTokenizerSettings, check, needs_folder=False)
def main(settings, stage, checked):
    sets, pairs, counters = checked
    stage.open()

    skipped, words, pooled, by_set = Skipped(), WordCounts(), None, {}
    with tqdm(desc=stage.name, unit="B", unit_scale=True, disable=None) as bar:
        for name, files in sets.items():
            counted = SetCounts.of(batches(files, settings, skipped, words, bar), counters)
            if not counted.text["words"]:
                where = " ".join(files if len(files) < 4 else [*files[:3], "…"])
                raise InputError(f"{where}: no word in there: nothing to measure")
            by_set[name] = {**counted.text, "tokenizers": counted.figures(settings.seed)}
            pooled = pooled + counted if pooled else counted

    measured = pooled.figures(settings.seed)
    for name, counter in counters.items():
        measured[name] |= {"tokenizer": str(counter.tokenizer.path), "tokenizer_sha256": counter.tokenizer.hash}
    frequent = words.most_frequent(CANDIDATES)
    splitters = {name: WordSplitter(counter.tokenizer, counter.unknown) for name, counter in counters.items()}
    shown = settings.sample_words or choose_words(frequent)
    families = nested_families({name: counter.tokenizer for name, counter in counters.items()})
    results = {
        **pooled.text,
        "bad_records": skipped.count,
        "rules": RULES,
        "differences_to": next(iter(counters)),
        "tokenizers": measured,
        "document_sets": by_set,
        "parallel": {name: parity(*texts, counters, settings.seed) for name, texts in pairs.items()},
        "sweeps": [sweep_of(family, counters, measured) for family in families],
        "splits": {word: {name: splitter(word) for name, splitter in splitters.items()} for word in shown},
        "costly_words": {name: costly_words(frequent, splitter) for name, splitter in splitters.items()},
        "word_counts_complete": words.complete,
        "speed_here": encode_speed(sets, settings, counters),
    }
    if stage.folder:
        from dilqur.tokenizer.plots import plot_bars, plot_splits, plot_sweeps

        with atomic_files(stage.folder) as part:
            write_json(part / "results.json", results)
            (part / "table.md").write_text(table(results), encoding="utf-8")
            plot_bars(measured, part / "tokenizers.png")
            if results["splits"]:
                plot_splits(results["splits"], part / "splits.png")
            if results["sweeps"]:
                plot_sweeps(results["sweeps"], part / "sweep.png")
    stage.finish({"tokenizers": measured, **{key: results[key] for key in ("parallel", "sweeps", "splits")}})
    print(json.dumps(results, ensure_ascii=False) if settings.json else table(results))


if __name__ == "__main__":
    main()
