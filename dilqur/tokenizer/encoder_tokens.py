"""The control tokens of an encoder, named as BERT's: a document is [CLS] … [SEP], what is to be guessed is [MASK].

128 of them after the vocabulary, the last ones for whoever fine-tunes: 63,872 bytes and merges make 64,000 ids.
"""

CLS, SEP, MASK, PAD = "[CLS]", "[SEP]", "[MASK]", "[PAD]"
CONTROL_TOKENS = [PAD, CLS, SEP, MASK, *(f"[unused{i}]" for i in range(124))]
