"""metrics.jsonl, read: a line of JSON a step, as dilqur/training/metrics.py writes it. Standard library only."""

import contextlib
import json

LONGEST_LINE = 2048  # bytes, with room to spare


def last_records(folder, most):
    """The lines, `most` of them at most, at the end of a run's metrics.jsonl, as dicts; [] where there is none. It may be being
    written, and is read from its end, however long it is."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - most * LONGEST_LINE))
            lines = file.read().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the first may be cut, the last half-written
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r][-most:]
