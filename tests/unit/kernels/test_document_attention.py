"""Documents packed into one sample: none sees another, at any length, and no mask says so."""

import inspect
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from dilqur.common.errors import InputError
from dilqur.data.varlen import document_kwargs
from dilqur.kernels import varlen_attention as document_attention
from dilqur.kernels.varlen_attention import NAME, attention_for, register_document_attention

LENGTH, WORDS, HIDDEN = 48, 64, 32
PACKED = [[7, 1, 25, 1, 14], [47, 1]]  # documents of a batch of two samples; some are of one token
DOCUMENTS = [  # (row, first token, token after the last)
    (row, begin, end)
    for row, lengths in enumerate(PACKED)
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)])
]

# other numbers of documents, and other longest ones
OTHER_DOCUMENTS = [PACKED, [[24, 24], [48]], [[16, 32], [1, 47]], [[2] * 24, [3] * 16], [[20, 28], [28, 20]]]


@pytest.fixture
def llama():
    """Makes a tiny Llama with grouped heads and random weights, always the same ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    register_document_attention()

    def make(attn_implementation=NAME, **changes):
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS, "initializer_range": 0.2}
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, attn_implementation=attn_implementation))

    return make


def positions(packed):
    """int64 array of shape (samples, length): position_ids of documents of these lengths."""
    return np.array([[position for length in row for position in range(length)] for row in packed])


@pytest.fixture
def words():
    """int64 tensor of shape (2, LENGTH)."""
    import torch

    return torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def with_another(words, document):
    """The batch with other words in one of its documents."""
    row, begin, end = document
    replaced = words.clone()
    replaced[row, begin:end] = (replaced[row, begin:end] + 1) % WORDS
    return replaced


# -- no document sees another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_where_a_document_is_replaced_no_bit_of_the_others_moves(llama, words, is_causal):
    import torch

    model, documents = llama(), document_kwargs(positions(PACKED))
    before = model(words, is_causal=is_causal, **documents).logits
    for document in DOCUMENTS:
        after = model(with_another(words, document), is_causal=is_causal, **documents).logits
        for other in DOCUMENTS:
            row, begin, end = other
            same = torch.equal(before[row, begin:end], after[row, begin:end])
            assert same == (other != document)


def test_without_boundaries_the_documents_behind_it_do_move(llama, words):
    model = llama("sdpa")
    moved = model(words).logits != model(with_another(words, DOCUMENTS[0])).logits
    assert moved[0, DOCUMENTS[1][1] :].any(dim=-1).all()  # all the tokens behind the first document of the first sample
    assert not moved[1].any()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_packed_gives_what_each_document_gives_alone(llama, words, is_causal):
    packed = llama()(words, is_causal=is_causal, **document_kwargs(positions(PACKED))).logits
    model = llama("sdpa")  # transformers' own attention
    for row, begin, end in DOCUMENTS:
        alone = model(words[row : row + 1, begin:end], is_causal=is_causal).logits[0]
        # logits of up to 5, and sums of 64 products or fewer, which with another number of rows may be added up in another
        # order: in fp32 a sum is off by 64 · 6e-8 · 5 = 2e-5 at worst, of two layers and a head 6e-5 (3e-6 is what is seen)
        assert (packed[row, begin:end] - alone).abs().max() < 1e-4


def test_both_ways_the_first_token_of_a_document_sees_the_last(llama, words):
    row, begin, end = DOCUMENTS[2]
    last = with_another(words, (row, end - 1, end))
    model, documents = llama(), document_kwargs(positions(PACKED))
    for is_causal in (True, False):
        moved = (
            model(words, is_causal=is_causal, **documents).logits
            != model(last, is_causal=is_causal, **documents).logits
        )
        assert moved[row, begin].any() == (not is_causal)


def test_the_loss_of_a_document_has_no_gradient_in_the_words_of_another(llama, words):
    import torch

    model, documents = llama(), document_kwargs(positions(PACKED))
    embeddings = model.get_input_embeddings()(words).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **documents).logits
    for row, begin, end in DOCUMENTS:
        (gradient,) = torch.autograd.grad(logits[row, begin:end].square().sum(), embeddings, retain_graph=True)
        assert gradient[row, begin:end].any(dim=-1).all()
        gradient[row, begin:end] = 0
        assert not gradient.any()


def test_the_padding_of_a_sample_is_a_document_of_its_own(llama, words):
    import torch

    packed = [[20, 28], [48]]  # the second sample whole; of the first, 28 places are padding
    model, documents = llama(), document_kwargs(positions(packed))
    padded_otherwise = with_another(words, (0, 20, 48))
    before, after = (model(w, is_causal=False, **documents).logits for w in (words, padded_otherwise))
    assert torch.equal(before[0, :20], after[0, :20])


# -- as it is trained -------------------------------------------------------------------------------------------------


def gradients(model, words, documents):
    model.zero_grad()
    model(words, labels=words, use_cache=False, **documents).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(llama, words):
    import torch

    model, documents = llama().train(), document_kwargs(positions(PACKED))
    kept = gradients(model, words, documents)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(model, words, documents)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_compiled_model_gives_the_same_and_is_not_compiled_again_for_other_documents(llama, words):
    import torch

    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    model, compiled_after = llama(num_hidden_layers=1), []
    compiled = torch.compile(model, backend=count)
    for packed in OTHER_DOCUMENTS:
        documents = document_kwargs(positions(packed))
        eager, graph = gradients(model, words, documents), gradients(compiled, words, documents)
        assert all(torch.equal(eager[name], graph[f"_orig_mod.{name}"]) for name in eager)
        compiled_after.append(len(graphs))
    # the second batch may say that numbers of documents and lengths change; nothing after it is news
    assert compiled_after[1:] == [compiled_after[1]] * 4
    torch._dynamo.reset()


def test_under_autocast_no_bit_of_the_others_moves_either(llama, words):
    import torch

    model, documents = llama(), document_kwargs(positions(PACKED))
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (model(w, **documents).logits for w in (words, with_another(words, DOCUMENTS[0])))
    assert before.dtype == torch.bfloat16
    assert torch.equal(before[0, 7:], after[0, 7:])
    assert not torch.equal(before[0, :7], after[0, :7])


def test_a_model_written_with_it_can_be_read_without_it(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


# -- no mask ----------------------------------------------------------------------------------------------------------


def largest_tensor(model, length, documents):
    """Numbers in the largest tensor that any operation of a forward and a backward makes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.numbers = max(self.numbers, *sizes, 0)
            return out

    words = torch.arange(length)[None] % WORDS
    with Largest() as largest:
        gradients(model, words, documents)
    return largest.numbers


def test_no_tensor_of_length_times_length_is_made(llama):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
    length = 32_768
    packed = np.random.default_rng(0).multinomial(length - 400, [1 / 400] * 400) + 1
    largest = largest_tensor(llama(**small), length, document_kwargs(positions([packed])))
    assert largest == length * max(WORDS, 64)  # the logits, and what is inside the MLP
    dense = largest_tensor(
        llama("sdpa", **small), 1024, {"position_ids": document_kwargs(positions([[512] * 2]))["position_ids"]}
    )
    assert dense >= 1024**2  # what transformers makes of such position_ids, so that this test can fail


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch):
    """Puts a reference in the place of torch's kernel, which no CPU has, and records what it is called with."""
    import torch
    from torch.nn.attention import varlen

    signature, calls = inspect.signature(varlen.varlen_attn), []

    def reference(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        calls.append(call)
        window = call.get("window_size", (-1, -1))
        query, key, value = (call[name] for name in ("query", "key", "value"))
        out = torch.empty_like(query)
        for begin, end in itertools.pairwise(call["cu_seq_q"].tolist()):
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
            causal = {(-1, 0): True, (-1, -1): False}[window]
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=call["scale"], enable_gqa=call.get("enable_gqa", False)
            )
            out[begin:end] = attended[0].transpose(0, 1)
        return out

    monkeypatch.setattr(reference, "__signature__", signature, raising=False)
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    monkeypatch.setattr(document_attention, "_has_varlen_kernel", lambda query: True)
    yield calls
    monkeypatch.undo()
    register_document_attention()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_the_kernel_for_unequal_lengths_is_told_the_same_as_the_documents_one_by_one(
    llama, words, kernel, monkeypatch, is_causal
):
    import torch

    model, documents = llama(), document_kwargs(positions(PACKED))
    by_kernel = model(words, is_causal=is_causal, **documents).logits
    (call, _) = kernel  # one call a layer
    assert call["query"].shape == (2 * LENGTH, 4, HIDDEN // 4)
    assert call["key"].shape == (2 * LENGTH, 2, HIDDEN // 4)
    assert call["cu_seq_q"].tolist() == call["cu_seq_k"].tolist() == [0, 7, 8, 33, 34, 48, 95, 96]
    monkeypatch.setattr(document_attention, "_has_varlen_kernel", lambda query: False)
    assert torch.equal(by_kernel, model(words, is_causal=is_causal, **documents).logits)
    assert len(kernel) == 2


def test_under_autocast_the_kernel_gets_sixteen_bits(llama, words, kernel):
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        llama()(words, **document_kwargs(positions(PACKED)))
    assert {call[name].dtype for call in kernel for name in ("query", "key", "value")} == {torch.bfloat16}


def test_with_the_kernel_the_model_is_compiled_whole_and_not_again_for_every_batch(llama, monkeypatch):
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    monkeypatch.setattr(document_attention, "_has_varlen_kernel", lambda query: True)
    # no numbers, but the kernel's own rules for shapes, forward and backward
    model = llama(num_hidden_layers=1).to("meta", torch.bfloat16)
    words = torch.zeros(2, LENGTH, dtype=torch.int64, device="meta")
    counter, compiled_after = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for packed in OTHER_DOCUMENTS:
        documents = document_kwargs(positions(packed))
        on_device = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in documents.items()}
        compiled(words, use_cache=False, **on_device).logits.sum().backward()
        compiled_after.append(counter.frame_count)
    # the second batch says that the number of documents changes, the first with a shorter longest one that this does, too
    assert compiled_after == [1, 2, 2, 3, 3]
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    torch._dynamo.reset()


def test_flash_attention_of_transformers_goes_by_the_same_keyword_arguments(monkeypatch):
    import torch
    from transformers import modeling_flash_attention_utils as flash

    documents, called = document_kwargs(positions(PACKED)), {}

    def varlen(query, key, value, **kwargs):
        called.update(kwargs, tokens=len(query))
        return query

    def only_varlen(implementation):  # flash_attn itself is for GPUs
        return (None, varlen, None, None, None), (lambda **kwargs: {"max_seqlen_q": kwargs["max_seqlen_q"]}, None)

    monkeypatch.setattr(flash, "lazy_import_flash_attention", only_varlen)
    query, key = torch.zeros(2, LENGTH, 4, 8), torch.zeros(2, LENGTH, 2, 8)
    out = flash._flash_attention_forward(query, key, key, None, query_length=LENGTH, is_causal=True, **documents)
    assert out.shape == query.shape
    assert called["tokens"] == 2 * LENGTH
    assert called["cu_seqlens_q"].tolist() == called["cu_seqlens_k"].tolist() == [0, 7, 8, 33, 34, 48, 95, 96]
    assert called["max_seqlen_q"] >= 47


# -- what it is told --------------------------------------------------------------------------------------------------


def test_the_batch_says_where_its_documents_begin_and_how_long_they_may_be():
    import torch

    documents = document_kwargs(positions(PACKED))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert documents[name].dtype == torch.int32
        assert documents[name].tolist() == [0, 7, 8, 33, 34, 48, 95, 96]
    assert documents["max_length_q"] == documents["max_length_k"] == LENGTH  # the next power of two would be more
    assert documents["position_ids"].tolist() == positions(PACKED).tolist()
    assert document_kwargs(positions([[5] * 200]))["max_length_q"] == 8


def test_a_sample_that_would_run_on_from_the_row_before_is_refused():
    with pytest.raises(ValueError, match="a row that does not begin with 0"):
        document_kwargs(np.array([[0, 1, 2], [3, 4, 0]]))


def test_it_refuses_to_leave_the_boundaries_out(llama, words):
    model, documents = llama(), document_kwargs(positions(PACKED))
    with pytest.raises(ValueError, match="document_kwargs"):
        model(words, position_ids=documents["position_ids"])


@pytest.mark.parametrize(
    "implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
)
def test_the_implementation_is_the_recipes_except_where_it_knows_no_documents(implementation):
    assert attention_for(implementation, False) == implementation
    if implementation == "eager":
        with pytest.raises(InputError, match="attn_implementation eager would need a mask of max_length × max_length"):
            attention_for(implementation, True)
    else:
        assert attention_for(implementation, True) == {"sdpa": NAME}.get(implementation, implementation)


def test_a_recipe_is_checked_without_torch():
    code = (
        "import sys; from dilqur.kernels.varlen_attention import attention_for; attention_for('sdpa', True); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
