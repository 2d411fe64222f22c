"""pack_mmap: text becomes int32 token shards, whole documents in order, the same bytes every time."""

import itertools
import json

import numpy as np
import pytest
from conftest import CORPUS

from dilqur.documents import expand, is_validation, read
from dilqur.stage import read_manifest
from dilqur.token_shards import TokenShards
from dilqur.tokenizer import TextTokenizer

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


@pytest.mark.parametrize("environment", [{}, {"RAYON_NUM_THREADS": "1"}, {"TOKENIZERS_PARALLELISM": "false"}])
def test_a_second_run_gives_the_same_bytes_on_any_number_of_cores(made, pack, environment):
    folder = pack(**environment)
    files = sorted(p.name for p in folder.glob("*.npy"))
    assert files == ["offsets-00000.npy", "tokens-00000.npy"]
    assert all((folder / name).read_bytes() == (made / "shards" / name).read_bytes() for name in files)


def test_the_manifest_counts_what_is_there_and_says_what_it_came_from(made, tokenizer, texts):
    manifest = read_manifest(made / "shards")
    assert manifest["documents"] == len(texts) == 157
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


def test_a_share_can_be_held_out_by_the_text(pack, tokenizer, texts):
    folder = pack("--validation_fraction", 0.2)
    for where, held_out in ((folder, False), (folder / "validation", True)):
        found = [tokenizer.decode(ids[1:-1]) for ids in with_numpy(where)]
        assert found == [text for text in texts if is_validation(text, 0.2) == held_out] != []
        TokenShards(where, verify=True)


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
        (["--datasets", "{name: a/b, input: [x]}"], "the names a/b must be distinct and plain folder names"),
        (["--datasets", "{name: a}"], "datasets"),
    ],
)
def test_datasets_that_cannot_be_are_refused(run, made, tmp_path, flags, words):
    flags = [word.replace("[x]", f"[{CORPUS / 'az'}]") for word in flags]
    done = run(PROGRAM, "--tokenizer", made / "tokenizer", "--output_dir", tmp_path, *flags, code=2)
    assert words in done.stderr


def test_a_tokenizer_without_bos_is_refused_with_the_way_out(run, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    done = run(PROGRAM, "--input", CORPUS / "az", "--tokenizer", tmp_path, "--output_dir", tmp_path / "out", code=2)
    assert "has no BOS token; give --add_bos false, or another tokenizer" in done.stderr
