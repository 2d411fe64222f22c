"""New embedding rows from old ones, for a vocabulary that replaces another."""


def piece_mean(old_embeddings, old_tokenizer, new_tokenizer, old_special=(), new_special=()):
    """(embeddings, copied): a row for every id of the new tokenizer, made of the old rows.

    A token with the same bytes in both vocabularies, or the same control token, keeps its row (copied: how many did); any other
    gets the mean of the rows of its pieces: its bytes encoded by the old tokenizer. old_embeddings: float tensor
    (old size, hidden). Tokenizers: byte-level `tokenizers.Tokenizer`, as in TextTokenizer.backend. *_special: {content: id} of
    the control tokens; one that the old tokenizer lacks gets the mean of all old rows. Returns a float32 tensor
    (new size, hidden) on the CPU.
    """
    old_embeddings = old_embeddings.detach().float().cpu()
    old_vocab, old_special, new_special = (
        old_tokenizer.get_vocab(with_added_tokens=False),
        dict(old_special),
        dict(new_special),
    )
    new_vocab = new_tokenizer.get_vocab(with_added_tokens=False)
    size = max([*new_vocab.values(), *new_special.values()]) + 1
    average = old_embeddings[: max(old_vocab.values()) + 1].mean(0)
    out, copied = average.repeat(size, 1), 0
    for token, new_id in [*new_vocab.items(), *new_special.items()]:
        known = old_special if token in new_special else old_vocab
        if token in known:
            out[new_id] = old_embeddings[known[token]]
            copied += 1
        elif token not in new_special:
            out[new_id] = old_embeddings[pieces_of(token, old_vocab, old_tokenizer)].mean(0)
    return out, copied


def pieces_of(token, old_vocab, old_tokenizer):
    """Ids under the old tokenizer of the bytes that a byte-level `token` stands for.

    The BPE model is asked directly, without its pre-tokeniser: a token is one word already, and may not be whole UTF-8.
    """
    pieces = old_tokenizer.model.tokenize(token)
    return [piece.id for piece in pieces] or [old_vocab[char] for char in token]
