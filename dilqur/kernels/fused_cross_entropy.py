"""The head and its cross-entropy in one: the logits of a batch, which with their gradients take 12 bytes × tokens × vocabulary, never
lie in memory whole.

    loss_kernel   who computes it                                          where
    logits        torch, all logits at once                                anywhere; what the others are compared with
    chunked       `Chunked`, below: some rows at a time                    anywhere
    liger         Liger's fused linear cross-entropy, a Triton kernel      a GPU

All but the first compute the gradients in the forward pass, so that no logits are kept until the backward pass. They run inside the
head's own forward: whatever a strategy does to have the head's weight whole there, gather it or cast it, is done by then. They are no
part of a compiled graph.
"""

import types

import torch
from torch.nn.functional import linear
from transformers.modeling_outputs import CausalLMOutputWithPast

from dilqur.common.constants import IGNORE_INDEX
from dilqur.kernels.choose import CHUNK_BYTES
from dilqur.kernels.varlen_attention import dtype_of_products


def fuse_loss(model, kernel, compiled=False):
    """Have `model`, a causal model of transformers or a NeoBERTLMHead, compute its loss by `kernel`, one of the above but "logits".

    From then on the head, called with labels and num_items_in_batch, returns the sum of the losses / num_items_in_batch instead of
    logits, and so does the model where it is given shift_labels (NeoBERT: labels, in training); its `logits` are then None. compiled:
    whether "chunked" may compile what it does with a chunk of logits. To be called before the model is prepared.
    """
    head = model.get_output_embeddings()
    logits_of, compute = head.forward, _function(kernel, compiled)

    @torch.compiler.disable
    def loss_of(hidden, labels, num_items_in_batch):
        tensors = (hidden.flatten(0, -2), head.weight, head.bias)
        # without autocast the weight's: FSDP2 gathers it in bfloat16 already
        return compute(*tensors, labels.flatten(), dtype_of_products(head.weight)) / num_items_in_batch

    def head_forward(hidden, labels=None, num_items_in_batch=1):
        return logits_of(hidden) if labels is None else loss_of(hidden, labels, num_items_in_batch)

    head.forward = head_forward
    if hasattr(model, "loss_in_head"):
        model.loss_in_head = True
        return
    plain = model.forward

    def forward(self, input_ids=None, shift_labels=None, num_items_in_batch=1, labels=None, **kwargs):
        if shift_labels is None:
            return plain(input_ids=input_ids, labels=labels, **kwargs)
        hidden = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=self.get_output_embeddings()(hidden, shift_labels, num_items_in_batch))

    model.forward = types.MethodType(forward, model)


def _function(kernel, compiled):
    """f(hidden (tokens, hidden_size), weight (vocabulary, hidden_size), bias (vocabulary,) or None, labels (tokens,), dtype of the
    products): the sum of the losses over all labels that are not IGNORE_INDEX, fp32 of no dimension."""
    if kernel == "chunked":
        of_a_chunk = torch.compile(loss_and_gradient, dynamic=True) if compiled else loss_and_gradient
        return lambda *tensors: Chunked.apply(*tensors, of_a_chunk, torch.is_grad_enabled())
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32)

    def cast(hidden, weight, bias, labels, dtype):
        bias = bias if bias is None else bias.to(dtype)
        return liger(weight.to(dtype), hidden.to(dtype), labels, bias).float()

    return cast


def loss_and_gradient(logits, labels):
    """Of a chunk: (sum of the losses, fp32; gradients of the logits, in their dtype). logits: (rows, vocabulary). labels: (rows,)."""
    valid = labels != IGNORE_INDEX
    target = labels.where(valid, 0).unsqueeze(1)
    if torch.compiler.is_compiling():  # two passes over the logits, and nothing of their size but the gradient
        normalizer = logits.float().logsumexp(1, keepdim=True)
        losses = (normalizer - logits.gather(1, target)).squeeze(1)
        columns = torch.arange(logits.shape[1], device=logits.device)
        gradient = (logits.float() - normalizer).exp() - (columns == target).float()
    else:
        log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
        losses = -log_probabilities.gather(1, target).squeeze(1)
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    return losses.where(valid, 0).sum(), gradient.mul_(valid.unsqueeze(1)).to(logits.dtype)


class Chunked(torch.autograd.Function):
    """As many rows at a time as have CHUNK_BYTES of logits. The gradient of the weight is summed over the chunks in fp32, and stays that
    where the weight is."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, of_a_chunk, with_gradients):
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        rows = rows // 256 * 256 or rows  # whole tiles of a GPU's products
        wants = [wanted and with_gradients for wanted in ctx.needs_input_grad]
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if wants[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] else None
        for first in range(0, len(hidden), rows):
            part, answers = hidden[first : first + rows], labels[first : first + rows]
            loss, gradient = of_a_chunk(linear(part, weight, bias), answers)
            total += loss
            if wants[0]:
                torch.mm(gradient, weight, out=of_hidden[first : first + rows])
            if wants[1] and dtype == torch.float32:
                of_weight.addmm_(gradient.T, part)
            elif wants[1] and weight.is_cuda:  # a product of bfloat16 added to fp32 without a copy; only GPUs have it
                torch.addmm(of_weight, gradient.T, part, out_dtype=torch.float32, out=of_weight)
            elif wants[1]:
                of_weight += gradient.T @ part
            if wants[2]:
                of_bias += gradient.sum(0, dtype=torch.float32)
            del gradient  # or it lies beside the next chunk's logits
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, scale):
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # in place, for they are large: a second backward pass through it is an error
        return (*(g if g is None else g.mul_(scale).to(dtype) for g, dtype in found), None, None, None, None)
