"""Where the documents of a batch begin, as flash attention's kernels for sequences of unequal length want to be told."""

import numpy as np


def document_kwargs(position_ids):
    """Keyword arguments that make a model attend within documents, for a batch whose position_ids begin again with each.

    position_ids: int64 array or CPU tensor of shape (batch, max_length), 0 where a document begins and where a row does. Returned,
    beside it as a tensor: cu_seq_lens_q and _k, an int32 tensor of shape (documents + 1,) on the CPU, and max_length_q and _k, an int.
    To be called where the batch is made, before it goes to the GPU: from there these numbers could only be had by waiting for it.
    Raises ValueError where a row does not begin with 0.
    """
    import torch

    position_ids = torch.as_tensor(position_ids)
    if position_ids[:, 0].any():
        raise ValueError("position_ids: a row that does not begin with 0 would be the rest of the row before it")
    begins = cu_seqlens(position_ids)
    # It sizes the grid of the kernel, documents × longest: with max_length itself, most of the grid would be empty where many
    # documents share a long sample. Rounded up, so that compiled graphs and kernels see few different values.
    longest = int(np.diff(begins).max())
    longest = min(1 << (longest - 1).bit_length(), position_ids.shape[1])
    begins = torch.from_numpy(begins)
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def cu_seqlens(position_ids):
    """int32 array of shape (sequences + 1,): where the documents of a batch begin, laid end to end, and where it ends: what
    flash-attention's varlen functions take. position_ids: array or CPU tensor of shape (batch, max_length)."""
    flat = np.asarray(position_ids).reshape(-1)
    return np.append(np.flatnonzero(flat == 0), flat.size).astype(np.int32)
