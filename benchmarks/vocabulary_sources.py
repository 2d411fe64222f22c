"""How well a vocabulary fits text of a source that it was not made from, leaving one source out at a time.

    python benchmarks/vocabulary_sources.py --input data/az --output benchmarks/vocabulary_sources.json
    python benchmarks/vocabulary_sources.py --input data/az --calibrate

Every file is a source. For each of them the largest tokenizer is trained on the others, in each of the ways below, the smaller ones are cut
from it, and fertility is measured on the one left out: tokens without special tokens / whitespace-separated words. Means are over sources;
"pooled" sums tokens and words.
"""

import argparse
import bisect
import collections
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex

from dilqur.common.parallel import cores
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.pipeline.manifest import git_commit, hardware
from dilqur.tokenizer.bpe_training import cut_merges, learn_merges, llama3_tokenizer, whole_counts
from dilqur.tokenizer.llama3 import PATTERN
from dilqur.tokenizer.unseen_words import scores
from dilqur.tokenizer.word_counts import Source, count_words, word_weights

WAYS = {
    "plain": {},
    "plain, pairs seen twice": {"min_frequency": 2},
    "likely words": {"unseen": 3.0},
    "the defaults": {"exponent": 0.75, "unseen": 3.0, "temperature": 0.5},
}
BINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # of likelihood, each up to the next
SEEN = {"never seen": (0, 0), "seen once": (1, 1), "seen 2 or 3 times": (2, 3), "seen 4 to 10 times": (4, 10)}
CLIP = 5
FEW_WORDS = 50_000  # smaller sources say little about words that are rare
LETTERS = regex.compile(r" ?(\p{L}+)")


def tokens_of(tokenizer, source):
    """int: tokens of a Source's words, each encoded once."""
    words = list(source.counts)
    lengths = tokenizer.encode_batch_fast(words, add_special_tokens=False)
    return sum(len(e.ids) * source.counts[word] for word, e in zip(words, lengths, strict=True))


def calibration(sources):
    """{"never seen" …: [mean sightings in the source left out, by likelihood]}, as shares of those of words seen once; a word counts at
    most CLIP times. The mean over the sources that are left out, each judged by the words of the others."""
    shares = {name: [] for name in SEEN}
    for held_out in sources:
        seen, met = collections.Counter(), collections.Counter()
        for source in sources:
            for word, count in source.counts.items():
                if match := LETTERS.fullmatch(word):
                    (met if source is held_out else seen)[match[1]] += count
        likelihood = scores(set(seen))
        rows = {name: [[] for _ in BINS] for name in SEEN}
        for word in seen.keys() | likelihood.keys():
            name = next((name for name, (low, high) in SEEN.items() if low <= seen[word] <= high), None)
            if name:
                at = bisect.bisect_right(BINS, likelihood.get(word, 0.0)) - 1
                rows[name][at].append(min(met[word], CLIP))
        once = np.mean(np.concatenate(rows["seen once"]))
        for name in SEEN:
            shares[name].append([np.mean(row) / once if row else np.nan for row in rows[name]])
    return {name: np.mean(values, axis=0).round(3).tolist() for name, values in shares.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--vocab_sizes", nargs="+", type=int, default=[8000, 16000, 32000, 50000, 64000, 100_000])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--calibrate", action="store_true", help="instead: how often likely words are met in a source left out"
    )
    parser.add_argument("--output")
    arguments = parser.parse_args()
    sources = [Source(Path(file).name.split(".")[0], [file]) for file in expand(arguments.input)]
    reading = SimpleNamespace(text_field="text", sample_by="line", on_error="stop")
    count_words(sources, reading, regex.compile(PATTERN).findall, 1 << 62, cores(), "count")
    if arguments.calibrate:
        print("likelihood from", *BINS)
        for name, shares in calibration([s for s in sources if s.counts.total() > FEW_WORDS]).items():
            print(name, *shares)
        return
    words = {s.name: sum(len(document.text.split()) for document in read(s.files)) for s in sources}
    sizes, fertility = sorted(arguments.vocab_sizes), {}
    for held_out in sources:
        others = [source for source in sources if source is not held_out]
        for way in arguments.ways:
            how = {"min_frequency": 1, **WAYS[way]}
            min_frequency = how.pop("min_frequency")
            weights, plain, _ = word_weights(others, **how)
            merges, reached = learn_merges(whole_counts(weights, plain)[0], sizes[-1], min_frequency)
            for size in sizes:
                tokens = tokens_of(llama3_tokenizer(cut_merges(merges, size), "llama3"), held_out)
                fertility.setdefault(way, {}).setdefault(size, {})[held_out.name] = tokens / words[held_out.name]
            print(
                f"{held_out.name:20} {way:46} {reached:7,} tokens, fertility {tokens / words[held_out.name]:.4f}",
                flush=True,
            )
    total = sum(words.values())
    for way, by_size in fertility.items():
        for size, each in by_size.items():
            pooled = sum(each[name] * words[name] for name in each) / total
            by_size[size] = {**{n: round(f, 4) for n, f in each.items()}, "pooled": round(pooled, 4)}
            by_size[size]["mean"] = round(sum(each.values()) / len(each), 4)
            print(f"{way:46} {size:7,}: pooled {pooled:.4f}, mean {by_size[size]['mean']:.4f}")
    if arguments.output:
        about = {"command": " ".join(sys.argv), "words": words, "git": git_commit(), "hardware": hardware()}
        Path(arguments.output).write_text(json.dumps({**about, "fertility": fertility}, indent=1) + "\n")


if __name__ == "__main__":
    main()
