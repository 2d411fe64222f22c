"""clean_corpus: every document is kept, clean, or dropped for a reason that is counted."""

import fcntl
import hashlib
import json

import pytest
import zstandard
from conftest import CORPUS

from dilqur.data.documents import read
from dilqur.pipeline.manifest import read_manifest

PROGRAM = "data_tools/clean_corpus.py"
GOOD = "Bakı Xəzər dənizinin sahilində yerləşən qədim və gözəl bir şəhərdir."  # 68 characters


@pytest.fixture
def clean(run, tmp_path):
    """Clean a list of texts with some flags; returns (kept texts, counts)."""

    def make(texts, *flags):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
        run(PROGRAM, "--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out", *flags)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return kept(tmp_path / "out" / "train"), {
            k: n for k, n in {**report["counts"], **report["dropped"]}.items() if n
        }

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
    assert len(files) > 6  # of six files, most with documents in both splits
    assert all((tmp_path / f).read_bytes() == (made / "clean" / f).read_bytes() for f in files)


def test_source_and_licence_go_with_the_text_and_other_keys_do_not(run, tmp_path):
    record = {"text": GOOD, "id": 7, "source": "wiki", "license": "CC BY-SA", "url": None, "views": 12}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out")
    (document,) = read([str(tmp_path / "out" / "train" / "in.jsonl.zst")])
    assert document.record == {"text": GOOD, "id": 7, "source": "wiki", "license": "CC BY-SA"}  # in this order


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


def corpus_bytes(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for s in ("train", "validation") for p in (folder / s).rglob("*.*")
    }


def test_the_same_bytes_for_any_number_of_workers_and_in_parts(made, run, tmp_path):
    flags = ["--input", CORPUS / "az", "--language", "az", "--validation_fraction", 0.1, "--output_dir"]
    for workers in (1, 3):
        run(PROGRAM, *flags, tmp_path / str(workers), "--num_proc", workers)
    parts = [PROGRAM, *flags, tmp_path / "parts", "--of", 2]
    run(*parts, "--shard", 1)
    assert "files are not done in any part" in run(*parts, "--finish", "true", code=2).stderr
    run(*parts, "--shard", 0)
    assert not (tmp_path / "parts" / "train").exists()
    run(*parts, "--finish", "true")
    expected = corpus_bytes(made / "clean")
    assert all(corpus_bytes(tmp_path / name) == expected for name in ("1", "3", "parts"))
    results = [read_manifest(folder)["result"] for folder in (made / "clean", tmp_path / "parts")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    assert not (tmp_path / "parts" / ".work").exists()


def test_sources_have_settings_of_their_own_and_folders_of_their_own(run, tmp_path):
    short = json.dumps({"text": GOOD[:60]}) + "\n"
    records = (
        json.dumps({"content": f"{GOOD} Əlaqə: anar@mail.az", "license": "MIT"}) + "\n" + json.dumps({"content": GOOD})
    )
    for name, text in (("web.jsonl", records), ("law.jsonl", short)):
        (tmp_path / name).write_text(text)
    (tmp_path / "clean.yaml").write_text(
        f"""
min_chars: 65
sources:
  - {{name: web, input: [{tmp_path}/web.jsonl], text_field: content, license: CC0, pii: {{email: mask}}}}
  - {{name: law, input: [{tmp_path}/law.jsonl], min_chars: 10}}
"""
    )
    run(PROGRAM, "--config", tmp_path / "clean.yaml", "--output_dir", tmp_path / "out")
    found = {
        str(p.relative_to(tmp_path / "out")): [d.record for d in read([str(p)])]
        for p in (tmp_path / "out").rglob("*.zst")
    }
    masked, plain = found["train/web/web.jsonl.zst"]
    assert "anar@mail.az" not in masked["text"] and masked["text"].startswith(GOOD)
    assert {k: masked[k] for k in masked if k != "text"} == {"id": "web/web:1", "source": "web", "license": "MIT"}
    assert plain == {"text": GOOD, "id": "web/web:2", "source": "web", "license": "CC0"}
    assert found["train/law/law.jsonl.zst"] == [{"text": GOOD[:60], "id": "law/law:1", "source": "law"}]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| documents read | 2 | 1 | 3 |" in report and "pii_email 1" in report


def test_the_first_of_near_copies_is_kept_and_the_report_shows_the_others(run, tmp_path):
    base = " ".join(f"{word}{n}" for n, word in enumerate(GOOD.split() * 8))
    copies = [
        base,
        base.replace("gözəl7", "gözəldir7"),
        base.replace("1", "5"),
        "Tamam başqa bir mətn burada yazılıb. " + GOOD,
        "qısa",
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(copies)))
    flags = ["--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out"]
    run(PROGRAM, *flags, "--near_duplicate_threshold", 0.65, "--min_chars", 100, "--write_dropped", "true")
    assert kept(tmp_path / "out" / "train") == [copies[0], copies[3]]
    dropped = [document.record for document in read([str(tmp_path / "out" / "dropped" / "in.jsonl.zst")])]
    assert [(d["id"], d["reason"]) for d in dropped] == [(4, "too_short"), (1, "near_duplicate"), (2, "near_duplicate")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"near_duplicate": 2, "too_short": 1}
    assert [where for where, _ in report["sources"]["input"]["examples"]["near_duplicate"]] == ["1", "2"]


def test_near_copies_that_are_kept_are_held_out_together(run, tmp_path):
    """Copies in case and punctuation: kept where only exact ones are dropped, and never in both splits."""
    texts = [" ".join(f"{word}{'abcdefghij'[i % 10]}{'klmnop'[i // 10]}" for word in GOOD.split()) for i in range(60)]
    both = [variant for text in texts for variant in (text, text.upper() + "!")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in both))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--validation_fraction", 0.3, "--output_dir", tmp_path / "out")
    train, held_out = (set(kept(tmp_path / "out" / split)) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 120 and held_out
    for text in texts:
        assert (text in train) == (text.upper() + "!" in train)


def test_reworded_copies_of_a_text_stand_on_one_side_though_only_exact_ones_are_dropped(run, tmp_path):
    words = [f"{word}{i}" for i, word in enumerate("əbcçdefgğhxıijkqlmnoöprsştuüvyz" * 4)]
    families = []
    for family in range(40):
        base = [f"{word}{'abcdefgh'[family % 8]}{'klmno'[family // 8]}" for word in words]
        families.append([" ".join([*base[:at], "dəyişdi", *base[at + 1 :]]) for at in (5, 60, 110)])
    lines = [json.dumps({"text": text}) + "\n" for family in families for text in family]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--validation_fraction", 0.3, "--output_dir", tmp_path / "out")
    train, held_out = (set(kept(tmp_path / "out" / split)) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 120 and 3 < len(held_out) < 80
    assert not [family for family in families if len(train & set(family)) not in (0, 3)]


def test_documents_of_an_id_that_came_before_are_dropped_if_asked(run, tmp_path):
    records = [{"text": f"{GOOD} {i}", "id": key} for i, key in enumerate(["a", "b", "a", "c"])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--unique_ids", "true", "--output_dir", tmp_path / "out")
    assert kept(tmp_path / "out" / "train") == [records[i]["text"] for i in (0, 1, 3)]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == {"duplicate_id": 1}


def test_of_a_text_whose_first_copy_goes_for_its_id_the_next_one_stays(run, tmp_path):
    texts = [f"{GOOD} {x}" for x in "XYYZ"]
    records = [{"text": t, "id": i} for t, i in zip(texts, "AABC", strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run(PROGRAM, "--input", tmp_path / "in.jsonl", "--unique_ids", "true", "--output_dir", tmp_path / "out")
    assert kept(tmp_path / "out" / "train") == [texts[0], texts[2], texts[3]]


def test_documents_without_an_id_have_none_in_common(run, tmp_path):
    for name in ("x/p.jsonl", "y/p.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{GOOD} {name} {i}"}) + "\n" for i in range(20)))
    flags = ["--input", tmp_path / "x", tmp_path / "y", "--unique_ids", "true", "--output_dir", tmp_path / "out"]
    assert "40 documents read, 40 to train/" in run(PROGRAM, *flags).stdout


def test_what_a_killed_run_has_moved_is_not_left_beside_the_next_result(run, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps({"text": GOOD}))
    (out / ".work").mkdir(parents=True)  # as a kill between the moves and the manifest leaves it
    (out / "validation").mkdir()
    (out / "validation" / "gone.jsonl").write_text(json.dumps({"text": GOOD}))
    run(PROGRAM, "--input", source, "--output_dir", out)
    assert not (out / "validation").exists() and kept(out / "train") == [GOOD]
    (tmp_path / "mine" / "train").mkdir(parents=True)
    line = run(PROGRAM, "--input", source, "--output_dir", tmp_path / "mine", code=2).stderr
    assert "holds train, which is not of this program; choose another --output_dir" in line


def test_a_takedown_that_comes_after_a_kill_is_heeded(run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, line in (("a", json.dumps({"text": GOOD, "url": "https://a.az/1"})), ("b", "broken")):
        (source / f"{name}.jsonl").write_text(line)
    (tmp_path / "hosts.txt").write_text("b.az\n")
    flags = ["--input", source, "--blocked_urls", tmp_path / "hosts.txt", "--output_dir", tmp_path / "out"]
    assert "b.jsonl:1: broken JSON" in run(PROGRAM, *flags, code=2).stderr
    (tmp_path / "hosts.txt").write_text("b.az\na.az\n")
    (source / "b.jsonl").write_text(json.dumps({"text": f"{GOOD} b", "url": "https://c.az/1"}))
    run(PROGRAM, *flags)
    assert kept(tmp_path / "out" / "train") == [f"{GOOD} b"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "dropped: blocked_url" in report and GOOD not in report
    with (tmp_path / "hosts.txt").open("a") as file:
        file.write("c.az\n")
    assert "its input" in run(PROGRAM, *flags, code=2).stderr  # finished with another list


def test_parquet_out_holds_the_same_documents(made, run, tmp_path):
    flags = ["--input", CORPUS / "az", "--language", "az", "--validation_fraction", 0.1, "--output_format", "parquet"]
    run(PROGRAM, *flags, "--output_dir", tmp_path / "out")
    for split in ("train", "validation"):
        assert kept(tmp_path / "out" / split) == kept(made / "clean" / split)


def test_a_file_that_was_done_is_not_cleaned_again_after_an_error(run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jsonl").write_text(json.dumps({"text": f"{GOOD} {i}"}) + "\n" + "broken\n" * (i == 2))
    flags = ["--input", source, "--output_dir", tmp_path / "out", "--num_proc", 1]
    assert "2.jsonl:2: broken JSON" in run(PROGRAM, *flags, code=2).stderr
    done = sorted((tmp_path / "out" / ".work").glob("*/filtered.json"))
    assert len(done) == 2 and not (tmp_path / "out" / "train").exists()
    times = [p.stat().st_mtime_ns for p in done]
    (source / "2.jsonl").write_text(json.dumps({"text": f"{GOOD} 2"}))
    seen = run(PROGRAM, *flags)
    assert "3 documents read, 3 to train/" in seen.stdout
    assert times  # the folder is gone with the result; what matters is that the result is whole
    assert sorted(kept(tmp_path / "out" / "train")) == [f"{GOOD} {i}" for i in range(3)]


def test_every_step_of_a_recipe_counts_under_its_own_reason(run, tmp_path):
    (tmp_path / "hosts.txt").write_text("spam.az\n")
    (tmp_path / "exam.txt").write_text(
        "Azərbaycan Xalq Cümhuriyyəti hansı ildə və hansı şəhərdə elan olunmuşdur deyə soruşdular\n"
    )
    records = [
        {"text": GOOD, "url": "https://www.spam.az/1"},
        {
            "text": f"{GOOD} İmtahan: azərbaycan xalq cümhuriyyəti hansı ildə, və hansı şəhərdə elan olunmuşdur deyə soruşdular?"
        },
        {"text": f"{GOOD} 4169 7388 1234 5679 ilə başlayan kart, FIN 5ABC1DE"},
        {"text": "1234567890 " * 9 + "və s."},
        {"text": "Баку расположен на берегу Каспийского моря, это древний и красивый город."},
        {"text": GOOD.upper()},
        {"text": GOOD},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "clean.yaml").write_text(
        f"""
input: [{tmp_path}/in.jsonl]
script: Latin
max_digit_share: 0.5
max_upper_case_share: 0.6
blocked_urls: [{tmp_path}/hosts.txt]
benchmarks: [{tmp_path}/exam.txt]
benchmark_words: 11
pii: {{fin: drop}}
pii_patterns: {{fin: '\\b(?=\\w*\\d)(?=\\w*[A-Z])[0-9A-HJ-NP-Z]{{7}}\\b'}}
"""
    )
    run(PROGRAM, "--config", tmp_path / "clean.yaml", "--output_dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = ("blocked_url", "benchmark", "pii_fin", "many_digits", "other_script", "upper_case")
    assert report["dropped"] == dict.fromkeys(sorted(reasons), 1)
    assert kept(tmp_path / "out" / "train") == [GOOD]


def test_run_again_it_says_that_it_has_finished(run, made):
    flags = ["--language", "az", "--validation_fraction", 0.1, "--output_dir", made / "clean"]
    assert "nothing to do" in run(PROGRAM, "--input", CORPUS / "az", *flags).stdout


# -- starting again ---------------------------------------------------------------------------------------------------


def recipe(folder, **sources):
    """clean.yaml in `folder`, of sources by name; returns its path."""
    rows = [{"name": name, **settings} for name, settings in sources.items()]
    (folder / "clean.yaml").write_text(json.dumps({"sources": rows}))  # JSON is YAML
    return folder / "clean.yaml"


def test_sources_that_change_places_after_a_kill_keep_their_own_rules_and_names(run, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{GOOD} {name}"}))
    (tmp_path / "c.jsonl").write_text("broken")
    web, law = {"min_chars": 20, "license": "CC0"}, {"min_chars": 400, "license": "MIT"}
    a, b, c = ([str(tmp_path / f"{name}.jsonl")] for name in "abc")
    flags = ["--output_dir", tmp_path / "out", "--num_proc", 1, "--config"]
    first = recipe(tmp_path, web={**web, "input": a}, law={**law, "input": b}, rest={"input": c})
    assert "c.jsonl:1: broken JSON" in run(PROGRAM, *flags, first, code=2).stderr
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": f"{GOOD} c"}))
    run(PROGRAM, *flags, recipe(tmp_path, web={**web, "input": b}, law={**law, "input": a}, rest={"input": c}))
    (document,) = read([str(tmp_path / "out" / "train" / "web" / "b.jsonl.zst")])
    assert document.record == {"text": f"{GOOD} b", "id": "web/b:1", "source": "web", "license": "CC0"}
    counts = {n: s["counts"] for n, s in json.loads((tmp_path / "out" / "report.json").read_text())["sources"].items()}
    assert counts["law"]["too_short"] == 1 and "too_short" not in counts["web"]


def test_a_source_that_changes_makes_no_work_for_the_others(run, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{GOOD} {name}"}))
    a, b = ([str(tmp_path / f"{name}.jsonl")] for name in "ab")
    flags = ["--output_dir", tmp_path / "out", "--shard", 0, "--of", 1, "--config"]
    run(PROGRAM, *flags, recipe(tmp_path, web={"input": a}, law={"input": b}))
    done = {json.loads(p.read_text())["path"]: p for p in (tmp_path / "out" / ".work").glob("*/filtered.json")}
    before = {path: p.stat().st_mtime_ns for path, p in done.items()}
    run(PROGRAM, *flags, recipe(tmp_path, web={"input": a}, law={"input": b, "min_chars": 20}))
    assert {path for path, p in done.items() if p.stat().st_mtime_ns != before[path]} == set(b)


@pytest.mark.parametrize("lock", [".lock", ".work/part-00000/.lock", ".work/0123456789abcdef.lock"])
def test_what_another_process_is_working_on_is_not_overwritten(run, tmp_path, lock):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": GOOD}))
    work = tmp_path / "out" / ".work" / "0123456789abcdef"
    work.mkdir(parents=True)
    (tmp_path / "out" / lock).parent.mkdir(exist_ok=True)
    flags = ["--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out", "--overwrite_output_dir", "true"]
    with (tmp_path / "out" / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = run(PROGRAM, *flags, code=2).stderr
    assert f"is at work in it ({lock}); wait for it, or end it" in line and line.count("\n") == 1
    assert work.exists()
    run(PROGRAM, *flags)
    assert kept(tmp_path / "out" / "train") == [GOOD]


def test_putting_parts_together_does_not_begin_by_removing_them(made, run):
    flags = ["--input", CORPUS / "az", "--of", 2, "--finish", "true", "--overwrite_output_dir", "true"]
    line = run(PROGRAM, *flags, "--output_dir", made / "clean", code=2).stderr
    assert "--overwrite_output_dir with --finish: it would remove what is to be put together; leave it out" in line
    assert (made / "clean" / "manifest.json").exists()


# -- ids, counts and examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["jsonl.zst", "parquet"])
def test_ids_are_kept_with_all_their_digits_whatever_kind_of_number_they_are(run, tmp_path, output_format):
    numbers = [7, 7.5, -3, 18446744073709551616123, 1e300, int("1" * 400)]
    written = [*map(str, numbers), '"ad"', "NaN", "null", "[1]", "true", "1e999"]
    (tmp_path / "b").mkdir()
    for name in ("a", "b/a"):
        lines = [f'{{"id": {value}, "text": "{GOOD} {name} {i}"}}\n' for i, value in enumerate(written)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = ["--input", tmp_path / "a.jsonl", tmp_path / "b", "--output_dir", tmp_path / "out", "--unique_ids", "true"]
    run(PROGRAM, *flags, "--write_dropped", "true", "--output_format", output_format)

    def ids(path):
        if output_format == "parquet" and "dropped" not in str(path):
            return [d.record["id"] for d in read([str(path)])]
        data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
        return [json.loads(line)["id"] for line in data.splitlines()]

    expected = [*numbers, "ad", *(f"a:{line}" for line in range(8, 13))]  # without an id: the file and the line
    assert ids(tmp_path / "out" / "train" / f"a.{output_format}") == (
        expected if output_format == "jsonl.zst" else list(map(str, expected))
    )
    assert ids(tmp_path / "out" / "dropped" / "a-2.jsonl.zst") == [*numbers, "ad"]
    assert ids(tmp_path / "out" / "train" / f"a-2.{output_format}") == [f"a-2:{line}" for line in range(8, 13)]


def test_bad_records_are_read_and_dropped_and_the_report_says_what_was_wrong_with_them(run, tmp_path):
    good = [json.dumps({"text": f"{GOOD} {i}"}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join([*good, *["broken"] * 7, '{"body": "x"}']))
    flags = ["--input", tmp_path / "in.jsonl", "--on_error", "skip", "--output_dir", tmp_path / "out"]
    assert "11 documents read, 3 to train/" in run(PROGRAM, *flags).stdout
    result = read_manifest(tmp_path / "out")["result"]
    assert (result["read"], result["kept_train"], result["dropped"]) == (11, 3, {"bad_record": 8})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    examples = report["sources"]["input"]["examples"]["bad_record"]
    assert len(examples) == 5 and examples[0][0] == f"{tmp_path}/in.jsonl:4"
    assert examples[0][1].startswith("broken JSON") and "--on_error" not in examples[0][1]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "27.3% of the documents" in text and "## bad_record" in text


def test_the_report_shows_nothing_that_was_to_be_hidden(run, tmp_path):
    texts = ["Yazın: anar@mail.az", "Zəng: +994 50 123 45 67", "gizli", f"{GOOD} anar@mail.az", f"{GOOD} anar@mail.az"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "hashes.txt").write_text(hashlib.sha256(b"gizli").hexdigest())
    settings = {
        "input": [str(tmp_path / "in.jsonl")],
        "pii": {"email": "mask", "phone": "drop"},
        "blocked_hashes": [str(tmp_path / "hashes.txt")],
    }
    (tmp_path / "clean.yaml").write_text(json.dumps(settings))
    run(PROGRAM, "--config", tmp_path / "clean.yaml", "--output_dir", tmp_path / "out")
    for name in ("report.md", "report.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "too_short" in text and "Yazın: email@example.com" in text and "Zəng: +000" in text
        assert "blocked_text" in text and "exact_duplicate" in text
        assert not any(hidden in text for hidden in ("anar@", "123 45 67", "gizli"))


# -- mistakes in one line ---------------------------------------------------------------------------------------------


def test_an_input_whose_result_could_have_no_name_is_refused_before_the_work(run, tmp_path):
    path = tmp_path / f"{'ə' * 122}.txt"
    path.write_text(GOOD)
    line = run(PROGRAM, "--input", path, "--output_dir", tmp_path / "out", code=2).stderr
    assert f"{path}: too long a name" in line and "shorten it" in line and not (tmp_path / "out").exists()
    path.rename(tmp_path / f"{'ə' * 119}.txt")
    run(PROGRAM, "--input", tmp_path, "--output_dir", tmp_path.parent / f"{tmp_path.name}-out")


@pytest.mark.parametrize("name", ["xəbərlər", "समाचार", "ข่าว", "خبرها"])
def test_a_source_may_have_a_name_in_any_script(run, tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": GOOD}))
    made = recipe(tmp_path, **{name: {"input": [str(tmp_path / f"{name}.jsonl")]}})
    run(PROGRAM, "--config", made, "--output_dir", tmp_path / "out")
    (kept,) = read([str(tmp_path / "out" / "train" / name / f"{name}.jsonl.zst")])
    assert kept.record["source"] == name


@pytest.mark.parametrize("name", ["a$b^^$", "a/b", ".a", "a|b", "", "n" * 300, "म" * 90])
def test_a_source_with_a_name_that_is_none_for_a_folder_is_refused(run, tmp_path, name):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": GOOD}))
    made = recipe(tmp_path, **{name: {"input": [str(tmp_path / "in.jsonl")]}})
    line = run(PROGRAM, "--config", made, "--output_dir", tmp_path / "out", "--check", "true", code=2).stderr
    assert f"sources: the name {name!r} must be a plain folder name" in line and line.count("\n") == 1


def test_a_file_is_not_in_two_sources_by_way_of_a_link(run, tmp_path):
    for name in ("web", "law"):
        (tmp_path / name).mkdir()
    (tmp_path / "web" / "a.jsonl").write_text(json.dumps({"text": GOOD}))
    (tmp_path / "law" / "b.jsonl").symlink_to(tmp_path / "web" / "a.jsonl")
    made = recipe(tmp_path, **{name: {"input": [str(tmp_path / name)]} for name in ("web", "law")})
    line = run(PROGRAM, "--config", made, "--output_dir", tmp_path / "out", code=2).stderr
    link, file = tmp_path / "law" / "b.jsonl", tmp_path / "web" / "a.jsonl"
    assert f"sources: {link}, which is {file}, is in web and in law; take it out of one of them" in line


def test_a_corpus_that_is_held_out_whole_says_so(run, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"{GOOD} {i}"}) + "\n" for i in range(8)))
    flags = ["--input", tmp_path / "in.jsonl", "--validation_fraction", "1.0", "--output_dir", tmp_path / "out"]
    line = run(PROGRAM, *flags, code=2).stderr
    assert "all 8 documents that are left are held out, none is for training; lower validation_fraction (1)" in line
