"""The Llama-3 text conventions: pre-tokenizer pattern, special tokens, chat template.

Facts from Meta's published tokenizer and model card for Llama 3.1 and 3.2. Nothing here is a model's weights or vocabulary.
"""

# Splits text before BPE: contractions, words with one leading character, numbers by three digits, punctuation, white space.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The same with combining marks, and the two joiners, as parts of a word. Llama 3's own pattern cuts before a vowel sign: in the
# scripts of India, in Thai, Khmer or vocalised Arabic and Hebrew no merge could cross it, whatever the vocabulary.
PATTERN_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}"
    "\u200c\u200d"
    r"]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama3": PATTERN, "llama3_marks": PATTERN_WITH_MARKS}

BOS, EOS, PAD, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"

_NAMED = [
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|reserved_special_token_2|>",
    HEADER_START,
    HEADER_END,
    "<|eom_id|>",
    EOT,
    "<|python_tag|>",
]
# 256 of them, in the order of their ids, directly after the vocabulary.
SPECIAL_TOKENS = [*_NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(3, 3 + 256 - len(_NAMED)))]

# One turn is a header, an empty line, the content, <|eot_id|>. No default system prompt: what is not said is not there.
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def encode_chat(tokenizer, messages, add_generation_prompt=False):
    """(ids, mask) of a conversation, as CHAT_TEMPLATE renders it; mask is 1 on what the assistant says and its <|eot_id|>.

    tokenizer: dilqur.tokenizer.text_tokenizer.TextTokenizer. Control tokens come from here alone: content that spells `<|eot_id|>` stays
    text. messages: [{"role": str, "content": str}, …]. Raises KeyError if the tokenizer lacks a control token.
    """
    control = tokenizer.control_id
    ids, mask = [control(BOS)], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    def header(role):
        add([control(HEADER_START), *tokenizer.encode(role), control(HEADER_END), *tokenizer.encode("\n\n")], False)

    for message in messages:
        header(message["role"])
        add([*tokenizer.encode(message["content"].strip()), control(EOT)], message["role"] == "assistant")
    if add_generation_prompt:
        header("assistant")
    return ids, mask
