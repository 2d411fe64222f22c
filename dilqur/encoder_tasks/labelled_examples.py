"""Examples with labels, out of local files as the public data sets have them: a text with a label, or words with a tag each.

.tsv .csv                     a line of column names, then an example a line (SIB-200)
.jsonl .parquet, compressed   an object or a row an example (WikiANN as parquet: tags are numbers, `label_names` names them)
.conllu                       Universal Dependencies; label_field is a column: upos, xpos, deprel
.conll .bio                   a word a line, its tag last, an empty line between sentences
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dilqur.documents import records
from dilqur.errors import InputError
from dilqur.input_files import blocks, expand

TABLES, COLUMNS = (".tsv", ".csv"), (".conllu", ".conll", ".bio")
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
FILE_NAME = "@file"  # a label_field: what the file is called, up to its first dot


@dataclass(frozen=True)
class Example:
    """text: a string with one label, or a tuple of words with a tuple of as many. source: number of the document it was cut
    from: parts of one document are never on both sides of a fold, and are drawn together."""

    text: str | tuple
    label: str | tuple
    source: int


def read_examples(paths, words, text_field, label_field, label_names=None, paragraphs=False, first_source=0):
    """The Examples of files and folders, in order. words: whether they are words with a tag each. label_names: of labels that are numbers.
    paragraphs: each paragraph of a text is an example. Raises InputError with file and line."""
    examples = []
    records_of_all = _records(paths, words, text_field, label_field)
    for number, (where, text, label) in enumerate(records_of_all, first_source):
        try:
            if words:
                _refuse(not _is_list_of(text, str), f"{text_field!r} is not a list of words")
                _refuse(not isinstance(label, (list, tuple)), f"{label_field!r} is not a list of tags")
                _refuse(len(text) != len(label), f"{len(text)} words, but {len(label)} tags")
                if text := tuple(word.strip() for word in text):
                    _refuse("" in text, "an empty word")
                    examples.append(Example(text, tuple(_name(tag, label_names) for tag in label), number))
                continue
            _refuse(not isinstance(text, str), f"{text_field!r} is not text")
            parts = re.split(r"\n\s*\n", text) if paragraphs else [text]
            name = _name(label, label_names)
            examples += [Example(part.strip(), name, number) for part in parts if part.strip()]
        except ValueError as problem:
            raise InputError(f"{where}: {problem}") from None
    if not examples:
        raise InputError(f"{' '.join(paths)}: no example in there")
    return examples


def folds(examples, count):
    """`count` lists of numbers of Examples, of about equal size; those of one source are in the same. Always the same ones."""
    sources = sorted({example.source for example in examples})
    fold_of = dict(
        zip(np.random.default_rng(0).permutation(sources).tolist(), np.arange(len(sources)) % count, strict=True)
    )
    return [[i for i, example in enumerate(examples) if fold_of[example.source] == fold] for fold in range(count)]


def draw(examples, most, seed=0):
    """At most `most` of the examples, drawn without replacement and in their order; all where `most` is None."""
    if most is None or len(examples) <= most:
        return examples
    return [examples[i] for i in sorted(np.random.default_rng(seed).permutation(len(examples))[:most])]


def _records(paths, words, text_field, label_field):
    """(where, text, label) of every record."""
    for path in paths:
        for file in _files(Path(path)):
            suffix = Path(file).suffix.lower()
            if suffix in COLUMNS:
                yield from _sentences(file, label_field)
            elif suffix in TABLES and words:
                raise InputError(
                    f"{file}: a table has a text a line, and no words with tags; give .conllu, .jsonl or .parquet"
                )
            else:
                for where, record in _table(file) if suffix in TABLES else _objects(file):
                    if text_field not in record:
                        raise InputError(
                            f"{where}: no {text_field!r} (there are: {', '.join(record)}); see --text_field"
                        )
                    if label_field == FILE_NAME:
                        label = Path(file).name.partition(".")[0]
                    elif label_field in record:
                        label = record[label_field]
                    else:
                        raise InputError(
                            f"{where}: no {label_field!r} (there are: {', '.join(record)}); see --label_field"
                        )
                    yield where, record[text_field], label


def _files(path):
    if path.is_dir():
        own = [str(p) for p in sorted(path.iterdir()) if p.suffix.lower() in (*TABLES, *COLUMNS)]
        return own or expand([str(path)])
    return [str(path)] if path.suffix.lower() in (*TABLES, *COLUMNS) else expand([str(path)])


def _lines(file):
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except UnicodeDecodeError as problem:
        raise InputError(f"{file}: not UTF-8 ({problem.reason} at byte {problem.start})") from None


def _table(file):
    reader = csv.DictReader(_lines(file), delimiter="\t" if file.lower().endswith(".tsv") else ",")
    for record in reader:
        if None in record or None in record.values():
            columns = len(reader.fieldnames)
            raise InputError(f"{file}:{reader.line_num}: not {columns} columns, as the first line has")
        yield f"{file}:{reader.line_num}", record


def _objects(file):
    for block in blocks(file):
        for line, record in records(block):
            yield f"{file}:{line}", record


def _sentences(file, label_field):
    conllu = file.lower().endswith(".conllu")
    column = CONLLU.index(label_field) if conllu and label_field in CONLLU else -1
    if conllu and column < 0:
        raise InputError(
            f"{file}: no column {label_field!r}; give --label_field upos, or another of {', '.join(CONLLU)}"
        )
    words, tags, first = [], [], 1
    for number, line in enumerate([*_lines(file), "\n"], 1):
        line = line.rstrip("\r\n")
        if not line.strip():
            if words:
                yield f"{file}:{first}", words, tags
            words, tags, first = [], [], number + 1
        elif not (conllu and line.startswith("#")):
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) < (len(CONLLU) if conllu else 2):
                raise InputError(f"{file}:{number}: {len(parts)} columns are too few")
            if (
                conllu and not parts[0].isdigit()
            ):  # 1-2: a contraction, written out in what follows; 1.1: a word left out
                continue
            words.append(parts[1 if conllu else 0])
            tags.append(parts[column])


def _name(label, names):
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError(f"{str(label)[:40]!r} is no label: a text or a whole number")
    if isinstance(label, int) and names:
        if not 0 <= label < len(names):
            raise ValueError(f"label {label}, but label_names has {len(names)}")
        return names[label]
    return str(label)


def _is_list_of(value, kind):
    return isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)


def _refuse(wrong, what):
    if wrong:
        raise ValueError(what)
