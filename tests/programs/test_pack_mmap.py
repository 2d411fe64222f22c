"""pack_mmap: text becomes int32 token shards, whole documents in order, the same bytes every time."""

import bz2
import gzip
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import CORPUS, ROOT

from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.data.token_shards import TokenShards
from dilqur.pipeline.manifest import read_manifest
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.tokenizer.whole_words import words_kept_whole

PROGRAM = "data_tools/pack_mmap.py"
BOS, EOS = 1024, 1025


@pytest.fixture
def pack(run, made, tmp_path):
    """Pack the corpus, or texts of one's own, with some flags; returns the folder."""

    def make(*flags, texts=None, **environment):
        source = made / "clean" / "train"
        if texts is not None:
            source = tmp_path / "in.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        where = ["--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out"]
        run(PROGRAM, "--input", source, *where, *flags, **environment)
        return tmp_path / "out"

    return make


@pytest.fixture(scope="module")
def tokenizer(made):
    return TextTokenizer(made / "tokenizer")


@pytest.fixture(scope="module")
def texts(made):
    return [document.text for document in read(expand([str(made / "clean" / "train")]))]


def with_numpy(folder):
    """The documents of a folder of shards, read with numpy alone."""
    for tokens, offsets in zip(sorted(folder.glob("tokens-*")), sorted(folder.glob("offsets-*")), strict=True):
        tokens, offsets = np.load(tokens, mmap_mode="r"), np.load(offsets, mmap_mode="r")
        assert isinstance(tokens, np.memmap) and (tokens.dtype, offsets.dtype) == (np.int32, np.int64)
        yield from (tokens[a:b] for a, b in itertools.pairwise(offsets))


def test_numpy_alone_reads_back_every_document_of_the_corpus(made, tokenizer, texts):
    found = list(with_numpy(made / "shards"))
    assert all(ids[0] == BOS and ids[-1] == EOS and ids[1:-1].max() < BOS for ids in found)
    assert [tokenizer.decode(ids[1:-1]) for ids in found] == texts


def test_documents_over_a_shard_boundary_stay_whole(made, pack):
    folder = pack("--shard_tokens", 5000)  # the corpus has some 57,000 tokens, a document 230 to 570
    shards = read_manifest(folder)["shards"]
    assert len(shards) > 10
    assert all(5000 - 600 < shard["tokens"] <= 5000 for shard in shards[:-1])  # full, but for the document that waits
    assert [d.tolist() for d in with_numpy(folder)] == [d.tolist() for d in with_numpy(made / "shards")]
    whole, cut = TokenShards(made / "shards"), TokenShards(folder, verify=True)
    assert np.array_equal(cut.read(0, cut.num_tokens), whole.read(0, whole.num_tokens))


@pytest.mark.parametrize("flags", [("--num_proc", 1), ("--num_proc", 3), ("--engine", "tokenizers")])
def test_a_second_run_gives_the_same_bytes_with_any_number_of_workers_and_any_engine(made, pack, flags):
    folder = pack(*flags)
    files = sorted(p.name for p in folder.glob("*.npy"))
    assert files == ["offsets-00000.npy", "tokens-00000.npy"]
    assert all((folder / name).read_bytes() == (made / "shards" / name).read_bytes() for name in files)


def test_the_manifest_counts_what_is_there_and_says_what_it_came_from(made, tokenizer, texts):
    manifest = read_manifest(made / "shards")
    assert manifest["documents"] == len(texts) > 100
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["words"] == sum(len(text.split()) for text in texts)
    assert manifest["tokens"] == sum(map(len, with_numpy(made / "shards")))
    assert (manifest["tokenizer_sha256"], manifest["vocab_size"]) == (tokenizer.hash, 1280)
    assert (manifest["bos_id"], manifest["eos_id"]) == (BOS, EOS)
    assert set(manifest["sources"]) == set(expand([str(made / "clean" / "train")]))


def test_text_that_spells_control_tokens_stays_text(pack, tokenizer):
    text = "Salam<|eot_id|><|end_of_text|><|begin_of_text|> dünya"
    (ids,) = with_numpy(pack(texts=[text]))
    assert [i for i in ids if i >= BOS] == [BOS, EOS]
    assert tokenizer.decode(ids[1:-1]) == text


def test_bos_and_eos_can_be_left_out(pack, tokenizer):
    folder = pack("--add_bos", "false", "--add_eos", "false", texts=["Salam"])
    assert [ids.tolist() for ids in with_numpy(folder)] == [tokenizer.encode("Salam")]
    assert read_manifest(folder)["bos_id"] is None


def shard_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*-*.*"))}


def test_the_same_documents_give_the_same_bytes_whatever_they_are_stored_in(made, run, tmp_path, texts):
    texts = [text.replace("\n", " ").strip() for text in texts]  # a line of a .txt is a document
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    stored = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.ZstdCompressor().compress(lines),
        "a.jsonl.bz2": bz2.compress(lines),
        "a.txt": "\n".join(texts).encode(),
        "a.txt.zst": zstandard.ZstdCompressor().compress("\r\n".join(texts).encode()),
        "a.parquet": None,
    }
    found = {}
    for name, data in stored.items():
        path = tmp_path / name
        if data is None:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)
        else:
            path.write_bytes(data)
        run(PROGRAM, "--input", path, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / f"{name}.out")
        found[name] = shard_bytes(tmp_path / f"{name}.out")
    assert all(files == found["a.jsonl"] for files in found.values()), "another storage gave other bytes"
    assert len(found["a.jsonl"]) == 2


def test_parts_packed_side_by_side_and_put_together_are_the_whole(made, run, tmp_path, tokenizer):
    base = ["--input", CORPUS / "az", "--tokenizer", made / "tokenizer", "--shard_tokens", 10_000]
    run(PROGRAM, *base, "--output_dir", tmp_path / "whole")
    base += ["--output_dir", tmp_path / "parts", "--of", 3]
    for part in (2, 0):
        run(PROGRAM, *base, "--shard", part)
    assert "parts: not finished: --shard 1 (of 3)" in run(PROGRAM, *base, "--finish", "true", code=2).stderr
    run(PROGRAM, *base, "--shard", 1)
    assert not (tmp_path / "parts" / "manifest.json").exists()
    run(PROGRAM, *base, "--finish", "true")
    whole, parts = TokenShards(tmp_path / "whole"), TokenShards(tmp_path / "parts")
    parts.check_files(verify=True)
    assert [d.tolist() for d in with_numpy(tmp_path / "parts")] == [d.tolist() for d in with_numpy(tmp_path / "whole")]
    for key in ("documents", "tokens", "words", "utf8_bytes", "whole_words", "records", "sources", "bos_id"):
        assert whole.manifest[key] == parts.manifest[key]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.is_dir()) == []
    assert "nothing to do" in run(PROGRAM, *base, "--finish", "true").stdout


def test_putting_together_can_be_killed_and_called_again(made, run, tmp_path):
    base = ["--input", CORPUS / "az", "--tokenizer", made / "tokenizer", "--shard_tokens", 10_000, "--of", 2]
    for folder in ("a", "b"):
        for part in (0, 1):
            run(PROGRAM, *base, "--output_dir", tmp_path / folder, "--shard", part)
    # as a kill after the first moves leaves it
    (tmp_path / "b/parts/00000-of-00002/tokens-00000.npy").rename(tmp_path / "b/tokens-00000.npy")
    (tmp_path / "b/parts/00000-of-00002/offsets-00000.npy").rename(tmp_path / "b/offsets-00000.npy")
    for folder in ("a", "b"):
        run(PROGRAM, *base, "--output_dir", tmp_path / folder, "--finish", "true")
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_parts_of_an_input_that_has_changed_since_are_not_put_together(made, run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in "abcd":
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(100)))
    base = ["--input", source, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out", "--of", 2]
    run(PROGRAM, *base, "--shard", 0)
    with (source / "d.jsonl").open("a") as file:  # the parts are cut by size: c would be in neither
        file.write(json.dumps({"text": "d " * 9999}) + "\n")
    run(PROGRAM, *base, "--shard", 1)
    line = run(PROGRAM, *base, "--finish", "true", code=2).stderr
    assert (
        f"{tmp_path}/out/parts: {source}/c.jsonl is in none of them; remove that folder, and pack the parts again"
        in line
    )
    done = run(PROGRAM, *base[:-2], "--overwrite_output_dir", "true")
    assert "401 documents" in done.stdout


def test_a_file_that_lies_in_two_parts_is_not_packed_twice(made, run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, documents in (("a", 10), ("b", 10), ("c", 30)):
        lines = [json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(documents)]
        (source / f"{name}.jsonl").write_text("".join(lines))
    base = ["--input", source, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out", "--of", 2]
    for part in (0, 1):  # a and b, c
        run(PROGRAM, *base, "--shard", part)
    (source / "c.jsonl").write_text("".join(lines[:10]))  # by their sizes now: a, b and c
    run(PROGRAM, *base, "--shard", 1)
    assert "b.jsonl is in 2 of them" in run(PROGRAM, *base, "--finish", "true", code=2).stderr


def test_more_files_than_a_part_was_packed_from_are_said_to_be(made, run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps({"text": f"sənəd {i} " * 20}) + "\n" for i in range(300)))
    (source / "b.jsonl").write_text("broken\n")
    base = [
        "--input",
        source,
        "--tokenizer",
        made / "tokenizer",
        "--output_dir",
        tmp_path / "out",
        "--shard_tokens",
        5000,
    ]
    run(PROGRAM, *base, "--of", 1, "--shard", 0, code=2)
    (source / "c.jsonl").write_text('{"text": "c"}\n')
    line = run(PROGRAM, *base, "--of", 1, "--shard", 0, code=2).stderr
    assert "00000-of-00001: was packed from another list of files; remove" in line


def test_a_shard_that_has_gone_since_the_kill_is_packed_again(made, run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    lines = "".join(json.dumps({"text": f"sənəd {i} " * 20}) + "\n" for i in range(300))
    (source / "a.jsonl").write_text(lines)
    (source / "b.jsonl").write_text(lines + "broken\n")
    flags = ["--input", source, "--tokenizer", made / "tokenizer", "--shard_tokens", 5000, "--output_dir"]
    run(PROGRAM, *flags, tmp_path / "out", code=2)
    sorted((tmp_path / "out").glob("tokens-*"))[1].unlink()
    (source / "b.jsonl").write_text(lines)
    for folder in ("out", "fresh"):
        run(PROGRAM, *flags, tmp_path / folder)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "fresh")


def test_ids_of_documents_are_kept_beside_them(made, run, tmp_path):
    records = [
        {"text": "bir", "key": "wiki/1"},
        {"text": "iki", "key": 2},
        {"text": "üç"},
        {"text": "dörd", "key": "a\nb"},
        {"text": "beş", "key": 5.5},
        {"text": "altı", "key": 2**64 - 1},
        {"text": "yeddi", "key": 2**70},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", made / "tokenizer", "--id_field", "key"]
    line = run(PROGRAM, *flags, "--output_dir", tmp_path / "out", code=2).stderr
    assert (
        f"{tmp_path}/a.jsonl:3: the id 'key' is 'None', not text or a number that keeps its digits; see --id_field"
        in line
    )
    run(PROGRAM, *flags, "--output_dir", tmp_path / "out", "--on_error", "skip")
    kept = [json.loads(line) for line in (tmp_path / "out" / "ids-00000.jsonl").read_text().splitlines()]
    assert kept == ["wiki/1", 2, "a\nb", 5.5, 2**64 - 1]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["records"], manifest["documents"], manifest["bad_records"]) == (7, 5, 2)


def test_a_packing_that_was_stopped_is_not_gone_on_with_under_other_settings(made, run, tmp_path):
    good = "".join(json.dumps({"text": f"sənəd {i} " * 20}) + "\n" for i in range(300))
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(good)
    (source / "b.jsonl").write_text(good + "broken\n")
    flags = ["--input", source, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out"]
    assert "b.jsonl:301: broken JSON" in run(PROGRAM, *flags, "--shard_tokens", 5000, code=2).stderr
    done = run(PROGRAM, *flags, "--shard_tokens", 6000, code=2).stderr
    assert "a part is packed already, with shard_tokens = 5000, now 6000; put that back to go on, or give" in done
    (source / "b.jsonl").write_text(good)  # mended: what was made of the first file stays
    run(PROGRAM, *flags, "--shard_tokens", 5000)
    fresh = tmp_path / "fresh"
    run(PROGRAM, *flags[:-1], fresh, "--shard_tokens", 5000)
    assert shard_bytes(tmp_path / "out") == shard_bytes(fresh)


def test_an_input_that_changed_since_the_kill_is_packed_again(made, run, tmp_path):
    lines = [json.dumps({"text": f"sənəd {i} " * 20}) + "\n" for i in range(300)]
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(lines))
    (source / "b.jsonl").write_text("".join(lines) + "broken\n")
    flags = ["--input", source, "--tokenizer", made / "tokenizer", "--shard_tokens", 5000, "--output_dir"]
    run(PROGRAM, *flags, tmp_path / "out", code=2)
    (source / "a.jsonl").write_text("".join(reversed(lines)))
    (source / "b.jsonl").write_text("".join(lines))
    for folder in ("out", "fresh"):
        run(PROGRAM, *flags, tmp_path / folder)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "fresh")


def test_an_input_that_changes_while_it_is_packed_leaves_nothing_of_what_it_was(made, run, tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    old, new = (
        "".join(json.dumps({"text": f"{word} {i} " * 20}) + "\n" for i in range(20_000)) for word in ("old", "new")
    )
    source.write_text(old)
    flags = ["--input", source, "--tokenizer", made / "tokenizer", "--engine", "tokenizers", "--num_proc", 1]
    flags = [*map(str, flags), "--shard_tokens", "20000", "--output_dir"]
    command = [sys.executable, ROOT / PROGRAM, *flags, out]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (out / ".resume.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with source.open("r+") as file:  # in place, and each line as long as it was: every record is whole
        file.write(new)
    assert "changed while it was being read; wait until it is written, and start again" in process.communicate()[1]
    assert process.returncode == 2
    for folder in (out, tmp_path / "fresh"):
        run(PROGRAM, *flags, folder)
    assert shard_bytes(out) == shard_bytes(tmp_path / "fresh")


def test_shards_that_another_run_has_left_do_not_stay(pack, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("tokens-00007.npy", "offsets-00007.npy", "ids-00000.jsonl", "notes.txt"):
        (tmp_path / "out" / name).touch()
    pack(texts=["salam"])
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("."))
    assert names == ["manifest.json", "notes.txt", "offsets-00000.npy", "tokens-00000.npy"]


def test_what_was_named_twice_is_packed_once_and_not_new_the_second_time(run, made, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "salam"}\n')
    (tmp_path / "again").symlink_to(tmp_path / "in")
    flags = ["--input", tmp_path / "again" / "a.jsonl", tmp_path / "in", "--tokenizer", made / "tokenizer"]
    assert "1 documents" in run(PROGRAM, *flags, "--output_dir", tmp_path / "out").stdout
    assert "nothing to do" in run(PROGRAM, *flags, "--output_dir", tmp_path / "out").stdout


def test_documents_without_a_token_are_nothing_to_pack(run, made, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out"]
    done = run(PROGRAM, *flags, "--add_bos", "false", "--add_eos", "false", code=2)
    assert "no text in its documents: nothing to pack" in done.stderr


def test_what_a_folder_holds_besides_is_said(run, made, tmp_path):
    for name in ("a.jsonl", "b.jsonl.xz"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "salam"}\n')
    done = run(PROGRAM, "--input", tmp_path / "in", "--tokenizer", made / "tokenizer", "--output_dir", tmp_path / "out")
    assert f"a file of another kind is left out: {tmp_path}/in/b.jsonl.xz" in done.stderr


def test_words_kept_whole_are_those_that_offsets_show(made, tokenizer, texts):
    """The count that packing takes from the ids alone, against the one eval_tokenizer takes from offsets."""
    counted = sum(words_kept_whole(tokenizer.backend.encode(text), text, None) for text in texts)
    assert read_manifest(made / "shards")["whole_words"] == counted > 1000


def test_a_recipe_packs_each_dataset_into_a_folder_of_its_own(run, made, tmp_path, tokenizer):
    (tmp_path / "pack.yaml").write_text(
        f"tokenizer: {made / 'tokenizer'}\ndatasets:\n"
        f"  - {{name: letters, input: [{CORPUS / 'az' / 'letters.jsonl'}]}}\n"
        f"  - {{name: tales, input: [{CORPUS / 'az' / 'tales.jsonl'}]}}\n"
    )
    run(PROGRAM, "--config", tmp_path / "pack.yaml", "--run_dir", tmp_path)
    # ten letters and eight tales
    assert [TokenShards(tmp_path / "pack" / name).num_documents for name in ("letters", "tales")] == [10, 8]
    assert read_manifest(tmp_path / "pack")["result"]["documents"] == 18


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --input (one dataset) or, in a recipe, datasets"),
        (["--input", CORPUS, "--shard", 0], "--of missing: the number of parts"),
        (["--input", CORPUS, "--of", 2], "--of wants either --shard (do that part) or --finish true"),
        (["--input", CORPUS, "--of", 2, "--shard", 2], "--shard 2: parts are counted from 0 to 1"),
        (["--input", CORPUS, "--engine", "rwkv"], "engine: rwkv: there are auto, tokenizers, tiktoken"),
        (["--datasets", "{name: a/b, input: [x]}"], "the names a/b must be distinct and plain folder names"),
        (["--datasets", "{name: a}"], "datasets"),
    ],
)
def test_datasets_that_cannot_be_are_refused(run, made, tmp_path, flags, words):
    flags = [str(word).replace("[x]", f"[{CORPUS / 'az'}]") for word in flags]
    done = run(PROGRAM, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path, *flags, code=2)
    assert words in done.stderr


def test_a_dataset_may_have_a_name_in_any_script(run, made, tmp_path):
    datasets = f"{{name: समाचार, input: [{made / 'clean' / 'validation'}]}}"
    run(PROGRAM, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path, "--datasets", datasets)
    assert (tmp_path / "समाचार" / "manifest.json").exists()


def test_a_tokenizer_without_bos_is_refused_with_the_way_out(run, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    done = run(PROGRAM, "--input", CORPUS / "az", "--tokenizer", tmp_path, "--output_dir", tmp_path / "out", code=2)
    assert "has no BOS token; give --add_bos false, or another tokenizer" in done.stderr
