"""clean_corpus: every document is kept, clean, or dropped for a reason that is counted."""

import json

import pytest
from conftest import CORPUS

from dilqur.documents import read
from dilqur.stage import read_manifest

PROGRAM = "data_tools/clean_corpus.py"
GOOD = "Bakı Xəzər dənizinin sahilində yerləşən qədim və gözəl bir şəhərdir."  # 68 characters


@pytest.fixture
def clean(run, tmp_path):
    """Clean a list of texts with some flags; returns (kept texts, counts)."""

    def make(texts, *flags):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
        run(PROGRAM, "--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out", *flags)
        return kept(tmp_path / "out" / "train"), json.loads((tmp_path / "out" / "report.json").read_text())

    return make


def kept(folder):
    return [document.text for document in read(sorted(map(str, folder.glob("*"))))]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Bak\u0131\u200b \ufeffşə\u00adhəri\x07", "Bakı şəhəri"),  # zero-width, BOM, soft hyphen, bell
        ("I\u0307zmir", "İzmir"),  # NFC: one character for the dotted capital
        ("bir\r\niki\rüç\u2028dörd", "bir\niki\nüç\ndörd"),
        ("  bir \u00a0 iki \t üç  ", "bir iki üç"),
        ("bir\n\n\n\niki", "bir\n\niki"),
        ("ailə 👨\u200d👩\u200d👧", "ailə 👨\u200d👩\u200d👧"),  # emoji are joined by an invisible character
    ],
)
def test_text_is_made_one_kind(clean, raw, expected):
    assert clean([raw], "--min_chars", 1)[0] == [expected]


def test_every_document_dropped_is_counted_under_its_reason(clean):
    texts, counts = clean(
        [
            GOOD,
            GOOD.replace(" ", "  "),  # equal once its spaces are one
            "qısa",
            GOOD * 20,
            "The old town lies on a hill above the river, and many visitors come to see it in spring.",
            "Bu sətir təkrar olunur və olunur.\n" * 3,
            f"{GOOD} {GOOD}",  # half of its words are in 5-grams that came before
        ],
        "--language",
        "az",
        "--max_chars",
        1000,
    )
    assert texts == [GOOD]
    assert counts == {
        "read": 7,
        "kept_train": 1,
        "bytes_train": len(GOOD.encode()),
        "exact_duplicate": 1,
        "too_short": 1,
        "too_long": 1,
        "other_language": 1,
        "repeated_lines": 1,
        "repeated_ngrams": 1,
    }


def test_the_held_out_share_is_chosen_by_the_text_and_nothing_is_in_both(made, run, tmp_path):
    train, held_out = kept(made / "clean" / "train"), kept(made / "clean" / "validation")
    assert held_out and not set(train) & set(held_out)
    assert len(train) + len(held_out) == read_manifest(made / "clean")["result"]["read"] == 170
    # the same texts in one file, in another order: the same ones are held out
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(train + held_out)))
    run(PROGRAM, "--input", tmp_path / "all.jsonl", "--validation_fraction", 0.1, "--output_dir", tmp_path / "out")
    assert sorted(held_out) == kept(tmp_path / "out" / "validation")


def test_a_second_run_gives_the_same_bytes(made, run, tmp_path):
    run(PROGRAM, "--input", CORPUS / "az", "--language", "az", "--validation_fraction", "0.1", "--output_dir", tmp_path)
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.zst")]
    assert len(files) == 12  # six files, each with documents in both splits
    assert all((tmp_path / f).read_bytes() == (made / "clean" / f).read_bytes() for f in files)


def test_source_and_licence_go_with_the_text_and_other_keys_do_not(run, tmp_path):
    record = {"text": GOOD, "id": 7, "source": "wiki", "license": "CC BY-SA", "url": None, "views": 12}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out")
    (document,) = read([str(tmp_path / "out" / "train" / "in.jsonl.zst")])
    assert document.record == {"text": GOOD, "id": 7, "source": "wiki", "license": "CC BY-SA"}


def test_files_of_the_same_name_do_not_overwrite_each_other(run, tmp_path):
    for i, name in enumerate(("a/part.txt", "b/part.txt")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{GOOD} {i}")
    run(PROGRAM, "--input", tmp_path / "a", tmp_path / "b", "--output_dir", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "train").iterdir()) == ["part-2.jsonl.zst", "part.jsonl.zst"]
    assert sorted(kept(tmp_path / "out" / "train")) == [f"{GOOD} 0", f"{GOOD} 1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min_chars", 10, "--max_chars", 9], "min_chars 10 is more than max_chars 9"),
        (["--language", "xx"], "language: 'xx' is not among the identifier's"),
        (["--min_chars", 500_000], "no document of 170 is left (too_short 170): loosen a filter"),
    ],
)
def test_settings_that_leave_nothing_are_refused(run, tmp_path, flags, words):
    done = run(PROGRAM, "--input", CORPUS / "az", "--output_dir", tmp_path / "out", *flags, code=2)
    assert words in done.stderr
    assert not list(tmp_path.rglob("*.zst"))


def test_run_again_it_says_that_it_has_finished(run, made):
    flags = ["--language", "az", "--validation_fraction", 0.1, "--output_dir", made / "clean"]
    assert "nothing to do" in run(PROGRAM, "--input", CORPUS / "az", *flags).stdout
