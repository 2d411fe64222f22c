"""import_tokens: the token files of nanoGPT, llm.c, Megatron-LM and datatrove become token shards, copied or referred to."""

import importlib.util
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import CORPUS, ROOT

from dilqur.common.errors import InputError
from dilqur.common.hashing import file_checksum
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.data.foreign_tokens import TokenFile, flat
from dilqur.data.token_shards import TokenShards
from dilqur.pipeline.manifest import read_manifest
from dilqur.tokenizer.text_tokenizer import TextTokenizer

PROGRAM = "data_tools/import_tokens.py"
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>"]


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in read(expand([str(CORPUS / "az")]))][:60]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """Byte-level BPE of 700 tokens, the last two BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=698, initial_alphabet=alphabet))
    backend.add_special_tokens(LLAMA)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    """The ids of every text, with EOS at the end."""
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


# -- what other tools write -------------------------------------------------------------------------------------------


def write_flat(path, documents, dtype="<u2"):
    path.write_bytes(np.concatenate([np.array(d, dtype) for d in documents]).tobytes())
    return path


def write_llm_c(path, documents, magic=20240520, version=1, dtype="<u2"):
    ids = np.concatenate([np.array(d, dtype) for d in documents])
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def write_megatron(path, sequences, documents=None, code=8, modes=False):
    """As _IndexWriter of megatron/core/datasets/indexed_dataset.py does. documents: the first sequence of each, and the end."""
    dtype = np.dtype({8: "<u2", 4: "<i4", 5: "<i8"}[code])
    path.write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    lengths = np.array([len(s) for s in sequences], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    documents = np.arange(len(sequences) + 1) if documents is None else np.array(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    index += lengths.tobytes() + pointers.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index + (bytes(len(sequences)) if modes else b""))
    return path


def write_datatrove(path, documents, letter="H"):
    """As TokenizedFile of datatrove/pipeline/tokens/tokenizer.py does."""
    ids = [i for d in documents for i in d]
    ends = np.cumsum([len(d) for d in documents]).tolist()
    path.write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    width = {"H": 2, "I": 4}[letter]
    path.with_name(path.name + ".metadata").write_text(f"tok|{width}\n{len(ids)}\n{len(ids) / 1000:.2f} kT")
    return path


FORMATS = {
    "nanoGPT": lambda folder, documents: [write_flat(folder / "train.bin", documents), "--dtype", "uint16"],
    "flat uint32": lambda folder, documents: [write_flat(folder / "train.bin", documents, "<u4"), "--dtype", "uint32"],
    "llm.c": lambda folder, documents: [write_llm_c(folder / "a.bin", documents)],
    "llm.c, llama": lambda folder, documents: [write_llm_c(folder / "a.bin", documents, 20240801, 7, "<u4")],
    "megatron": lambda folder, documents: [write_megatron(folder / "m.bin", documents)],
    "megatron int32": lambda folder, documents: [write_megatron(folder / "m.bin", documents, code=4, modes=True)],
    "datatrove": lambda folder, documents: [write_datatrove(folder / "0_unshuffled.ds", documents)],
    "datatrove uint32": lambda folder, documents: [write_datatrove(folder / "0_unshuffled.ds", documents, "I")],
}


@pytest.fixture
def bring(run, tokenizer, tmp_path):
    """Run the program on the arguments of --input; returns the folder, or with code=2 what it said."""

    def make(source, *flags, code=0, folder="out"):
        where = ["--tokenizer", tokenizer.path, "--output_dir", tmp_path / folder]
        done = run(PROGRAM, "--input", source, *flags, *where, code=code)
        return tmp_path / folder if code == 0 else done.stderr

    return make


def documents_of(folder):
    shards = TokenShards(folder, verify=True)
    return [shards.document(i).tolist() for i in range(shards.num_documents)]


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_reference", ["false", "true"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_documents_it_was_made_of(
    bring, tmp_path, documents, texts, tokenizer, name, by_reference
):
    source = FORMATS[name](tmp_path, documents)
    folder = bring(*source, "--by_reference", by_reference)
    assert documents_of(folder) == documents
    manifest = read_manifest(folder)
    assert (manifest["documents"], manifest["tokens"]) == (len(documents), sum(map(len, documents)))
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in texts)
    assert (manifest["tokenizer_sha256"], manifest["vocab_size"]) == (tokenizer.hash, 700)
    assert (manifest["bos_id"], manifest["eos_id"], manifest["words"]) == (None, tokenizer.eos_id, None)
    assert str(source[0]) in manifest["sources"]


def test_converted_shards_are_those_of_any_other_program(bring, tmp_path, documents):
    folder = bring(*FORMATS["megatron"](tmp_path, documents), "--shard_tokens", 5000)
    shards = sorted(folder.glob("tokens-*.npy"))
    assert len(shards) == len(sorted(folder.glob("offsets-*.npy"))) > 3
    assert all(np.load(shard, mmap_mode="r").dtype == np.int32 for shard in shards)
    assert documents_of(folder) == documents


def test_by_reference_nothing_is_copied(bring, tmp_path, documents):
    source = write_llm_c(tmp_path / "a.bin", documents)
    other = write_datatrove(tmp_path / "b.ds", documents[:5], "I")
    folder = bring(source, other, "--by_reference", "true")
    assert {p.name for p in folder.iterdir()} - {".lock"} == {"offsets-00000.npy", "offsets-00001.npy", "manifest.json"}
    assert documents_of(folder) == documents + documents[:5]
    first, second = read_manifest(folder)["shards"]
    assert first["tokens_file"] == {
        "path": str(source),
        "dtype": "uint16",
        "offset_bytes": 1024,
        "bytes": source.stat().st_size,
        "xxh3": file_checksum(source),
    }
    assert (second["tokens_file"]["dtype"], second["tokens_file"]["offset_bytes"]) == ("uint32", 0)
    assert (first["documents"], second["documents"]) == (len(documents), 5)


def test_several_files_and_folders_are_taken_in_order(bring, tmp_path, documents):
    write_megatron(tmp_path / "b.bin", documents[:3])
    folder = tmp_path / "more"
    folder.mkdir()
    for name, part in (("1.ds", documents[3:5]), ("2.ds", documents[5:6])):
        write_datatrove(folder / name, part)
    assert documents_of(bring(tmp_path / "b.idx", folder)) == documents[:6]


def test_no_file_is_taken_twice_whatever_the_way_to_it(bring, tmp_path, documents):
    (tmp_path / "m").mkdir()
    write_megatron(tmp_path / "m" / "b.bin", documents[:3])
    assert documents_of(bring(tmp_path / "m" / "b.bin", tmp_path / "m" / "b.idx", tmp_path / "m")) == documents[:3]


@pytest.mark.parametrize("change", ["written to", "truncated"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, documents, change):
    path = write_flat(tmp_path / "a.bin", documents)
    file = flat(path, "uint16")
    with pytest.raises(InputError, match=r"a\.bin: changed while it was being read; wait until it is written"):
        for _ in file.chunks([10, file.tokens]):
            if change == "truncated":
                os.truncate(path, 40)
            else:
                path.write_bytes(path.read_bytes())


def test_a_flat_file_can_be_split_before_bos(bring, tmp_path, documents, tokenizer):
    """As llm.c's shards are: the end of a document may stand at the beginning of the next file."""
    with_bos = [[tokenizer.bos_id, *document[:-1]] for document in documents]
    tail, whole = with_bos[0][7:], with_bos[1:]
    folder = bring(write_flat(tmp_path / "a.bin", [tail, *whole]), "--dtype", "uint16", "--bos_id", tokenizer.bos_id)
    assert documents_of(folder) == [tail, *whole]
    assert (read_manifest(folder)["bos_id"], read_manifest(folder)["eos_id"]) == (tokenizer.bos_id, None)


def test_what_follows_the_last_eos_is_a_document_too(bring, tmp_path, documents, tokenizer):
    cut = [*documents[:4], documents[4][:-1]]
    folder = bring(write_flat(tmp_path / "a.bin", cut), "--dtype", "uint16")
    assert documents_of(folder) == cut
    assert read_manifest(folder)["eos_id"] == tokenizer.eos_id


def test_a_megatron_document_is_all_its_sequences(bring, tmp_path, documents):
    sequences = [documents[0][:9], documents[0][9:], documents[1], [], documents[2]]
    folder = bring(write_megatron(tmp_path / "m.bin", sequences, [0, 2, 3, 4, 5]))
    assert documents_of(folder) == [documents[0], documents[1], [], documents[2]]
    assert read_manifest(folder)["eos_id"] is None  # the empty one does not end with it


def test_documents_longer_than_a_piece_and_pieces_without_an_end_are_whole(
    monkeypatch, tmp_path, documents, tokenizer, capsys
):
    spec = importlib.util.spec_from_file_location("import_tokens", ROOT / PROGRAM)
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "import_tokens", program)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "TOKENS_AT_ONCE", 100)  # a document has some 200 to 400
    short = [document[-n:] for n, document in zip((1, 30, 99, 100, 101), documents, strict=False)]
    source = write_flat(tmp_path / "a.bin", [*documents, *short])
    for by_reference in ("true", "false"):
        out = tmp_path / by_reference
        flags = ["--dtype", "uint16", "--by_reference", by_reference, "--output_dir", out]
        command = [PROGRAM, "--input", source, "--tokenizer", tokenizer.path, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        program.main()
        assert documents_of(out) == [*documents, *short]


def test_memory_stays_flat(tokenizer, tmp_path):
    """40 million tokens, 80 MB and 160 MB as int32, and the peak is not 60 MB above that of a small file."""
    code = (
        "import re, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # getrusage has the parent's in it
    )
    peaks = []
    for size in (10_000, 40_000_000):
        ids = np.random.default_rng(0).integers(0, 690, size).astype("<u2")
        ids[499::500] = tokenizer.eos_id
        ids.tofile(tmp_path / "a.bin")
        out = tmp_path / str(size)
        command = [PROGRAM, "--input", tmp_path / "a.bin", "--dtype", "uint16", "--tokenizer", tokenizer.path]
        command = [sys.executable, "-c", code, *command, "--output_dir", out]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
        assert read_manifest(out)["documents"] == size // 500
    assert peaks[1] < peaks[0] + 60, peaks


def test_bytes_are_counted_by_decoding_where_tokens_are_not_bytes(run, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "▁salam", "▁dünya", "▁şəhər"])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    source = write_megatron(tmp_path / "m.bin", [[1, 2, 4], [3, 4]])
    run(PROGRAM, "--input", source, "--tokenizer", tmp_path, "--output_dir", tmp_path / "out")
    assert read_manifest(tmp_path / "out")["utf8_bytes"] == len("salam dünya".encode()) + len("şəhər".encode())


def test_control_tokens_in_the_middle_have_no_bytes(bring, tmp_path, tokenizer):
    ids = tokenizer.encode("Salam, dünya")
    folder = bring(write_megatron(tmp_path / "m.bin", [[tokenizer.bos_id, *ids, tokenizer.eos_id, *ids]]))
    assert read_manifest(folder)["utf8_bytes"] == 2 * len("Salam, dünya".encode())


def test_check_reads_the_headers_and_writes_nothing(run, tokenizer, tmp_path, documents):
    source = write_megatron(tmp_path / "m.bin", documents)
    where = ["--tokenizer", tokenizer.path, "--output_dir", tmp_path / "out"]
    done = run(PROGRAM, "--input", source, *where, "--check")
    assert done.stdout == "import_tokens: ok\n" and not (tmp_path / "out").exists()


def test_a_finished_import_is_not_done_again_and_a_changed_index_is_noticed(bring, run, tokenizer, tmp_path, documents):
    source = write_datatrove(tmp_path / "a.ds", documents)
    folder = bring(source)
    where = ["--tokenizer", tokenizer.path, "--output_dir", folder]
    assert "nothing to do" in run(PROGRAM, "--input", source, *where).stdout
    write_datatrove(source, documents[:-1])
    assert "has changed since" in run(PROGRAM, "--input", source, *where, code=2).stderr


# -- what is refused --------------------------------------------------------------------------------------------------


def edit(path, at, content):
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)


def cut(path, n):
    path.write_bytes(path.read_bytes()[:-n])


def grow(path, n):
    path.write_bytes(path.read_bytes() + bytes(n))


@pytest.mark.parametrize(
    ("name", "file", "damage", "words"),
    [
        ("nanoGPT", "train.bin", lambda p: cut(p, 1), "bytes are no whole number of uint16 ids: truncated, or another"),
        ("nanoGPT", "train.bin", lambda p: p.write_bytes(b""), "no token in there"),
        ("llm.c", "a.bin", lambda p: cut(p, 2), "llm.c's header says"),
        ("megatron", "m.bin", lambda p: cut(p, 2), "but m.idx needs"),
        ("megatron", "m.bin", lambda p: cut(p, 2), "truncated; copy both again"),
        ("megatron", "m.bin", lambda p: grow(p, 2), "another file's index"),
        ("megatron", "m.idx", lambda p: cut(p, 1), "sequences and 61 boundaries: truncated"),
        ("megatron", "m.idx", lambda p: p.write_bytes(p.read_bytes()[:20]), "truncated in its header"),
        ("megatron", "m.idx", lambda p: edit(p, 0, b"TNTIDX\0\0\0"), "no index of Megatron-LM (it begins with b'TNTIDX"),
        ("megatron", "m.idx", lambda p: edit(p, 9, b"\2"), "version 2; only 1 is known"),
        ("megatron", "m.idx", lambda p: edit(p, 17, b"\7"), "dtype code 7 is not one of token ids"),
        ("megatron", "m.idx", lambda p: edit(p, 34, b"\1\0\0\0"), "do not lie one after the other"),
        ("megatron", "m.idx", lambda p: edit(p, len(p.read_bytes()) - 8, b"\1"), "do not go from 0 to 60"),
        ("datatrove", "0_unshuffled.ds", lambda p: cut(p, 2), "0_unshuffled.ds.index needs"),
        ("datatrove", "0_unshuffled.ds.index", lambda p: cut(p, 3), "no whole number of document ends"),
        ("datatrove", "0_unshuffled.ds.index", lambda p: p.unlink(), "not there; without it, --format flat"),
        ("datatrove", "0_unshuffled.ds.index", lambda p: edit(p, 0, b"\xff\xff\xff"), "do not ascend"),
        ("datatrove", "0_unshuffled.ds.metadata", lambda p: p.write_text("t|2\n7\n7 T"), "files of different runs"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_in_one_line(bring, tmp_path, documents, name, file, damage, words):
    source = FORMATS[name](tmp_path, documents)
    damage(tmp_path / file)
    said = bring(*source, code=2)
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("flat uint32", ["--dtype", "uint16"], "these are uint32 ids; give --dtype uint32"),
        ("nanoGPT", ["--dtype", "uint32"], "the id 699, at which its documents are to be split, is not in it"),
        ("nanoGPT", ["--eos_id", "1", "--bos_id", "2"], "not both"),
        ("nanoGPT", ["--eos_id", "65000"], "the id 65000, at which its documents are to be split, is not in it"),
        ("llm.c", ["--dtype", "uint32"], "llm.c's header says uint16, --dtype says uint32"),
        ("megatron", ["--dtype", "uint32"], "says uint16, --dtype says uint32"),
        ("datatrove", ["--format", "flat"], "does not say how wide its ids are: give --dtype"),
        ("datatrove", ["--format", "numpy"], "--format"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bring, tmp_path, documents, name, flags, words):
    source, *given = FORMATS[name](tmp_path, documents)
    said = bring(source, *([] if "--dtype" in flags else given), *flags, code=2)
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("by_reference", ["false", "true"])
def test_an_id_outside_the_vocabulary_is_refused_with_its_document(bring, tmp_path, documents, by_reference):
    wrong = [list(document) for document in documents]
    wrong[17][5] = 701
    place = sum(map(len, wrong[:17])) + 5
    said = bring(write_megatron(tmp_path / "m.bin", wrong), "--by_reference", by_reference, code=2)
    assert f"m.bin: document 17 (from 0), token {place}: the id 701 is not below 700, the size of" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ids_that_int32_cannot_hold_are_refused(bring, tmp_path, documents):
    wrong = [*documents[:3], [1, 2**31, documents[0][-1]]]
    said = bring(write_flat(tmp_path / "a.bin", wrong, "<u4"), "--dtype", "uint32", code=2)
    assert "document 3 (from 0)" in said and f"the id {2**31} is more than int32 holds ({2**31 - 1})" in said
    said = bring(write_megatron(tmp_path / "m.bin", [[1, -5]], code=4), code=2, folder="other")
    assert "the id -5 is not below 700" in said or "the id -5" in said


def test_int64_is_converted_but_not_referred_to(bring, tmp_path, documents):
    source = write_megatron(tmp_path / "m.bin", documents, code=5)
    assert "int64 ids cannot be read by reference" in bring(source, "--by_reference", "true", code=2)
    assert documents_of(bring(source)) == documents


def test_without_an_eos_the_way_out_is_said(run, tmp_path, documents):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    source = write_flat(tmp_path / "a.bin", documents)
    where = ["--tokenizer", tmp_path, "--output_dir", tmp_path / "out"]
    done = run(PROGRAM, "--input", source, "--dtype", "uint16", *where, code=2)
    assert "has no EOS to split the documents at; give --eos_id or --bos_id" in done.stderr


def test_too_little_room_is_said_before_anything_is_written(monkeypatch, tmp_path, tokenizer):
    spec = importlib.util.spec_from_file_location("import_tokens", ROOT / PROGRAM)
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "import_tokens", program)
    spec.loader.exec_module(program)
    usage = program.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: usage)
    file = TokenFile(tmp_path, np.dtype("<u2"), 0, 10**9)
    with pytest.raises(
        program.InputError, match=r"4\.0 GB are needed and 0\.0 GB free: .* or give --by_reference true"
    ):
        program.check_space([file], tmp_path / "not" / "there")


def test_the_tokens_may_not_lie_where_the_result_goes(bring, tmp_path, documents):
    """--overwrite_output_dir would remove them."""
    (tmp_path / "out").mkdir()
    source = write_megatron(tmp_path / "out" / "m.bin", documents)
    assert "lies in the folder that is to be written" in bring(source, "--by_reference", "true", code=2)


def test_a_recipe_does_the_same(run, tokenizer, tmp_path, documents):
    source = write_datatrove(tmp_path / "a.ds", documents)
    recipe = tmp_path / "import.yaml"
    recipe.write_text(f"input: [{json.dumps(str(source))}]\ntokenizer: {tokenizer.path}\nby_reference: true\n")
    run(PROGRAM, "--config", recipe, "--run_dir", tmp_path / "run")
    assert documents_of(tmp_path / "run" / "import") == documents
