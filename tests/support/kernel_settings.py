"""Settings of a run, as far as kernels look at them, with their defaults."""

import dataclasses
import types

from dilqur.kernels.settings import KernelSettings

LENGTH = 32  # tokens of a sample
CAPTURED = "aot_eager_decomp_partition"  # all of torch.compile but the C++, which takes 20 s a graph


def settings(**keys):
    """Of a run, as far as kernels look at them."""
    plain = {f.name: f.default for f in dataclasses.fields(KernelSettings)}
    run = {
        "bf16": False,
        "dtype": "float32",
        "intra_document_masking": False,
        "deterministic": False,
        "max_length": LENGTH,
        "encoder": False,
        "labelled_fraction": 1.0,
    }
    return types.SimpleNamespace(**{**plain, **run, **keys})
