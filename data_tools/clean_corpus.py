"""Raw documents in (jsonl, parquet, txt; plain, .gz, .zst), clean ones out, with a count for every reason one was dropped.

    python data_tools/clean_corpus.py --input recipes/quickstart/corpus/az --language az --output_dir runs/try/clean
    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --check

What happens to a document, in this order: control and zero-width characters out, Unicode NFC, line ends and spaces made
one kind; then it is dropped if it is too short or too long, not in the language, repetitive, or an exact copy of an
earlier one. The rest goes to OUTPUT_DIR/train/FILE.jsonl.zst, and the share `validation_fraction`, chosen by a hash of
the text itself, to OUTPUT_DIR/validation/FILE.jsonl.zst; FILE is the input file's name. report.json has the counts.
"""

import collections
import json
import re
import sys
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import xxhash
import zstandard
from pydantic import Field
from tqdm import tqdm

from dilqur.atomic import atomic_file, atomic_files, write_json
from dilqur.documents import COMPRESSIONS, FORMATS, expand, is_validation, read
from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Documents, Stage, StageSettings

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(kw_only=True)
class CleanSettings(StageSettings):
    input: list[Documents] = field(metadata={"help": "files, folders or globs"})
    text_field: str = field(default="text", metadata={"help": "key or column that holds the text"})
    sample_by: Literal["line", "paragraph", "document"] = field(
        default="line", metadata={"help": "one document of a .txt"}
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "skip and count broken JSON and UTF-8 instead of stopping"}
    )
    min_chars: Annotated[int, Field(ge=1)] = field(default=50, metadata={"help": "shortest document kept"})
    max_chars: Annotated[int, Field(ge=1)] = field(default=1_000_000, metadata={"help": "longest document kept"})
    language: str | None = field(
        default=None, metadata={"help": "ISO 639-1 code to keep, e.g. az; none: all languages"}
    )
    max_repeated_line_share: Share = field(
        default=0.3, metadata={"help": "most of a text's characters in repeated lines"}
    )
    max_repeated_ngram_share: Share = field(
        default=0.2, metadata={"help": "most of a text's words in repeated 5-grams"}
    )
    validation_fraction: Share = field(
        default=0.0, metadata={"help": "share of the documents held out, by hash of text"}
    )


# -- one document -----------------------------------------------------------------------------------------------------

# C0 and C1 controls but tab and LF, zero-width and direction marks, BOM, soft hyphen, and what is not a character at all.
# ZWJ and ZWNJ stay: emoji, Persian and the Indic scripts are written with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff]"
)


def normalise(text):
    """NFC, no control or zero-width characters, LF line ends, single spaces, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def repeated_line_share(text):
    """Share of the characters that are in a line which occurred before (Rae et al. 2021, arXiv:2112.11446, table A1)."""
    seen, repeated, total = set(), 0, 0
    for line in filter(None, text.split("\n")):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, total)


def repeated_ngram_share(text, n=5):
    """Share of the words inside a word n-gram that occurred before, each word counted once (same source)."""
    words = text.split()
    seen, covered = set(), set()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return len(covered) / max(1, len(words))


def language_filter(code):
    """text → is it in the language `code`? By py3langid's own model, which lies in its package: nothing is fetched."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if code not in identifier.labels:
        raise InputError(
            f"language: {code!r} is not among the identifier's {len(identifier.labels)} languages (ISO 639-1)"
        )
    return lambda text: identifier.classify(text[:4000])[0] == code


def reason_to_drop(text, settings, is_language, seen):
    """None to keep the document, else the name its reason is counted under. `seen`: 128-bit hashes of the kept ones."""
    if len(text) < settings.min_chars:
        return "too_short"
    if len(text) > settings.max_chars:
        return "too_long"
    if is_language and not is_language(text):
        return "other_language"
    if repeated_line_share(text) > settings.max_repeated_line_share:
        return "repeated_lines"
    if repeated_ngram_share(text) > settings.max_repeated_ngram_share:
        return "repeated_ngrams"
    digest = xxhash.xxh3_128_digest(text.encode("utf-8"))
    if digest in seen:
        return "exact_duplicate"
    seen.add(digest)
    return None


# -- the corpus -------------------------------------------------------------------------------------------------------


def output_names(files):
    """{input file: name of its output}, distinct: a name that comes twice gets a number."""
    names, taken = {}, set()
    for file in files:
        name = Path(file).name
        for suffix in (*COMPRESSIONS, *FORMATS):
            name = name.removesuffix(suffix)
        unique, n = name, 1
        while unique in taken:
            n += 1
            unique = f"{name}-{n}"
        taken.add(unique)
        names[file] = f"{unique}.jsonl.zst"
    return names


def clean_file(file, name, settings, folder, is_language, seen, counts):
    """Clean one input file into `folder`/train/`name` and `folder`/validation/`name`, and add to `counts`."""

    def bad(message):
        counts["bad_record"] += 1
        print(f"skipped: {message}", file=sys.stderr)

    with ExitStack() as stack:
        outputs = {}
        for document in read(
            [file], settings.text_field, settings.sample_by, bad if settings.skip_bad_records else None
        ):
            counts["read"] += 1
            text = normalise(document.text)
            if reason := reason_to_drop(text, settings, is_language, seen):
                counts[reason] += 1
                continue
            split = "validation" if is_validation(text, settings.validation_fraction) else "train"
            if split not in outputs:
                raw = stack.enter_context(atomic_file(folder / split / name))
                outputs[split] = stack.enter_context(zstandard.ZstdCompressor().stream_writer(raw, closefd=False))
            kept = {
                k: v for k, v in document.record.items() if k in ("id", "source", "license", "url") and v is not None
            }
            line = json.dumps({"text": text, **kept}, ensure_ascii=False)
            outputs[split].write(line.encode("utf-8") + b"\n")
            counts[f"kept_{split}"] += 1
            counts[f"bytes_{split}"] += len(text.encode("utf-8"))


@program
def main():
    settings = parse(CleanSettings, __doc__)
    stage = Stage(settings, __file__)
    if settings.min_chars > settings.max_chars:
        raise InputError(
            f"min_chars {settings.min_chars} is more than max_chars {settings.max_chars}: nothing could be kept"
        )
    stage.refuse_finished()
    is_language = language_filter(settings.language) if settings.language else None
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()

    files = expand(settings.input)
    names, seen, counts = output_names(files), set(), collections.Counter()
    with atomic_files(
        stage.folder
    ) as part:  # all files or none: what a failed run left would be packed with the next one's
        for file in tqdm(files, desc=stage.name, unit="file", disable=None):
            clean_file(file, names[file], settings, part, is_language, seen, counts)
        if not counts["read"]:
            raise InputError(f"{' '.join(settings.input)}: no document in there: nothing to clean")
        if not counts["kept_train"]:
            reasons = ", ".join(f"{k} {v}" for k, v in counts.items() if k != "read")
            raise InputError(f"no document of {counts['read']} is left ({reasons}): loosen a filter")
        write_json(part / "report.json", counts)
    stage.finish(dict(counts))
    print(f"{stage.name}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    return None


if __name__ == "__main__":
    main()
