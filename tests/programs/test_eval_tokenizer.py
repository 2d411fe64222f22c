"""eval_tokenizer: fertility and its companions, by rules that are stated, for any kind of tokenizer."""

import gzip
import json
import subprocess
import sys

import pytest
from conftest import CORPUS, ROOT, SHARED
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dilqur.pipeline.manifest import read_manifest

PROGRAM = "data_tools/eval_tokenizer.py"
TEXT = "salam dünya salam xyz"  # 4 words, 22 bytes: ü is two


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def wordpiece(tmp_path):
    """A WordPiece tokenizer that knows salam, dün and ##ya, and has one entry that never occurs."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "salam": 1, "dün": 2, "##ya": 3, "alma": 4}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    (tmp_path / "wordpiece").mkdir()
    tokenizer.save(str(tmp_path / "wordpiece" / "tokenizer.json"))
    return tmp_path / "wordpiece"


def test_the_figures_can_be_counted_by_hand(run, text, wordpiece):
    results = json.loads(run(PROGRAM, "--tokenizer", wordpiece, "--input", text, "--json").stdout)
    assert (results["documents"], results["words"], results["utf8_bytes"]) == (1, 4, 22)
    got = results["tokenizers"]["wordpiece"]
    assert got["tokens"] == 5  # salam, dün, ##ya, salam, [UNK]
    assert got["fertility"] == 1.25  # 5 / 4
    assert got["bytes_per_token"] == 4.4  # 22 / 5
    assert got["words_kept_whole"] == 0.5  # salam twice; an unknown token keeps nothing of its word
    assert (got["vocab_size"], got["vocab_share_used"], got["unknown_tokens"]) == (5, 0.8, 1)


def test_a_word_counts_as_whole_with_its_space_and_not_when_bytes_of_it_are_apart(run, tmp_path):
    # byte-level BPE over "Ġab" and the two bytes of ş; "ab" at the start of the text has no space before it
    vocabulary = {token: i for i, token in enumerate(["a", "b", "Ġ", "Å", "Ł", "ab", "Ġab", "ÅŁ"])}
    merges = [("a", "b"), ("Ġ", "ab"), ("Å", "Ł")]
    for name, kept in (("with", 4), ("without", 3)):  # with and without the merge that makes ş one token
        count = len(vocabulary) - (name == "without")
        model = models.BPE({t: i for t, i in vocabulary.items() if i < count}, merges[: 3 if name == "with" else 2])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / "text.txt").write_text("ab ab\n\nab abab ş abş")  # abab is ab twice, abş two tokens at the least
        done = run(
            PROGRAM,
            "--tokenizer",
            tmp_path / name,
            "--input",
            tmp_path / "text.txt",
            "--json",
            "--sample_by",
            "document",
        )
        # ab, ab, ab and, where its bytes are merged, ş: its space is a token of its own and belongs to no word
        assert json.loads(done.stdout)["tokenizers"][name]["words_kept_whole"] == pytest.approx(kept / 6, abs=1e-4)


def test_tokens_words_and_bytes_are_those_of_the_packed_shards(run, made):
    done = run(PROGRAM, "--tokenizer", made / "tokenizer", "--input", made / "clean" / "train", "--json")
    results = json.loads(done.stdout)
    packed, got = read_manifest(made / "shards"), results["tokenizers"]["tokenizer"]
    assert (results["documents"], results["words"], results["utf8_bytes"]) == (
        packed["documents"],
        packed["words"],
        packed["utf8_bytes"],
    )
    assert got["tokens"] == packed["tokens"] - 2 * packed["documents"]  # each document has a BOS and an EOS there
    assert got["vocab_size"] == 1280 and got["unknown_tokens"] == 0


def test_a_table_a_plot_and_the_figures_are_left_in_the_folder(run, made, wordpiece, tmp_path):
    done = run(
        PROGRAM,
        "--tokenizer",
        wordpiece,
        made / "tokenizer",
        "--names",
        "small",
        "ours",
        "--input",
        CORPUS / "az",
        "--output_dir",
        tmp_path / "out",
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert done.stdout.strip() == table.strip()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[:4] == ["tokenizer", "---", "small", "ours"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for rule in results["rules"].values():
        assert rule in table
    assert read_manifest(tmp_path / "out")["result"]["tokenizers"] == results["tokenizers"]
    for picture in ("tokenizers.png", "splits.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "sweep.png").exists(), "two tokenizers are no sweep"


def test_without_a_folder_it_prints_and_writes_nothing(run, text, wordpiece, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert "| wordpiece | 1.250 | – |" in run(PROGRAM, "--tokenizer", wordpiece, "--input", text, cwd=tmp_path).stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_who_reads_its_first_line_alone_gets_no_traceback(text, wordpiece):
    command = [sys.executable, ROOT / PROGRAM, "--tokenizer", wordpiece, "--input", text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_the_names_are_the_folders_and_the_files_before_the_dot(run, text, wordpiece, tmp_path):
    packed = gzip.compress((wordpiece / "tokenizer.json").read_bytes())
    (tmp_path / "az-4.tokenizer.json.gz").write_bytes(packed)
    (tmp_path / "runs" / "wordpiece").mkdir(parents=True)
    (tmp_path / "runs" / "wordpiece" / "tokenizer.json.gz").write_bytes(packed)

    def names(*tokenizers, flags=(), code=0):
        done = run(PROGRAM, "--tokenizer", *tokenizers, "--input", text, "--json", *flags, code=code)
        return done.stderr if code else list(json.loads(done.stdout)["tokenizers"])

    assert names(wordpiece / "tokenizer.json", tmp_path / "az-4.tokenizer.json.gz") == ["wordpiece", "az-4"]
    assert "give each one, all different" in names(wordpiece, wordpiece, code=2)
    assert "give each one, all different" in names(wordpiece, flags=["--names", "a", "b"], code=2)
    assert "give each one, all different" in names(wordpiece, flags=["--names", ""], code=2)


# -- document sets ----------------------------------------------------------------------------------------------------


def measure(run, *arguments):
    return json.loads(run(PROGRAM, *arguments, "--json").stdout)


def test_every_input_is_a_document_set_and_all_are_pooled(run, made):
    files = [CORPUS / "az" / f"{name}.jsonl" for name in ("letters", "tales")]
    results = measure(run, "--tokenizer", made / "tokenizer", "--input", *files)
    sets, pooled = results["document_sets"], results["tokenizers"]["tokenizer"]
    assert list(sets) == ["letters", "tales"]
    for name, file in zip(sets, files, strict=True):
        alone = measure(run, "--tokenizer", made / "tokenizer", "--input", file)
        assert sets[name]["words"] == alone["words"]
        assert sets[name]["tokenizers"]["tokenizer"].items() <= alone["tokenizers"]["tokenizer"].items()
    assert pooled["tokens"] == sum(s["tokenizers"]["tokenizer"]["tokens"] for s in sets.values())
    assert pooled["fertility"] == round(pooled["tokens"] / sum(s["words"] for s in sets.values()), 4)


def test_a_recipe_names_document_sets_of_several_files(run, made, tmp_path):
    (tmp_path / "fertility.yaml").write_text(
        f"tokenizer: [{made / 'tokenizer'}]\n"
        "document_sets:\n"
        f"  - {{name: school, input: [{CORPUS / 'az' / 'encyclopedia.jsonl'}, {CORPUS / 'az' / 'instructions.jsonl'}]}}\n"
        f"  - {{name: home, input: [{CORPUS / 'az' / 'everyday.jsonl'}]}}\n"
    )
    done = run(PROGRAM, "--config", tmp_path / "fertility.yaml", "--output_dir", tmp_path / "out")
    assert "| school | " in done.stdout and "| home | " in done.stdout
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["document_sets"]) == ["school", "home"]


def test_intervals_are_given_for_ten_documents_and_not_for_fewer(run, wordpiece, tmp_path):
    for name, lines in (("nine", 9), ("ten", 10)):
        (tmp_path / f"{name}.txt").write_text("salam dünya\n" * lines)
    sets = measure(run, "--tokenizer", wordpiece, "--input", tmp_path / "nine.txt", tmp_path / "ten.txt")[
        "document_sets"
    ]
    assert sets["nine"]["tokenizers"]["wordpiece"]["intervals"]["fertility"] is None
    assert sets["ten"]["tokenizers"]["wordpiece"]["intervals"]["fertility"] == [1.5, 1.5]


def test_measured_again_only_the_speed_differs(run, made, wordpiece):
    command = ["--tokenizer", made / "tokenizer", wordpiece, "--input", CORPUS / "az"]
    one, two = (measure(run, *command) for _ in range(2))
    assert one.pop("speed_here").keys() == two.pop("speed_here").keys() == {"tokenizer", "wordpiece"}
    assert one == two


# -- words, translations, sweeps --------------------------------------------------------------------------------------


def test_words_are_shown_cut_into_their_tokens(run, made, text):
    results = measure(run, "--tokenizer", made / "tokenizer", "--input", text, "--sample_words", "kitablardan", "ﷺ")
    assert "".join(results["splits"]["kitablardan"]["tokenizer"]) == "kitablardan"
    assert len(results["splits"]["kitablardan"]["tokenizer"]) > 1
    assert results["splits"]["ﷺ"]["tokenizer"] == ["‹EF›", "‹B7›", "‹BA›"], "a letter it has only the bytes of"
    table = run(PROGRAM, "--tokenizer", made / "tokenizer", "--input", text, "--sample_words", "kitablardan").stdout
    assert f"| `kitablardan` | `{'·'.join(results['splits']['kitablardan']['tokenizer'])}` |" in table


def test_without_a_wish_they_are_words_of_the_text(run, wordpiece, text):
    results = measure(run, "--tokenizer", wordpiece, "--input", text)
    assert list(results["splits"]) == ["salam"], "the most frequent of its length: all others have that length too"
    assert results["costly_words"]["wordpiece"] == [
        {"word": "dünya", "count": 1, "tokens": 2, "extra_tokens": 1, "split": "dün·ya"}
    ]


def test_the_premium_is_tokens_over_those_of_the_translation(run, wordpiece, text, tmp_path):
    (tmp_path / "az.txt").write_text("salam dünya\n" * 10)  # salam dün ##ya: 3 tokens, 12 bytes
    (tmp_path / "en.txt").write_text("salam alma\n" * 10)  # 2 tokens, 10 bytes
    pair = f"{{name: az-en, input: {tmp_path / 'az.txt'}, reference: {tmp_path / 'en.txt'}}}"
    got = measure(run, "--tokenizer", wordpiece, "--input", text, "--parallel", pair)["parallel"]["az-en"]
    assert (got["pairs"], got["byte_premium"]) == (10, 1.2)
    expected = {"premium": 1.5, "interval": [1.5, 1.5], "tokens": 30, "reference_tokens": 20}
    assert got["tokenizers"]["wordpiece"] == expected
    assert (
        "| az-en | 10 | 1.20 | 1.50 [1.50, 1.50] |"
        in run(PROGRAM, "--tokenizer", wordpiece, "--input", text, "--parallel", pair).stdout
    )


def test_the_parallel_text_of_the_quickstart_costs_more_in_azerbaijani_for_a_tokenizer_of_english(run, text, tmp_path):
    run(
        "data_tools/train_tokenizer.py", "--input", CORPUS / "en", "--vocab_size", 1024, "--output_dir", tmp_path / "en"
    )
    pair = f"{{name: both, input: {CORPUS}/parallel.az.txt, reference: {CORPUS}/parallel.en.txt}}"
    got = measure(run, "--tokenizer", tmp_path / "en", "--input", text, "--parallel", pair)["parallel"]["both"]
    assert got["pairs"] == 40 and got["tokenizers"]["en"]["interval"][0] > 1.5


def test_a_folder_of_sizes_is_measured_as_a_curve(run, made, sweep, wordpiece, tmp_path):
    command = ["--tokenizer", wordpiece, sweep, "--input", CORPUS / "az", "--output_dir", tmp_path / "out"]
    done = run(PROGRAM, *command)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tokenizers"]) == ["wordpiece", "300", "400", "600", "1024"]
    (curve,) = results["sweeps"]
    assert curve["names"] == ["300", "400", "600", "1024"] and curve["vocab_sizes"] == [300, 400, 600, 1024]
    assert curve["fertility"] == [results["tokenizers"][name]["fertility"] for name in curve["names"]]
    assert sorted(curve["fertility"], reverse=True) == curve["fertility"]
    assert f"(300, 400, 600, 1024), knee: {curve['knee']}" in done.stdout and curve["knee"] in ("400", "600")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing to do" in run(PROGRAM, *command).stdout


def test_a_curve_that_is_straight_has_no_knee(run, sweep, tmp_path):
    (tmp_path / "digits.txt").write_text("7 5 3\n")  # three tokens and two spaces, whatever the size
    done = run(PROGRAM, "--tokenizer", sweep, "--input", tmp_path / "digits.txt")
    assert "(300, 400, 600, 1024), knee: none, the curve does not flatten out." in done.stdout


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, text, wordpiece, tmp_path):
    """Runs with a mistake in `arguments`, returns its one line; nothing is left under a final name."""

    def check(*arguments, tokenizer=wordpiece, documents=("--input", text), **more):
        command = [PROGRAM, "--tokenizer", tokenizer, *documents, *arguments, "--output_dir", tmp_path / "out"]
        done = run(*command, code=2, **more)
        assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert [p.name for p in tmp_path.glob("out/*") if p.name != ".lock"] == []
        return done.stderr

    return check


def test_document_sets_that_are_empty_or_overlap(refused, text, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt: no word in there" in refused(documents=("--input", text, tmp_path / "empty.txt"))
    assert "is in two document sets, text and " in refused(documents=("--input", text, f"{tmp_path}/te*.txt"))
    both = f"{{name: a, input: [{text}]}}"
    assert "give either --input or, in a recipe, document_sets" in refused("--document_sets", both)
    assert "give either --input or, in a recipe, document_sets" in refused(documents=())
    again = ("--document_sets", both, f"{{name: a, input: [{tmp_path / 'empty.txt'}]}}")
    assert "the name 'a' must not be empty, and must be there only once" in refused(documents=again)
    assert "a: its input is an empty list" in refused(documents=("--document_sets", "{name: a, input: []}"))


def test_parallel_files_that_do_not_stand_line_by_line(refused, tmp_path):
    for name, lines in (("two", "a\nb\n"), ("three", "a\nb\nc\n"), ("gap", "a\n\nb\n")):
        (tmp_path / f"{name}.txt").write_text(lines)

    def pair(one, other):
        return f"{{name: p, input: {tmp_path}/{one}.txt, reference: {tmp_path}/{other}.txt}}"

    assert (
        f"parallel: p: 2 lines in {tmp_path}/two.txt, 3 in {tmp_path}/three.txt: every line needs its translation"
        in (refused("--parallel", pair("two", "three")))
    )
    assert f"two.txt:2 would translate {tmp_path}/gap.txt:3" in refused("--parallel", pair("two", "gap"))
    assert "the names p, p must be distinct" in refused("--parallel", pair("two", "two"), pair("two", "two"))
    assert "missing.txt: no such file, folder or pattern" in refused("--parallel", pair("two", "missing"))


def test_words_that_are_none(refused, tmp_path):
    assert "sample_words: 'a b' is not a word" in refused("--sample_words", "salam", "a b")
    recipe = tmp_path / "fertility.yaml"
    recipe.write_text("sample_words: []\n")
    assert "sample_words: an empty list" in refused("--config", recipe)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not a tokenizer (EOF while parsing"),
        (b"{}", "not a tokenizer (Model missing"),
        (b"\xff", "not a tokenizer ('utf-8' codec"),
        (Tokenizer(models.BPE()).to_str().encode(), "not a tokenizer (its vocabulary is empty)"),
        (
            Tokenizer(models.WordPiece({"a": 0})).to_str().encode(),
            "cannot encode the text (WordPiece error: Missing [UNK]",
        ),
    ],
    ids=["cut", "of something else", "binary", "empty", "without an unknown token"],
)
def test_a_damaged_tokenizer(refused, tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_bytes(content)
    line = refused(tokenizer=tmp_path)
    assert f"{tmp_path}/tokenizer.json: " in line and words in line


def test_a_folder_without_a_tokenizer_or_a_sweep(refused, run, text, tmp_path):
    (tmp_path / "fertility.yaml").write_text(f"tokenizer: []\ninput: [{text}]\n")
    done = run(PROGRAM, "--config", tmp_path / "fertility.yaml", "--output_dir", tmp_path / "out", code=2)
    assert done.stderr == "error: tokenizer: an empty list: nothing to measure\n"
    (tmp_path / "nothing" / "32k").mkdir(parents=True)
    assert f"{tmp_path}/nothing: no tokenizer.json there, nor in a folder in it" in refused(
        tokenizer=tmp_path / "nothing"
    )


# -- known tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no tokenizers of known models beside this checkout")
def test_known_tokenizers_have_about_the_fertility_they_have_on_other_text(run):
    elsewhere = {"llama3": 3.41, "mbert-cased": 2.53}  # on 127,301 words of other held-out text
    tokenizers = [SHARED / "tokenizers" / f"{name}.tokenizer.json.gz" for name in elsewhere]
    text = SHARED / "data" / "az" / "wiki_sentences.jsonl.gz"
    results = json.loads(run(PROGRAM, "--tokenizer", *tokenizers, "--input", text, "--json").stdout)["tokenizers"]
    assert {name: r["fertility"] for name, r in results.items()} == pytest.approx(elsewhere, abs=0.15)


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no tokenizers of known models beside this checkout")
def test_punctuation_stripped_is_a_tenth_to_three_tenths_less(run):
    """Published of Llama 3 on one text: 3.41 with punctuation, 3.21 without it."""
    text = SHARED / "data" / "az" / "wiki_sentences.jsonl.gz"
    got = measure(run, "--tokenizer", SHARED / "tokenizers" / "llama3.tokenizer.json.gz", "--input", text)["tokenizers"]
    assert 0.1 <= got["llama3"]["fertility"] - got["llama3"]["fertility_stripped"] <= 0.3
    assert got["llama3"]["fertility_word_by_word"] > got["llama3"]["fertility"]
