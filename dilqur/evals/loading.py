"""Models of a folder, trained or with random weights; what transformers cannot load is said in one line."""

import contextlib

from dilqur.common.errors import InputError


@contextlib.contextmanager
def refused(path):
    """InputError instead of whatever transformers raises inside: another architecture, a head of another size, no tokenizer."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as problem:
        said = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise InputError(f"{path}: transformers cannot load it for this task: {said.strip()}") from None


def load_model(kind, path, config, dtype, random):
    """A model of the class `kind` in `dtype`: with the weights of `path`, or random ones."""
    with refused(path):
        if random:
            return kind.from_config(config, dtype=dtype)
        return kind.from_pretrained(path, config=config, dtype=dtype)
