"""inspect_tokens: what is in token shards, as text."""

import json
import shutil

import numpy as np
import pytest

from dilqur.common.hashing import file_checksum
from dilqur.data.token_shards import TokenShards
from dilqur.pipeline.manifest import read_manifest
from dilqur.tokenizer.text_tokenizer import TextTokenizer

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
    lengths = np.concatenate([np.diff(shards.offsets(s)) for s in range(shards.num_shards)])
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


def test_it_is_readable_without_json(run, made):
    assert "documents: 155" in run(PROGRAM, made / "shards").stdout.splitlines()


def test_verify_reads_many_folders_and_says_a_line_of_each(run, made):
    lines = run(PROGRAM, "verify", made / "shards", made / "held_out").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(made / "shards"), str(made / "held_out")]
    manifest = read_manifest(made / "shards")
    assert f"whole: 155 documents, {manifest['tokens']:,} tokens, 1 shards" in lines[0]
    out = json.loads(run(PROGRAM, "verify", made / "shards", "--json").stdout)
    assert out[str(made / "shards")]["tokens"] == manifest["tokens"]
    assert run(PROGRAM, "verify", made / "shards", "--check").stdout == "inspect_tokens: ok\n"


def rewritten(file, change):
    """The file with its array changed, and the manifest's checksum with it: only looking at the numbers shows it."""
    array = np.load(file)
    change(array)
    np.save(file, array)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["shards"][0]["files"][file.name]["xxh3"] = file_checksum(file)
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def put(index, value):
    return lambda array: array.__setitem__(index, value)


def edited(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "tokens-00000.npy").write_bytes(b""), "tokens-00000.npy: 0 bytes, manifest.json says"),
        (lambda f: (f / "offsets-00000.npy").unlink(), "offsets-00000.npy: missing"),
        (lambda f: rewritten(f / "offsets-00000.npy", put(3, 0)), "offsets-00000.npy: document 3 begins at 0, before"),
        (lambda f: rewritten(f / "offsets-00000.npy", put(0, 1)), "offsets-00000.npy: document 0 begins at 1"),
        (
            lambda f: rewritten(f / "offsets-00000.npy", put(-1, 10**9)),
            "the documents end at 1000000000, the tokens at",
        ),
        (lambda f: rewritten(f / "tokens-00000.npy", put(7, 1280)), "token 7: id 1280 is not below vocab_size 1280"),
        (lambda f: rewritten(f / "tokens-00000.npy", put(7, -1)), "token 7: id -1 is not below vocab_size 1280"),
        (lambda f: edited(f, documents=3), "manifest.json: says 3 documents, its shards hold 155"),
    ],
)
def test_verify_ends_with_the_first_problem_in_one_line(run, made, tmp_path, damage, words):
    shutil.copytree(made / "shards", tmp_path / "shards")
    damage(tmp_path / "shards")
    done = run(PROGRAM, "verify", made / "held_out", tmp_path / "shards", code=2)
    assert not done.stdout or done.stdout.startswith(f"{made / 'held_out'}: whole: ")  # sizes are looked at first
    (line,) = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--sample", 10**6], "--sample 1000000: there are"), (["--document", 155], "--document 155: there are 155")],
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
