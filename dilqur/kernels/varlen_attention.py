"""Attention within documents: those packed into one sample do not see each other, and no mask of length × length says so.

The documents of a batch are laid end to end, and a list of where each begins, cu_seqlens, goes down to the attention as keyword
arguments of the model: the names are those transformers hands to flash attention, so that one batch serves every implementation.

    attn_implementation   within documents by
    sdpa                  "document_sdpa", below: torch's flash attention for sequences of unequal length on a GPU in bf16 or fp16;
                          elsewhere scaled_dot_product_attention, a document at a time
    flash_attention_2, 3  the keyword arguments, in transformers (modeling_flash_attention_utils, `_flash_attention_forward`)
    flex_attention        a mask of blocks that transformers makes of position_ids (masking_utils, `create_causal_mask`)
    eager                 nothing: it knows dense masks only

With sdpa or flex_attention of transformers' own, position_ids count only where the model is called with use_cache=False.
"""

import inspect

from dilqur.common.errors import InputError

NAME = "document_sdpa"
READ_BY_TRANSFORMERS = ("flash_attention_2", "flash_attention_3", "flex_attention")


def attention_for(attn_implementation, intra_document_masking):
    """The implementation to load a model with, for transformers. Raises InputError where only a dense mask would do it.

    "document_sdpa" has to be made known first: `register_document_attention`.
    """
    if not intra_document_masking or attn_implementation in READ_BY_TRANSFORMERS:
        return attn_implementation
    if attn_implementation == "sdpa":
        return NAME
    raise InputError(
        f"intra_document_masking: attn_implementation {attn_implementation} would need a mask of max_length × max_length: "
        f"take sdpa, {' or '.join(READ_BY_TRANSFORMERS)}"
    )


def register_document_attention():
    """Make "document_sdpa" known to transformers, before a model is made with it; once more does no harm.

    It gets no mask function: without one transformers makes no mask, and does not search position_ids for documents either,
    for which it would wait for the GPU in every forward (masking_utils, `_preprocess_mask_arguments`). Nor does it hand on a
    2-D attention_mask: padding is no part of it but a document of its own.
    """
    import torch
    from torch.nn.attention import varlen
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # a compiled graph would be of the documents of one batch, and serve no other
    one_by_one = torch.compiler.disable(_one_by_one)
    # its kernels take fewer key than query heads; since torch 2.12 it wants to be told that they are meant to
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}

    def document_sdpa(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        dropout=0.0,
        is_causal=None,
        cu_seq_lens_q=None,
        cu_seq_lens_k=None,
        max_length_q=None,
        max_length_k=None,
        **kwargs,
    ):
        """As transformers calls it. query: (batch, heads, length, head_dim), key and value with as many heads or fewer;
        returns (batch, length, heads, head_dim) and None. is_causal: else the module's own."""
        if cu_seq_lens_q is None or attention_mask is not None:
            raise ValueError(f"{NAME} goes by document_kwargs(position_ids), and by no attention_mask")
        if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
            raise ValueError(f"{NAME} knows no sliding window, softcap, sinks or position bias, and this model has one")
        batch, _, length, _ = query.shape
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        # under autocast rotary embeddings leave queries and keys in fp32; the kernel is not one of those that autocast knows
        dtype = dtype_of_products(value)
        query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
        if _has_varlen_kernel(query) and not dropout:
            window = (-1, 0) if causal else (-1, -1)
            documents = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
            out = varlen.varlen_attn(query, key, value, *documents, scale=scaling, window_size=window, **grouped)
        else:
            out = one_by_one(query, key, value, cu_seq_lens_q, causal, scaling, dropout)
        return out.unflatten(0, (batch, length)), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, document_sdpa)


def dtype_of_products(tensor):
    """For a function that autocast does not reach into: autocast's dtype where that is on for the device of `tensor`, else the tensor's."""
    import torch

    device = tensor.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def _has_varlen_kernel(query):
    """Flash attention, as torch brings it, is for GPUs, 16 bits, and heads of up to 256 numbers in eights."""
    return query.is_cuda and query.dtype.itemsize == 2 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _one_by_one(query, key, value, cu_seq_lens, causal, scale, dropout):
    """A document at a time. All of shape (tokens, heads, head_dim). On a GPU every call waits for `cu_seq_lens`: that is for fp32
    and for tests, not for speed."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    groups = query.shape[1] // key.shape[1]
    if query.is_cuda:  # the kernel for fp32 wants as many heads in all; with fewer a document × document matrix is made
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    lengths = cu_seq_lens.diff().tolist()
    # split, not slices: the gradient of a slice is as large as the whole, that of all parts together is written once
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [
        scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=groups > 1)
        for q, k, v in parts
    ]
    return torch.cat([document.squeeze(0).transpose(0, 1) for document in out])
