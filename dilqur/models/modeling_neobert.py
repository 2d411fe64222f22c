"""NeoBERT (Le Breton and others 2025, arXiv:2502.19587): a transformer encoder, with the config keys and weight names of the published one.

    x = embedding(token)                                             no positions, no token types
    28 × x = x + wo(attention(rope(q), rope(k), v)),  q, k, v = qkv(norm(x)), interleaved by head
         x = x + w3(silu(a) · b),                     a, b = w12(norm(x))
    logits = decoder(norm(x))                                        untied, with a bias; nothing else has one

RoPE turns adjacent pairs of numbers, in real arithmetic, so that the model compiles as one graph. Attention is whatever
`attn_implementation` says, in both directions, dilqur/kernels/varlen_attention.py's too, which keeps packed documents apart.

`intermediate_size` is read as the reference code reads it: the layer is two thirds of it wide, up to a multiple of 8. The published
3,072 is a width of 2,048; a width of 3,072 is intermediate_size 4,608.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.eurobert.modeling_eurobert import eager_attention_forward

from dilqur.common.constants import IGNORE_INDEX
from dilqur.models.config import neobert_width


class NeoBERTConfig(PreTrainedConfig):
    model_type = "neobert"

    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    norm_eps: float = 1e-5
    vocab_size: int = 30_522
    pad_token_id: int | None = 0
    max_length: int = 1024
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    @property
    def ffn_width(self):
        return neobert_width(self.intermediate_size)


class SwiGLU(nn.Module):
    def __init__(self, hidden_size, width):
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * width, bias=False)
        self.w3 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class EncoderBlock(GradientCheckpointingLayer):
    is_causal = False  # what attention implementations ask
    num_key_value_groups = 1

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.ffn = SwiGLU(config.hidden_size, config.ffn_width)
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x, turns, attention_mask=None, **kwargs):
        """x: (batch, length, hidden_size). turns: cosines and sines of `rope_cos_sin`. kwargs: where documents begin."""
        x = x + self._attention(self.attention_norm(x), turns, attention_mask, **kwargs)
        return x + self.ffn(self.ffn_norm(x))

    def _attention(self, x, turns, attention_mask, **kwargs):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3 * self.head_dim)).chunk(3, dim=-1)
        q, k, v = (y.transpose(1, 2) for y in (turn(q, turns), turn(k, turns), v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.wo(out.flatten(-2))


def rope_cos_sin(position_ids, head_dim, theta):
    """Cosines and sines, fp32 of shape (…, length, 1, head_dim / 2), of position · theta^(−2i / head_dim)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def turn(x, turns):
    """Rotate the pairs (x₀, x₁), (x₂, x₃), … of x, (batch, length, heads, head_dim), in fp32; returned in x's dtype."""
    cos, sin = turns
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).type_as(x)


class NeoBERTPreTrainedModel(PreTrainedModel):
    config_class = NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        """As published: weights uniform in ± embedding_init_range and ± decoder_init_range, norms 1; the decoder's bias is torch's."""
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -self.config.decoder_init_range, self.config.decoder_init_range)
        elif isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -self.config.embedding_init_range, self.config.embedding_init_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class NeoBERT(NeoBERTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.transformer_encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder

    def set_input_embeddings(self, embeddings):
        self.encoder = embeddings

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        """input_ids: (batch, length). attention_mask: the same, 0 where padding is. position_ids: the same, beginning again with
        each document; None: 0 to length − 1. kwargs: dilqur.kernels.varlen_attention.document_kwargs, with packed documents."""
        x = self.encoder(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        turns = rope_cos_sin(position_ids, head_dim, self.config.rope_theta)
        for block in self.transformer_encoder:
            x = block(x, turns, attention_mask=mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class NeoBERTLMHead(NeoBERTPreTrainedModel):
    _tied_weights_keys = {}
    loss_in_head = (
        False  # does the decoder compute the loss in training? As dilqur/kernels/fused_cross_entropy.py has it
    )

    def __init__(self, config):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.decoder

    def set_output_embeddings(self, decoder):
        self.decoder = decoder

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        labels=None,
        masked_positions=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """labels: (batch, length), IGNORE_INDEX where nothing is to be predicted. masked_positions: where they are not, int64 of shape
        (masked,), counting through the batch; given them, the decoder computes those alone, and logits is (masked, vocabulary).
        num_items_in_batch: what the sum of the losses is divided by; None: the number of labels."""
        x = self.model(input_ids, attention_mask, position_ids, **kwargs).last_hidden_state
        if masked_positions is not None:
            x = x.flatten(0, 1)[masked_positions]
            labels = labels.flatten()[masked_positions] if labels is not None else None
        if self.loss_in_head and self.training and labels is not None:
            items = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            return MaskedLMOutput(loss=self.decoder(x, labels, items))
        logits, loss = self.decoder(x), None
        if labels is not None:
            arguments = {"ignore_index": IGNORE_INDEX, "reduction": "mean" if num_items_in_batch is None else "sum"}
            loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), **arguments)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return MaskedLMOutput(loss=loss, logits=logits)
