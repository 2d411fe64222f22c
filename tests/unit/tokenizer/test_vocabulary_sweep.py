"""vocabulary_sweep: which tokenizers are cuts of one training, and the knee of their curve."""

import pytest

from dilqur.tokenizer.sweep import knee, nested_families
from dilqur.tokenizer.text_tokenizer import TextTokenizer

SIZES = [2**n for n in range(10, 18)]


def test_the_knee_is_where_a_curve_turns():
    turned = [10 - n if n <= 3 else 7 - 0.1 * (n - 3) for n in range(8)]  # steep up to 8,192, then hardly falling
    assert knee(SIZES, turned)[0] == 3
    assert knee(SIZES, turned)[1] == pytest.approx(3 / 3.4 - 3 / 7)  # 3 of 3.4 fallen at 3 of 7 doublings


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([8 - n for n in range(8)], "straight in the logarithm: no doubling is worth less than the one before"),
        ([8 - n * n / 10 for n in range(8)], "it falls faster and faster"),
        ([1 + n for n in range(8)], "it rises"),
        ([3] * 8, "it is flat"),
    ],
)
def test_a_curve_that_does_not_flatten_out_has_none(values, why):
    assert knee(SIZES, values) is None, why


def test_two_sizes_have_no_knee():
    assert knee([1024, 2048], [3, 2]) is None


@pytest.fixture(scope="module")
def loaded(sweep):
    return {folder.name: TextTokenizer(folder) for folder in sweep.iterdir()}


def test_cuts_of_one_training_are_found_by_their_merges(loaded):
    shuffled = {f"tokenizer {name}": loaded[name] for name in ("1024", "300", "600", "400")}
    assert nested_families(shuffled) == [["tokenizer 300", "tokenizer 400", "tokenizer 600", "tokenizer 1024"]]


def test_two_are_no_family_nor_is_the_same_one_twice(loaded):
    assert nested_families({"a": loaded["300"], "b": loaded["600"]}) == []
    assert nested_families({"a": loaded["300"], "b": loaded["600"], "c": loaded["600"]}) == []


def test_another_training_is_not_of_the_family(run, loaded, tmp_path):
    (tmp_path / "en.txt").write_text("the cat sat on the mat with another cat that thought there was more to that\n")
    english = ["--input", tmp_path / "en.txt", "--vocab_size", 265, "--output_dir", tmp_path / "265"]
    run("data_tools/train_tokenizer.py", *english)
    assert nested_families({**loaded, "265": TextTokenizer(tmp_path / "265")}) == [["300", "400", "600", "1024"]]
