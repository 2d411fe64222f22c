"""eval_tokenizer: fertility and its companions, by rules that are stated, for any kind of tokenizer."""

import gzip
import json

import pytest
from conftest import CORPUS, SHARED
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dilqur.stage import read_manifest

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
    assert rows == ["tokenizer", "---", "small", "ours"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for rule in results["rules"].values():
        assert rule in table
    assert read_manifest(tmp_path / "out")["result"]["tokenizers"] == results["tokenizers"]
    assert (tmp_path / "out" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_folder_it_prints_and_writes_nothing(run, text, wordpiece, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert "| wordpiece | 1.250 |" in run(PROGRAM, "--tokenizer", wordpiece, "--input", text, cwd=tmp_path).stdout
    assert sorted(tmp_path.rglob("*")) == before


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


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no tokenizers of known models beside this checkout")
def test_known_tokenizers_have_about_the_fertility_they_have_on_other_text(run):
    elsewhere = {"llama3": 3.41, "mbert-cased": 2.53}  # on 127,301 words of other held-out text
    tokenizers = [SHARED / "tokenizers" / f"{name}.tokenizer.json.gz" for name in elsewhere]
    text = SHARED / "data" / "az" / "wiki_sentences.jsonl.gz"
    results = json.loads(run(PROGRAM, "--tokenizer", *tokenizers, "--input", text, "--json").stdout)["tokenizers"]
    assert {name: r["fertility"] for name, r in results.items()} == pytest.approx(elsewhere, abs=0.15)
