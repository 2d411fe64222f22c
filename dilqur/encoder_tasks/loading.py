"""What transformers says of a folder that it cannot load, in one line."""

import contextlib

from dilqur.errors import InputError


@contextlib.contextmanager
def refused(path):
    """InputError instead of whatever transformers raises inside: another architecture, a head of another size, no tokenizer."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as problem:
        said = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise InputError(f"{path}: transformers cannot load it for this task: {said.strip()}") from None
