"""How well a vocabulary fits text of a source that it was not made from, leaving one source out at a time.

    python benchmarks/vocabulary_sources.py --input data/az --vocab_size 100000 --output benchmarks/vocabulary_sources.json

Every file is a source. For each of them a tokenizer is trained on the others, in each of the ways below, and fertility measured on the one
left out: tokens without special tokens / whitespace-separated words. Means are over sources; "pooled" sums tokens and words.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import regex

from dilqur.bpe_training import learn_merges, llama3_tokenizer, whole_counts
from dilqur.documents import read
from dilqur.input_files import expand
from dilqur.llama3 import PATTERN
from dilqur.parallel import cores
from dilqur.stage import _git, hardware
from dilqur.word_counts import Source, count_words, word_weights

WAYS = {
    "plain": {},
    "sources alike (temperature 0)": {"temperature": 0.0},
    "count ** 0.75": {"exponent": 0.75},
    "likely words": {"unseen": 3.0},
    "count ** 0.75, likely words": {"exponent": 0.75, "unseen": 3.0},
    "count ** 0.75, likely words, temperature 0.5": {"exponent": 0.75, "unseen": 3.0, "temperature": 0.5},
}


def tokens_of(tokenizer, source):
    """int: tokens of a Source's words, each encoded once."""
    words = list(source.counts)
    lengths = tokenizer.encode_batch_fast(words, add_special_tokens=False)
    return sum(len(e.ids) * source.counts[word] for word, e in zip(words, lengths, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--vocab_size", type=int, default=100_000)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output")
    arguments = parser.parse_args()
    sources = [Source(Path(file).name.split(".")[0], [file]) for file in expand(arguments.input)]
    reading = SimpleNamespace(text_field="text", sample_by="line", on_error="stop")
    count_words(sources, reading, regex.compile(PATTERN).findall, 1 << 62, cores(), "count")
    words = {s.name: sum(len(document.text.split()) for document in read(s.files)) for s in sources}
    tokens = {way: {} for way in arguments.ways}
    for held_out in sources:
        others = [source for source in sources if source is not held_out]
        for way in arguments.ways:
            weights, plain, _ = word_weights(others, **WAYS[way])
            merges, size = learn_merges(whole_counts(weights, plain)[0], arguments.vocab_size, 1)
            tokens[way][held_out.name] = tokens_of(llama3_tokenizer(merges, "llama3"), held_out)
            fertility = tokens[way][held_out.name] / words[held_out.name]
            print(f"{held_out.name:20} {way:46} {size:7,} tokens, fertility {fertility:.4f}", flush=True)
    table = {}
    for way, counts in tokens.items():
        each = {name: round(counts[name] / words[name], 4) for name in counts}
        pooled = round(sum(counts.values()) / sum(words.values()), 4)
        table[way] = {**each, "mean": round(sum(each.values()) / len(each), 4), "pooled": pooled}
        print(f"{way:46} pooled {pooled:.4f}, mean {table[way]['mean']:.4f}")
    if arguments.output:
        about = {"vocab_size": arguments.vocab_size, "words": words, "git": _git(), "hardware": hardware()}
        Path(arguments.output).write_text(json.dumps({**about, "fertility": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
