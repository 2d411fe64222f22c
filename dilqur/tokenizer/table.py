"""The results of eval_tokenizer as Markdown: one table of the tokenizers, then one for each further question."""

import itertools

from dilqur.common.bootstrap import FEWEST, LEVEL, RESAMPLES
from dilqur.common.markdown import between, code, markdown, number
from dilqur.tokenizer.fertility import RULES, WINDOW
from dilqur.tokenizer.word_splits import BETWEEN, CANDIDATES


def table(results):
    """results: what results.json has."""
    measured, first = results["tokenizers"], results["differences_to"]
    sections = [tokenizers(results)]
    if len(results["document_sets"]) > 1:
        sections.append(document_sets(results["document_sets"]))
    if results["parallel"]:
        sections.append(parallel(results["parallel"], list(measured)))
    if results["splits"]:
        rows = [[code(word), *(code(BETWEEN.join(s[n])) for n in measured)] for word, s in results["splits"].items()]
        sections.append("How words split:\n\n" + markdown(["word", *measured], rows))
    if any(results["costly_words"].values()):
        sections.append(costly_words(results["costly_words"], results["word_counts_complete"]))
    for sweep in results["sweeps"]:
        knee = "none, the curve does not flatten out"
        if sweep["knee"]:
            knee = f"{sweep['knee']}, {sweep['knee_depth']:.2f} below the straight line (of 1)"
        sections.append(f"One training cut at several sizes ({', '.join(sweep['names'])}), knee: {knee}.")
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in results["speed_here"].items())
    sections.append(
        f"MB/s of one thread of the library `tokenizers`, here and now (it wobbles, and differs elsewhere): {speeds}."
    )
    rules = [f"- {name}: {rule}" for name, rule in RULES.items()]
    rules.append(
        f"- intervals: {LEVEL:.0%}, of {RESAMPLES:,} draws of as many documents with replacement; differences to {first} are "
        f"taken draw by draw; none with fewer than {FEWEST} documents"
    )
    return "\n\n".join([*sections, "\n".join(rules)]) + "\n"


def tokenizers(results):
    first, rows = results["differences_to"], []
    several = len(results["tokenizers"]) > 1
    heads = ["tokenizer", "fertility", "95 %", *([f"less {first}"] if several else []), "stripped", "word by word"]
    heads += ["bytes per token", "words kept whole", f"words in {WINDOW:,} tokens"]
    heads += ["vocabulary", "of it occurs", "of it rare"]
    for name, r in results["tokenizers"].items():
        row = [name, number(r["fertility"]), between(r["intervals"]["fertility"])]
        if several:
            less = r.get("differences", {}).get("fertility")
            row.append(f"{number(less['difference'], '+.3f')} {between(less['interval'], '+.3f')}" if less else "–")
        row += [number(r[f"fertility_{rule}"]) for rule in ("stripped", "word_by_word")]
        row += [number(r["bytes_per_token"]), number(r["words_kept_whole"], ".1%")]
        row += [number(r[f"words_per_{WINDOW}_tokens"], ","), number(r["vocab_size"], ",")]
        rows.append([*row, number(r["vocab_share_used"], ".1%"), number(r["vocab_share_rare"], ".1%")])
    size = f"{results['documents']:,} documents, {results['words']:,} words, {results['utf8_bytes']:,} bytes of UTF-8."
    return f"{markdown(heads, rows)}\n\n{size}"


def document_sets(sets):
    names = list(next(iter(sets.values()))["tokenizers"])
    rows = []
    for name, s in sets.items():
        figures = [s["tokenizers"][n] for n in names]
        cells = [f"{number(r['fertility'])} {between(r['intervals']['fertility'])}" for r in figures]
        rows.append([name, f"{s['documents']:,}", f"{s['words']:,}", *cells])
    return "Fertility by document set:\n\n" + markdown(["document set", "documents", "words", *names], rows)


def parallel(results, names):
    rows = []
    for name, r in results.items():
        figures = [r["tokenizers"][n] for n in names]
        cells = [f"{number(f['premium'], '.2f')} {between(f['interval'], '.2f')}" for f in figures]
        rows.append([name, f"{r['pairs']:,}", number(r["byte_premium"], ".2f"), *cells])
    said = "Premium: tokens / tokens of the reference, for the same content (1 is parity); bytes likewise:"
    return f"{said}\n\n" + markdown(["parallel text", "pairs", "bytes", *names], rows)


def costly_words(words, complete):
    cells = [[f"{code(w['split'])} {w['count']:,} × {w['tokens']}" for w in found] for found in words.values()]
    ranks = itertools.zip_longest(*cells, fillvalue="")
    rows = [[str(rank), *of_rank] for rank, of_rank in enumerate(ranks, 1)]
    said = f"The words that cost the most: occurrences × tokens, by occurrences × (tokens − 1), of the {CANDIDATES:,} most "
    said += "frequent words of letters"
    said += "" if complete else "; rare words were forgotten, so counts are lower bounds"
    return f"{said}:\n\n" + markdown(["", *words], rows)
