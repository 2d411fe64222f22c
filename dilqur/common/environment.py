"""Environment variables, set for a while."""

import contextlib
import os


@contextlib.contextmanager
def environment(**values):
    """os.environ with these values, and whatever else is set inside, until the block ends."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
