"""Documents in: every format and compression gives the same ones, and what is broken is named with file and line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dilqur.common.errors import InputError
from dilqur.data.documents import is_validation, read

TEXTS = ["Əziz dostum, necəsən?", "iki\nsətir", "U+2028 \u2028 is legal inside JSON", "emoji \U0001f600 and \x85"]
LINES = "".join(json.dumps({"text": text, "id": i}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)).encode()


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def documents(path, **options):
    return list(read([str(path)], **options))


def texts(path, **options):
    return [document.text for document in documents(path, **options)]


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("two-members.jsonl.gz", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:])),  # as pigz and `cat` make them
        ("two-frames.jsonl.zst", zstd(LINES[:50]) + zstd(LINES[50:])),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("no-last-line-end.jsonl", LINES[:-1]),
        ("empty-lines.jsonl", LINES.replace(b"\n", b"\n\n")),
        ("escaped.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()),  # pairs as \ud83d\ude00
    ],
)
def test_jsonl_gives_the_same_documents_however_it_is_stored(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == TEXTS


def test_parquet_gives_the_same_documents_with_their_row_and_what_else_is_said_of_them(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(4)}), tmp_path / "a.parquet")
    found = documents(tmp_path / "a.parquet")
    assert [d.text for d in found] == TEXTS
    assert (found[3].where, found[3].record["id"]) == (f"{tmp_path / 'a.parquet'}:4", 3)


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"]), ("document", ["one\ntwo\n\nthree"])],
)
def test_a_text_file_is_cut_by_lines_paragraphs_or_not_at_all(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\nthree\n\n")
    assert texts(tmp_path / "a.txt", sample_by=sample_by) == expected


def test_another_key_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "salam"}\n')
    assert texts(tmp_path / "a.jsonl", text_field="content") == ["salam"]


def test_a_document_of_many_megabytes_in_one_line_is_read_whole(tmp_path):
    text = "salam dünya " * 500_000  # 7 MB: past every buffer on the way
    data = json.dumps({"text": text}).encode() + b"\n"
    for name, stored in (("a.jsonl.zst", zstd(data)), ("a.jsonl.gz", gzip.compress(data, 1))):
        (tmp_path / name).write_bytes(stored)
        assert texts(tmp_path / name) == [text]


# -- what is broken ---------------------------------------------------------------------------------------------------

GOOD = b'{"text": "salam"}\n'


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b'{"text": "sal', "broken JSON"),
        (b'{"text": "sal\xff"}', "invalid UTF-8 at byte 13"),  # 13 bytes stand before it
        (b'["salam"]', "not a JSON object"),
        (b'{"content": "salam"}', "no text field 'text' (keys: content); see --text_field"),
        (b'{"text": null}', "'text' is 'None', not text; see --text_field"),
        (b'{"text": {"az": "salam"}}', "'text' is \"{'az': 'salam'}\", not text"),
        (b'{"text": "sa\\u0000lam"}', "NUL (U+0000) in the text"),
        (b'{"text": "sa\0lam"}', "broken JSON"),
        (b'{"text": "\\ud83d"}', "a lone surrogate"),  # json.loads takes it, UTF-8 cannot hold it
        (b'{"text": "a", "x": ' + b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line_and_can_be_skipped(tmp_path, record, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + record + b"\n" + GOOD)
    with pytest.raises(InputError) as refused:
        documents(file)
    assert str(refused.value).startswith(f"{file}:2: ") and words in str(refused.value)
    said = []
    assert [d.line for d in read([str(file)], on_error=said.append)] == [1, 3]
    assert said == [str(refused.value)]


def test_bad_rows_and_columns_of_parquet_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["salam", None], "id": [1, 2]}), file)
    with pytest.raises(InputError, match=r"a\.parquet:2: 'text' is 'None', not text"):
        documents(file)
    assert [d.text for d in read([str(file)], on_error=lambda message: None)] == ["salam"]
    with pytest.raises(InputError, match=r"a\.parquet:1: no text field .content. \(keys: text, id\)"):
        documents(file, text_field="content")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole parquet file"):
        documents(file)


def test_a_row_of_parquet_that_is_no_utf8_is_named(tmp_path):
    texts = pyarrow.array([b"salam", b"d\xffnya", b"sa\xc4\x9f"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet:2: invalid UTF-8 at byte 1"):
        documents(tmp_path / "a.parquet")
    said = []
    assert [d.text for d in read([str(tmp_path / "a.parquet")], on_error=said.append)] == ["salam", "sağ"]
    assert len(said) == 1


# -- held out ---------------------------------------------------------------------------------------------------------


def test_about_the_asked_share_is_held_out_and_more_of_it_adds_to_the_same(corpus_size=20_000):
    held = {share: {i for i in range(corpus_size) if is_validation(f"sənəd {i}", share)} for share in (0, 0.01, 0.1, 1)}
    assert len(held[0]) == 0 and len(held[1]) == corpus_size
    assert 0.09 < len(held[0.1]) / corpus_size < 0.11  # 2,000 expected, standard deviation 42: five of them and more
    assert held[0.01] < held[0.1]


def test_copies_that_differ_in_case_spaces_or_punctuation_are_held_out_together():
    for i in range(200):
        copies = [f"Bakı şəhəri {i}", f"bakı  şəhəri, {i}!", f"BAKı ŞƏHƏRI {i}\n"]
        assert len({is_validation(text, 0.5) for text in copies}) == 1
