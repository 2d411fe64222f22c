"""Every engine gives the ids of HF `tokenizers`, or is not used.

DILQUR_FUZZ=1000000 pytest tests/unit/tokenizer/test_tokenizer_engine.py     (3,000 strings by default)
"""

import json
import os
import random

import numpy as np
import pytest
from conftest import SHARED

from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.tokenizer.engines import TRICKY, choose_engine
from dilqur.tokenizer.text_tokenizer import TextTokenizer, byte_characters

FUZZ = int(os.environ.get("DILQUR_FUZZ", 3_000))
KNOWN = sorted((SHARED / "tokenizers").glob("*.json.gz"))
PIECES = [
    *"aAeiIsStTdDmM'’ \t\n\r.,!?-_/0123456789", *TRICKY[:-1], "ı", "İ", "ə", "Ə", "ğ", "ç", "ş", "ö", "ü", "\u0307", "\u0301", "ſ",
    "\u212a",    "'s", "'LL", "'ſ", "  ", "\n\n", "\r\n", "\u00a0", "\u200d", "\ufeff", "\U0001f600", "\U0001f1e6", "<|eot_id|>",
    "salam", " Bakı", " kitablar",
]  # fmt: skip


def fuzzed(count, seed):
    """`count` strings: pieces that have a rule of their own, code points of every plane, and runs of both."""
    random_ = random.Random(seed)
    planes = [
        (0x20, 0x7F),
        (0x80, 0x250),
        (0x250, 0x900),
        (0x900, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
    ]
    for _ in range(count):
        parts = []
        for _ in range(random_.randint(0, 12)):
            if random_.random() < 0.6:
                parts.append(random_.choice(PIECES) * random_.choice((1, 1, 1, 2, 5)))
            else:
                parts.append(chr(random_.randrange(*random_.choice(planes))) * random_.choice((1, 1, 3)))
        yield "".join(parts)


def differ(engine, oracle, texts):
    """The texts that the two encode differently."""
    texts = list(texts)
    (ids, lengths), (expected, expected_lengths) = engine.encode(texts), oracle.encode(texts)
    assert (ids.dtype, expected.dtype) == (np.int32, np.int32)
    if np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths):
        return []
    return [t for t in texts if not np.array_equal(engine.encode([t])[0], oracle.encode([t])[0])]


def engine_and_oracle(path):
    """The engine that packing would use where tiktoken is asked for, and HF `tokenizers`."""
    tokenizer = TextTokenizer(path)
    (engine, why), (oracle, _) = (choose_engine(wanted, tokenizer, []) for wanted in ("tiktoken", "tokenizers"))
    if "mbert" in path.name:  # WordPiece: no engine but `tokenizers` can do it
        assert engine.name == "tokenizers" and "tiktoken cannot do this tokenizer" in why
    else:
        assert engine.name == "tiktoken", why
    return engine, oracle


def test_the_ids_are_those_of_tokenizers_on_fuzzed_strings(made):
    for path in (made / "tokenizer", *KNOWN):
        engine, oracle = engine_and_oracle(path)
        strings, wrong = fuzzed(FUZZ, seed=7), []
        while batch := [text for _, text in zip(range(10_000), strings, strict=False)]:
            wrong += differ(engine, oracle, batch)
        print(f"{path.name}: {len(wrong)} of {FUZZ} fuzzed strings differ {wrong[:5]!r}")
        assert not wrong


@pytest.mark.skipif(not KNOWN, reason="needs real text and tokenizers, which are not part of the project")
@pytest.mark.parametrize("path", KNOWN, ids=lambda p: p.name.split(".")[0])
def test_the_ids_are_those_of_tokenizers_on_real_text(path):
    engine, oracle = engine_and_oracle(path)
    files = [file for file in expand([str(SHARED / "data" / "az")]) if "qa_az" not in file]
    texts = [document.text for document in read(files)]
    texts = texts if FUZZ > 3_000 else texts[::10]
    wrong = differ(engine, oracle, texts)
    print(f"{path.name}: {len(wrong)} of {len(texts)} documents differ")
    assert not wrong


def test_auto_takes_the_fast_one_where_it_agrees_and_says_what_it_tried(made):
    engine, why = choose_engine("auto", TextTokenizer(made / "tokenizer"), ["Salam, dünya!"])
    assert engine.name == "tiktoken"
    assert why == f"tiktoken: the ids of tokenizers on {len(TRICKY)} tricky strings and 1 documents of the corpus"


def test_an_engine_that_differs_on_the_corpus_is_not_used(made, monkeypatch):
    import dilqur.tokenizer.engines

    right = dilqur.tokenizer.engines._tiktoken

    def wrong_for_one_word(tokenizer):
        encode = right(tokenizer)
        return lambda texts: encode([text.replace("Quba", "Şəki") for text in texts])

    monkeypatch.setattr(dilqur.tokenizer.engines, "_tiktoken", wrong_for_one_word)
    tokenizer = TextTokenizer(made / "tokenizer")
    assert choose_engine("auto", tokenizer, ["Bakı"])[0].name == "tiktoken"
    engine, why = choose_engine("auto", tokenizer, ["Bakı", "Quba"])
    assert engine.name == "tokenizers"
    assert why == "tokenizers, as tiktoken gives other ids for one of the corpus: 'Quba'"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(normalizer={"type": "NFC"}), "its normalizer is NFC"),
        (lambda s: s["model"].update(dropout=0.1), "its BPE has dropout"),
        (lambda s: s["added_tokens"].append({**s["added_tokens"][0], "id": 1280, "content": "☃", "special": False}),
         "added tokens that are no"),
        (lambda s: s["model"]["merges"].insert(0, s["model"]["merges"].pop()), "its ids are not in the order of its merges"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}), "more than one step"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_tiktoken_cannot_do_falls_back_with_the_reason(made, tmp_path, change, words):
    spec = json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    engine, why = choose_engine("auto", TextTokenizer(tmp_path), [])
    assert engine.name == "tokenizers" and words in why


@pytest.mark.parametrize(
    ("ignore_merges", "merges", "words"),
    [
        (True, ["q z"], "it has tokens that no merge makes"),  # a vocabulary extended by the whole word qzj
        (False, ["q z", "z j", "q zj"], "its merges do not lead to its token 'qzj'"),
    ],
)
def test_a_vocabulary_in_which_tiktoken_would_find_other_tokens_is_not_given_to_it(
    tmp_path, ignore_merges, merges, words
):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(byte_characters())}
    vocab.update(
        {token: 256 + i for i, token in enumerate(dict.fromkeys([*(m.replace(" ", "") for m in merges), "qzj"]))}
    )
    pairs = [tuple(m.split(" ")) for m in merges]
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    engine, why = choose_engine("auto", TextTokenizer(tmp_path), ["salam"])
    assert engine.name == "tokenizers" and words in why


def test_a_million_spaces_are_no_panic(made, capfd):
    tokenizer = TextTokenizer(made / "tokenizer")
    engine, oracle = (choose_engine(name, tokenizer, [])[0] for name in ("tiktoken", "tokenizers"))
    texts = ["Bakı", "a" + " " * 1_000_000 + "b", "şəhər", " \n" * 199_999 + "c"]
    assert engine.name == "tiktoken" and differ(engine, oracle, texts) == []
    assert capfd.readouterr().err == ""  # where its panics go
