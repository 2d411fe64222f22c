"""How often each word occurs in each source of a corpus: all that a BPE trainer needs to know of a text, however large.

A word is what the pre-tokenizer cuts out: most often a word with the space before it. Text is counted in blocks by several
processes and added up in the order of the blocks; counts are sums, so the result is the same for any number of processes.

A corpus that is larger than `sample_bytes` is sampled. Every source gets the same allowance of bytes on disk, and what a small
source leaves over is shared among the larger ones: variety counts for more than volume. A source larger than its allowance is
read whole, and each of its documents is counted with probability allowance / size: a hash of its text decides, so that the same
documents are taken on every machine. Its counts are then divided by that probability.
"""

import collections
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from dilqur.common.errors import InputError
from dilqur.common.parallel import ordered_map
from dilqur.common.progress import Progress
from dilqur.data.blocks import blocks
from dilqur.data.documents import Skipped, documents
from dilqur.tokenizer.unseen_words import pseudo_counts

FEW_WORDS = 300_000
SAME_SCRIPT = 0.5  # of a source's letters that have to be of the script that most letters of the corpus are of


@dataclass
class Source:
    """One source of text. probability: of a document to be counted. weight: its share of all words, once stated, else None."""

    name: str
    files: list
    weight: float | None = None
    probability: float = 1.0
    documents: int = 0
    counted_documents: int = 0
    utf8_bytes: int = 0
    counts: collections.Counter = field(default_factory=collections.Counter, repr=False)

    def about(self):
        """What a manifest says of it."""
        return {
            "files": len(self.files),
            "documents": self.documents,
            "counted_documents": self.counted_documents,
            "probability": round(self.probability, 6),
            "utf8_bytes": self.utf8_bytes,
            "words": self.counts.total(),
            "distinct_words": len(self.counts),
            "weight": self.weight,
        }


def sampling_probabilities(sizes, sample_bytes):
    """(n,) probabilities to count a document of each source, for their `sizes` in bytes: all of what fits an equal allowance,
    the rest of `sample_bytes` equally for those that are larger."""
    left, out = float(sample_bytes), np.ones(len(sizes))
    for place, i in enumerate(np.argsort(sizes, kind="stable")):
        allowance = left / (len(sizes) - place)
        out[i] = min(1.0, allowance / max(1, sizes[i]))
        left -= min(sizes[i], allowance)
    return out


class BlockCounter:
    """Counts the words of one block of a file. cut: what makes a list of words of a text."""

    def __init__(self, cut, settings):
        self.cut, self.settings = cut, settings

    def __call__(self, item):
        """(source index, probability, Block) → (source index, file, share of it read, documents, counted, bytes, Counter, bad)."""
        index, probability, block = item
        counts, seen, counted, size, bad = collections.Counter(), 0, 0, 0, []
        on_error = bad.append if self.settings.on_error == "skip" else None
        for document in documents(block, self.settings.text_field, self.settings.sample_by, on_error):
            seen += 1
            raw = document.text.encode("utf-8")
            size += len(raw)
            if probability >= 1 or xxhash.xxh3_64_intdigest(raw, seed=2) < probability * 2**64:
                counted += 1
                counts.update(self.cut(document.text))
        return index, block.file, block.share, seen, counted, size, counts, bad


def count_words(sources, settings, cut, sample_bytes, num_proc, name):
    """Fill the counts of every Source. Returns the number of bad records that were skipped.

    settings: a program's ReadingSettings. cut: str → list of words. name: what the progress is called. Raises InputError for a
    source without a word.
    """
    sizes = {file: Path(file).stat().st_size for source in sources for file in source.files}
    probabilities = sampling_probabilities([sum(sizes[f] for f in source.files) for source in sources], sample_bytes)
    for source, probability in zip(sources, probabilities, strict=True):
        source.probability = float(probability)
    before = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    progress, skipped = Progress(name, sum(sizes.values())), Skipped()

    def items():
        columns = [settings.text_field]
        for index, source in enumerate(sources):
            for file in source.files:
                for block in blocks(file, settings.sample_by, settings.on_error == "skip", columns):
                    yield index, source.probability, block

    for index, file, share, seen, counted, size, counts, bad in ordered_map(
        BlockCounter(cut, settings), items(), num_proc
    ):
        source = sources[index]
        source.documents += seen
        source.counted_documents += counted
        source.utf8_bytes += size
        source.counts.update(counts)
        for message in bad:
            skipped(message)
        progress.at(before[file] + share * sizes[file])
    progress.close()
    for source in sources:
        if not source.counts:
            what = "no document in there" if not source.documents else "no word in its documents"
            raise InputError(
                f"{source.name}: {' '.join(source.files[:3])}: {what}: nothing to learn from; leave it out"
            )
    return skipped.count


def refuse_other_scripts(sources):
    """InputError for a source whose letters are mostly not of the script that most letters of all sources are of."""
    shares = {source.name: scripts(source.counts) for source in sources}
    everything = sum(shares.values(), collections.Counter())
    if not everything:
        return
    main = everything.most_common(1)[0][0]
    for name, letters in shares.items():
        total = letters.total()
        if total and letters[main] < SAME_SCRIPT * total:
            own = letters.most_common(1)[0][0]
            raise InputError(
                f"{name}: {letters[own] / total:.0%} of its letters are {own}, and most of the corpus is {main}: "
                f"leave it out, or give --mixed_scripts true if it belongs to the language"
            )


def scripts(counts):
    """Counter of the letters in {word: count} by script, as the names of Unicode's characters begin: LATIN, CYRILLIC, CJK."""
    import unicodedata

    letters = collections.Counter()
    for word, count in counts.items():
        for letter in word:
            letters[letter] += count
    out = collections.Counter()
    for letter, count in letters.items():
        if letter.isalpha():
            out[unicodedata.name(letter, "UNNAMED").split()[0]] += count
    return out


def word_weights(sources, temperature=1.0, exponent=1.0, unseen=0.0):
    """({word: float} for a trainer to count, are they plain counts?, how many words in it were not seen).

    A word weighs (its weighted_counts) ** exponent + `unseen` times its likelihood (dilqur/tokenizer/unseen_words.py).
    Likelihoods are left out for a corpus of more than FEW_WORDS different words: a vocabulary has no room for more than those.
    """
    plain = temperature == exponent == 1 and all(s.probability == 1 and s.weight is None for s in sources)
    weights = weighted_counts(sources, temperature)
    if exponent != 1:
        weights = {word: weight**exponent for word, weight in weights.items()}
    if not unseen or len(weights) > FEW_WORDS:
        return weights, plain, 0
    seen = len(weights)
    for word, weight in pseudo_counts(weights, unseen).items():
        weights[word] = weights.get(word, 0.0) + weight
    return weights, False, len(weights) - seen


def weighted_counts(sources, temperature=1.0):
    """{word: float} over all sources, scaled so that together they weigh as much as all the words counted.

    A source's share of the words is its stated weight, or, where no source has one, proportional to (its words) ** temperature: 1 leaves
    the sources as large as they are, 0 makes them equal (the exponent of multilingual BERT and XLM-R, there over languages).
    """
    words = np.array([source.counts.total() / source.probability for source in sources])
    if any(source.weight is not None for source in sources):
        wanted = np.array([source.weight for source in sources], float)
    else:
        wanted = words**temperature
    scales = wanted / wanted.sum() * words.sum() / words
    out = collections.defaultdict(float)
    for source, scale in zip(sources, scales, strict=True):
        scale = float(scale / source.probability)
        for word, count in source.counts.items():
            out[word] += count * scale
    return dict(out)
