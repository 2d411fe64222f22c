"""How likely each word of a language is, seen or not, judged by the words that share its stem: `kitab kitablar evlər` make `kitablar` no
surprise, and `evlərdən` likely where `kitablardan` is there.

A small corpus holds a tenth of the forms that a language with many endings will be written in, and a vocabulary of 100,000 tokens has
room for nearly all of them: what limits it is not knowing them. So words are cut at every place into a stem and an ending, and

    p1(ending | stem) = mean over the stem's other endings e of P(ending | e), the share of the stems with e that have `ending` too
    p2(ending | stem) = share of the stems with the same last letters that have `ending`, backed off from three letters to none
    score(word)       = the largest sqrt(p1 · p2) over its cuts

p1 knows the paradigm (noun or verb), p2 the sound of the stem (vowel harmony, linking consonants). No rule of any language is in it.
The idea of endings that stand in for each other on a set of stems is Goldsmith's (2001, "Unsupervised learning of the morphology of
a natural language"); the score is ours. It was calibrated on held-out sources: a word with score s that was not seen is
expected about as often as 3 · s ** 1.25 more sightings would make it (see docs/tokenizer.md).
"""

import collections
import itertools

import numpy as np
import regex

MIN_STEM, MAX_ENDING = 3, 9  # letters
ENDINGS, MIN_STEMS = 3000, 5  # the most frequent endings, each on so many stems
LAST_LETTERS, BACK_OFF = 3, 5.0  # of a stem; how many stems the shorter context counts for
MIN_SCORE = 0.05
PSEUDO_COUNT, EXPONENT = 3.0, 1.25
STEMS_AT_ONCE = 1000

_WORD = regex.compile(r" ?([\p{L}\p{M}\u200c\u200d]+)")


def pseudo_counts(words, strength=PSEUDO_COUNT):
    """{" word": float}: what to add to the count of each word, for its likelihood. words: those that were seen, as the pre-tokenizer
    cuts them; the result has some that were not. strength: what a certain word (score 1) gets."""
    letters = {match[1] for word in words if (match := _WORD.fullmatch(word))}
    return {f" {word}": strength * score**EXPONENT for word, score in scores(letters).items()}


def scores(words):
    """{word: score in MIN_SCORE…1} for a set of words without spaces: for these, each judged by the others, and for unseen ones."""
    stems, endings = cut(words)
    if not endings:
        return {}
    flat = np.concatenate([stems[stem] for stem in stems]) if stems else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(e) for e in stems.values()])]).astype(np.int64)
    together = companions(flat, starts, len(endings))
    context, by_context = ending_given_letters(list(stems), flat, starts, len(endings))
    names, best = list(stems), {}
    for first in range(0, len(names), STEMS_AT_ONCE):
        last = min(first + STEMS_AT_ONCE, len(names))
        own = flat[starts[first] : starts[last]]
        at = starts[first:last] - starts[first]
        seen = np.diff(starts[first : last + 1])[:, None].astype(np.float32)
        total = np.add.reduceat(together[own], at, axis=0)
        rows = np.repeat(np.arange(last - first), seen[:, 0].astype(int))
        p1 = total / seen
        p1[rows, own] = (total[rows, own] - 1) / np.maximum(seen[rows, 0] - 1, 1)  # without the word itself
        found = np.sqrt(np.maximum(p1, 0) * by_context[context[first:last]])
        for row, ending in np.argwhere(found > MIN_SCORE):
            word = names[first + row] + endings[ending]
            best[word] = max(best.get(word, 0.0), float(found[row, ending]))
    return best


def cut(words):
    """({stem: int64 array of its endings}, [ending]): stems with two endings or more, and the endings that many stems have."""
    count = collections.Counter(word[at:] for word in words for at in _cuts(word))
    endings = sorted((e for e in count if count[e] >= MIN_STEMS), key=lambda e: (-count[e], e))[:ENDINGS]
    number, stems = {ending: i for i, ending in enumerate(endings)}, collections.defaultdict(list)
    for word in sorted(words):
        for at in _cuts(word):
            if word[at:] in number:
                stems[word[:at]].append(number[word[at:]])
    return {stem: np.array(ids) for stem, ids in stems.items() if len(ids) > 1}, endings


def _cuts(word):
    return range(max(MIN_STEM, len(word) - MAX_ENDING), len(word) + 1)


def companions(flat, starts, endings):
    """float32 (endings, endings): [e, f] is the share of the stems with ending e that have f too."""
    together = np.zeros((endings, endings), np.float32)
    for first, last in itertools.pairwise(starts):
        together[np.ix_(flat[first:last], flat[first:last])] += 1
    return together / np.maximum(together.diagonal(), 1)[:, None]


def ending_given_letters(stems, flat, starts, endings):
    """(index of each stem's context, float32 (contexts, endings) P(ending | last letters of the stem)).

    The estimate for n letters counts the estimate for n - 1 letters as BACK_OFF more stems; contexts of fewer than MIN_STEMS
    stems are left to the shorter one."""
    lengths = np.diff(starts)
    index = np.zeros(len(stems), np.int64)  # into `table`, of the longest context so far
    table = [np.bincount(flat, minlength=endings).astype(np.float32) / max(1, len(stems))]
    for length in range(1, LAST_LETTERS + 1):
        groups = collections.defaultdict(list)
        for i, stem in enumerate(stems):
            groups[stem[-length:]].append(i)
        longer = index.copy()
        for members in groups.values():
            if len(members) >= MIN_STEMS:
                have = np.concatenate([flat[starts[i] : starts[i] + lengths[i]] for i in members])
                have = np.bincount(have, minlength=endings)
                shorter = table[index[members[0]]]
                table.append(((have + BACK_OFF * shorter) / (len(members) + BACK_OFF)).astype(np.float32))
                longer[members] = len(table) - 1
        index = longer
    return index, np.array(table)
