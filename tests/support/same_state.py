"""Two checkpoints, or two model folders, compared tensor by tensor, to the bit: what must be equal has no tolerance.

python tests/support/same_state.py RUN/checkpoints/step-0000004 OTHER/checkpoints/step-0000004
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))
from dilqur.checkpoint.format import KINDS, CheckpointReader


def differing_tensors(one, other):
    """["weight model.norm.weight: float32, bfloat16, off by 0.004", …] of all weights and moments of two checkpoints."""
    first, second = CheckpointReader(one), CheckpointReader(other)
    assert first.shapes == second.shapes and first.shapes
    pairs = ((k, n) for n in first.shapes for k in KINDS)
    return [d for k, n in pairs if (d := _difference(f"{k} {n}", first.tensor(k, n), second.tensor(k, n)))]


def differing_weights(one, other):
    """The same of two model folders of one file each."""
    first, second = (safe_open(Path(folder) / "model.safetensors", "pt") for folder in (one, other))
    assert set(first.keys()) == set(second.keys())
    return [d for n in first.keys() if (d := _difference(n, first.get_tensor(n), second.get_tensor(n)))]  # noqa: SIM118


def _difference(name, one, other):
    if one.dtype == other.dtype and torch.equal(one, other):
        return None
    return f"{name}: {one.dtype}, {other.dtype}, off by {(one.float() - other.float()).abs().max():.2g}"


if __name__ == "__main__":
    found = differing_tensors(*sys.argv[1:3])
    print("\n".join([*found, f"{len(found)} tensors differ"]))
    sys.exit(bool(found))
