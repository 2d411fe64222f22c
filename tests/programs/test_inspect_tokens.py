"""inspect_tokens: what is in token shards, as text."""

import json
import shutil

import pytest

from dilqur.stage import read_manifest
from dilqur.token_shards import TokenShards
from dilqur.tokenizer import TextTokenizer

PROGRAM = "data_tools/inspect_tokens.py"


@pytest.fixture
def inspect(run, made):
    """Runs it on the shards of `made` with some flags; returns its JSON object."""
    return lambda *flags: json.loads(run(PROGRAM, made / "shards", *flags, "--json").stdout)


def test_it_counts_the_whole_folder(inspect, made):
    shards, manifest = TokenShards(made / "shards"), read_manifest(made / "shards")
    out = inspect("--max_length", 64)
    assert (out["documents"], out["tokens"]) == (manifest["documents"], manifest["tokens"])
    assert out["samples"] == manifest["tokens"] // 64
    assert out["bytes_per_token"] == pytest.approx(manifest["utf8_bytes"] / manifest["tokens"], abs=1e-4)
    lengths = shards.document_lengths()
    assert (out["document_tokens"]["min"], out["document_tokens"]["max"]) == (lengths.min(), lengths.max())
    assert out["documents_cut_by_samples"] == 1  # the shortest has 230 tokens, a sample 64
    assert inspect("--max_length", manifest["tokens"])["documents_cut_by_samples"] == 0


def test_a_sample_is_what_training_sees_with_the_documents_marked(inspect, made):
    tokenizer, shards = TextTokenizer(made / "tokenizer"), TokenShards(made / "shards")
    out = inspect("--sample", 5, "--max_length", 128)
    assert out["ids"] == shards.read(5 * 128, 128).tolist()
    assert out["document_starts"] == [i for i, token in enumerate(out["ids"]) if token == tokenizer.bos_id]
    assert out["text"].count("| <|begin_of_text|>") == len(out["document_starts"])
    assert out["text"].replace("\n| ", "").removeprefix("| ") == tokenizer.decode(out["ids"])


def test_the_first_sample_begins_with_a_document(inspect):
    assert inspect("--sample", 0, "--max_length", 16)["text"].startswith("| <|begin_of_text|>")


def test_a_document_is_shown_whole(inspect, made):
    text = TextTokenizer(made / "tokenizer").decode(TokenShards(made / "shards").document(3))
    assert inspect("--document", 3)["text"] == text
    assert text.startswith("<|begin_of_text|>") and text.endswith("<|end_of_text|>")


def test_it_is_readable_without_json_and_says_that_it_verified(run, made):
    lines = run(PROGRAM, made / "shards", "--verify").stdout.splitlines()
    assert "documents: 157" in lines and "verified: every checksum is the manifest's" in lines


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--sample", 10**6], "--sample 1000000: there are"), (["--document", 157], "--document 157: there are 157")],
)
def test_what_is_not_there_is_said_with_how_much_is(run, made, flags, words):
    assert words in run(PROGRAM, made / "shards", *flags, code=2).stderr


def test_another_tokenizer_than_the_shards_own_is_refused(run, made, tmp_path):
    shutil.copytree(made / "tokenizer", tmp_path / "other")
    spec = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))
    done = run(PROGRAM, made / "shards", "--document", 0, "--tokenizer", tmp_path / "other", code=2)
    assert "not the tokenizer" in done.stderr and "was packed with (its hash differs)" in done.stderr


@pytest.mark.parametrize("folder", ["clean", "nowhere"])
def test_what_is_no_folder_of_shards_is_refused(run, made, folder):
    done = run(PROGRAM, made / folder, code=2)
    assert "not a folder of token shards" in done.stderr or "is not finished" in done.stderr
