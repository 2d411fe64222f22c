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

from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.blocks import MAX_RECORD_BYTES, blocks
from dilqur.data.documents import records

TABLES, COLUMNS = (".tsv", ".csv"), (".conllu", ".conll", ".bio")
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
FILE_NAME = "@file"  # a label_field: what the file is called, up to its first dot


@dataclass(frozen=True)
class Example:
    """text: a string with one label, or a tuple of words with a tuple of as many. source: number of the document it was cut from; copies
    of a text have the same. No source is on both sides of a fold, and a bootstrap draws them as wholes."""

    text: str | tuple
    label: str | tuple
    source: int


def read_examples(paths, words, text_field, label_field, label_names=None, paragraphs=False, clean=str, first_source=0):
    """The Examples of files and folders, in order. words: whether they are words with a tag each. label_names: of labels that are numbers.
    paragraphs: each paragraph of a text is an example. clean: what is done to a text, or to a word. Raises InputError with file and
    line."""
    found, groups = [], _Groups()
    for where, document, text, label in _records(paths, words, text_field, label_field):
        try:
            if words:
                _refuse(not _is_list_of(text, str), f"{text_field!r} is not a list of words")
                _refuse(not isinstance(label, (list, tuple)), f"{label_field!r} is not a list of tags")
                _refuse(len(text) != len(label), f"{len(text)} words, but {len(label)} tags")
                text = tuple(clean(word).strip() or word.strip() for word in text)
                _refuse("" in text, "an empty word")
                parts, name = [text] if text else [], tuple(_name(tag, label_names) for tag in label)
            else:
                _refuse(not isinstance(text, str), f"{text_field!r} is not text")
                text, name = clean(text), _name(label, label_names)
                parts = [part.strip() for part in (re.split(r"\n\s*\n", text) if paragraphs else [text])]
        except ValueError as problem:
            raise InputError(f"{where}: {problem}") from None
        document = document or f"record {len(found)}"
        for part in filter(None, parts):
            groups.join(document, part)
            found.append((part, name))
    if not found:
        raise InputError(f"{' '.join(paths)}: no example in there")
    numbers = {}
    for part, _ in found:
        numbers.setdefault(groups.of(part), first_source + len(numbers))
    return [Example(part, name, numbers[groups.of(part)]) for part, name in found]


class _Groups:
    """Sets of things that belong together: two that belong to a third do too."""

    def __init__(self):
        self._above = {}

    def of(self, thing):
        while (above := self._above.setdefault(thing, thing)) != thing:
            thing = above
        return thing

    def join(self, one, other):
        self._above[self.of(other)] = self.of(one)


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
    """(where, the document it says it is of or None, text, label) of every record."""
    for path in paths:
        for file in _files(Path(path)):
            suffix = Path(file).suffix.lower()
            if suffix in COLUMNS:
                if not words:
                    raise InputError(f"{file}: has words with tags, and no texts: the task is token_classification")
                yield from _sentences(file, label_field)
            elif suffix in TABLES and words:
                raise InputError(
                    f"{file}: a table has a text a line, and no words with tags; give .conllu, .jsonl or .parquet"
                )
            else:
                for where, record in _table(file) if suffix in TABLES else _objects(file):
                    text = _field(record, text_field, where, "text_field")
                    if label_field == FILE_NAME:
                        label = Path(file).name.partition(".")[0]
                    else:
                        label = _field(record, label_field, where, "label_field")
                    yield where, None, text, label


def _field(record, key, where, flag):
    if key not in record:
        raise InputError(f"{where}: no {key!r} (there are: {', '.join(record)}); see --{flag}")
    return record[key]


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
    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.DictReader(_lines(file), delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                columns = len(reader.fieldnames)
                raise InputError(f"{file}:{reader.line_num}: not {columns} columns, as the first line has")
            yield f"{file}:{reader.line_num}", record
    except csv.Error as problem:
        raise InputError(
            f"{file}:{reader.line_num}: {problem}: a quotation mark inside a field has to be doubled"
        ) from None


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
    words, tags, first, document = [], [], 1, None
    for number, line in enumerate([*_lines(file), "\n"], 1):
        line = line.rstrip("\r\n")
        if not line.strip():
            if words:
                yield f"{file}:{first}", document, words, tags
            words, tags, first = [], [], number + 1
        elif re.match(r"#\s", line) and not words:
            # sentences of one document, as treebanks name them: `weblog-1.7` is of `weblog-1`
            if named := re.match(r"#\s*sent_id\s*=\s*(.+)[.]\d+\s*$", line):
                document = f"{file} {named[1]}"
            elif re.match(r"#\s*sent_id\s*=", line):
                document = None
        elif not line.startswith("-DOCSTART-"):
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) < (len(CONLLU) if conllu else 2):
                raise InputError(f"{file}:{number}: {len(parts)} columns are too few")
            # 1-2: a contraction, written out in what follows; 1.1: a word left out
            if conllu and not parts[0].isdigit():
                continue
            words.append(parts[1 if conllu else 0])
            tags.append(parts[column])


def _name(label, names):
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError(f"{str(label)[:40]!r} is no label: a text or a whole number")
    if names and isinstance(label, str) and label.isdigit():
        label = int(label)
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
