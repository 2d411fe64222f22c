"""Which names the numbers in a plain optimizer's state_dict can mean."""

import contextlib

import pytest

from dilqur.checkpoint.import_plain import match_shapes
from dilqur.common.errors import InputError

MODEL = {"embed": (9, 4), "q": (4, 4), "norm": (4,), "o": (4, 4), "head": (9, 4)}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([["embed", "q", "norm", "o", "head"]], None),
        ([["embed", "q", "o", "head"], ["norm"]], None),  # decay on matrices only
        ([["q", "norm", "o"], ["embed", "head"]], None),  # the vocabulary's matrices apart
        ([["norm"]], None),  # the others frozen
        ([["embed"]], "more than one way"),  # or the head?
        ([["q"], ["o"]], "more than one way"),
        ([["norm", "q", "o"]], "of another model"),  # not in the model's order
    ],
)
def test_an_optimizers_numbers_mean_the_only_names_that_they_can_mean(groups, said):
    shapes = [[MODEL[name] for name in group] for group in groups]
    with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
        assert match_shapes(shapes, MODEL, "optimizer.bin") == groups
