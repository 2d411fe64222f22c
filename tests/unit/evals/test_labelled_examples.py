"""Examples with labels out of the files that public data sets come as; what is wrong with them in one line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from dilqur.common.errors import InputError
from dilqur.evals.labelled_examples import Example, draw, folds, read_examples

CONLLU = """# sent_id = 1
# text = Mən evdəydim.
1\tMən\tmən\tPRON\t_\t_\t0\troot\t_\t_
2-3\tevdəydim\t_\t_\t_\t_\t_\t_\t_\t_
2\tevdə\tev\tNOUN\t_\t_\t0\troot\t_\t_
3\tydim\ti\tAUX\t_\t_\t0\troot\t_\t_
3.1\tyox\t_\tVERB\t_\t_\t_\t_\t_\t_

1\tGəl\tgəl\tVERB\t_\t_\t0\troot\t_\t_
"""


def texts(*paths, label="label", **more):
    return read_examples([str(path) for path in paths], False, "text", label, **more)


def words(path, text="tokens", label="tags", **more):
    return read_examples([str(path)], True, text, label, **more)


def test_a_table_of_sib_200(tmp_path):
    (tmp_path / "train.tsv").write_text(
        'index_id\tcategory\ttext\n7\ttravel\t"""Safari"" adlanır."\n9\tsports\tOyun.\n'
    )
    assert texts(tmp_path / "train.tsv", label="category") == [
        Example('"Safari" adlanır.', "travel", 0),
        Example("Oyun.", "sports", 1),
    ]


def test_json_lines_and_parquet_with_labels_that_are_numbers(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "Salam", "label": 1}) + "\n")
    assert texts(tmp_path / "a.jsonl.gz") == [Example("Salam", "1", 0)]
    assert texts(tmp_path / "a.jsonl.gz", label_names=["yox", "bəli"]) == [Example("Salam", "bəli", 0)]
    table = pyarrow.table({"tokens": [["Bakı", "gözəldir"]], "ner_tags": [[5, 0]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    names = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    found = words(tmp_path / "a.parquet", label="ner_tags", label_names=names)
    assert found == [Example(("Bakı", "gözəldir"), ("B-LOC", "O"), 0)]


def test_universal_dependencies_without_contractions_and_empty_words(tmp_path):
    (tmp_path / "az.conllu").write_text(CONLLU)
    assert words(tmp_path / "az.conllu", label="upos") == [
        Example(("Mən", "evdə", "ydim"), ("PRON", "NOUN", "AUX"), 0),
        Example(("Gəl",), ("VERB",), 1),
    ]


def test_copies_and_sentences_of_one_document_are_of_one_source(tmp_path):
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert [e.source for e in texts(tmp_path / "a.csv", first_source=5)] == [5, 6, 5, 7]
    sentence = "# sent_id = {}\n1\t{}\t_\tNOUN\t_\t_\t0\troot\t_\t_\n\n"
    named = [("web-1.1", "a"), ("web-1.2", "b"), ("s3", "c"), ("s4", "b"), ("web-2.1", "d"), ("web-2.2", "c")]
    (tmp_path / "a.conllu").write_text("".join(sentence.format(*each) for each in named))
    a, b, c, again, d, other = (e.source for e in words(tmp_path / "a.conllu", label="upos"))
    assert a == b == again and c == d == other and a != c


def test_texts_are_cleaned_as_asked(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nbәli,x\n")
    assert texts(tmp_path / "a.csv", clean=lambda text: text.replace("ә", "ə"))[0].text == "bəli"


def test_words_with_their_tags_last(tmp_path):
    (tmp_path / "ner.conll").write_text(
        "-DOCSTART- -X- -X- O\n\n# id 7\tdomain=az\nBakı - - B-LOC\n. - - O\n\n\nHeydər B-PER\nƏliyev I-PER"
    )
    assert [e.label for e in words(tmp_path / "ner.conll")] == [("B-LOC", "O"), ("B-PER", "I-PER")]


def test_the_label_may_be_the_files_name_and_each_paragraph_an_example(tmp_path):
    for name, text in (("news", "Bir.\n\nİki."), ("law", "Üç.\n  \n")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    found = texts(tmp_path, label="@file", paragraphs=True, first_source=10)
    assert found == [Example("Üç.", "law", 10), Example("Bir.", "news", 11), Example("İki.", "news", 11)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", "text\tlabel\nSalam\n", "a.tsv:2: not 2 columns, as the first line has"),
        ("a.tsv", "text\ttopic\nSalam\tx\n", "a.tsv:2: no 'label' (there are: text, topic); see --label_field"),
        ("a.csv", "texts,label\nSalam,x\n", "a.csv:2: no 'text' (there are: texts, label); see --text_field"),
        ("a.tsv", "text\tlabel\n", "no example in there"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl:1: 'None' is no label: a text or a whole number"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "a.jsonl:1: 'text' is not text"),
        ("a.jsonl", '{"text": "a", "label": 7}\n', "a.jsonl:1: label 7, but label_names has 2"),
        ("a.tsv", 'text\tlabel\n"Salam", dedi\tx\n', "a quotation mark inside a field has to be doubled"),
        ("a.tsv", 'text\tlabel\n"Salam\tx\nBu\ty\n', "a quotation mark inside a field has to be doubled"),
        ("a.conllu", "1\tMən\n", "a.conllu: has words with tags, and no texts"),
        ("a.tsv", b"text\tlabel\n\xff\tx\n", "a.tsv: not UTF-8"),
    ],
)
def test_a_bad_text_is_named_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        texts(tmp_path / name, label_names=["a", "b"])
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "label", "says"),
    [
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}\n', "tags", "a.jsonl:1: 1 words, but 2 tags"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}\n', "tags", "a.jsonl:1: 'tokens' is not a list of words"),
        ("a.conllu", "1\tMən\tPRON\n", "upos", "a.conllu:1: 3 columns are too few"),
        ("a.conllu", CONLLU, "pos", "a.conllu: no column 'pos'; give --label_field upos"),
        ("a.tsv", "tokens\ttags\n", "tags", "a.tsv: a table has a text a line, and no words with tags"),
    ],
)
def test_bad_words_are_named_with_file_and_line(tmp_path, name, content, label, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        words(tmp_path / name, label=label)
    assert says in str(raised.value)


def test_folds_keep_documents_together_and_hold_each_example_once():
    examples = [Example(str(i), "x", i // 3) for i in range(60)]
    parts = folds(examples, 5)
    assert sorted(i for part in parts for i in part) == list(range(60))
    assert [len(part) for part in parts] == [12] * 5
    of = [{examples[i].source for i in part} for part in parts]
    assert all(not of[a] & of[b] for a in range(5) for b in range(a))
    assert parts == folds(examples, 5)


def test_draw_keeps_the_order_and_is_always_the_same():
    examples = [Example(str(i), "x", i) for i in range(100)]
    some = draw(examples, 10)
    assert len(some) == 10 and [e.source for e in some] == sorted(e.source for e in some)
    assert some == draw(examples, 10) and draw(examples, None) == examples
