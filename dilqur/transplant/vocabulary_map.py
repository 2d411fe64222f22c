"""Two byte-level BPE vocabularies side by side: which token of the new one the old one has, and what the others are made of."""

import json

from dilqur.common.errors import InputError
from dilqur.tokenizer.text_tokenizer import byte_characters


class VocabularyMap:
    """What every token of a new tokenizer is to an old one.

    old, new: TextTokenizer. All of it by id:
    copied      {class: {new id: old id}}: "copied", the same bytes in both; "byte", one byte; "special copied", the same name
    anchors     {new id: old id} of those of them that are ordinary tokens: the two vocabularies' overlap
    pieces      {new id: [old ids]} of the ordinary tokens the old one lacks: their bytes encoded by it, in order
    no_pieces   ids of ordinary tokens with a byte that the old vocabulary has no token for
    special_made    ids of control tokens the old one lacks
    old_ordinary    sorted ids of the old tokenizer's ordinary tokens: the rows worth an average. Most control tokens were never
                    trained, and rows past the tokenizer never used.

    Raises InputError for a tokenizer that is not byte-level BPE, and for a token that is a control token in one and text in
    the other.
    """

    def __init__(self, old, new):
        before, after = _Vocabulary(old), _Vocabulary(new)
        for one, other in ((before, after), (after, before)):
            if clash := sorted(one.special.keys() & other.ordinary.keys()):
                raise InputError(
                    f"{clash[0]} is a control token in {one.tokenizer.path} and ordinary text in {other.tokenizer.path}: a row "
                    "cannot be both; make it the same in the two"
                )
        self.old_ordinary = sorted(before.ordinary.values())
        self.copied = {"copied": {}, "byte": {}, "special copied": {}}
        self.pieces, self.no_pieces, self.special_made = {}, [], []
        for content, new_id in after.special.items():
            if content in before.special:
                self.copied["special copied"][new_id] = before.special[content]
            else:
                self.special_made.append(new_id)
        for token, new_id in after.ordinary.items():
            if token in before.ordinary:
                self.copied["byte" if len(token) == 1 else "copied"][new_id] = before.ordinary[token]
            elif pieces := before.pieces(token, after.added.get(new_id)):
                self.pieces[new_id] = pieces
            else:
                self.no_pieces.append(new_id)
        self.anchors = self.copied["byte"] | self.copied["copied"]
        self.size = new.size


class _Vocabulary:
    """ordinary: {token as byte-level BPE writes it: id}. special: {control token: id}. added: {id: text} of added tokens that
    are no control tokens. A control token's name is ASCII without spaces, so an ordinary token that spells it looks the same."""

    def __init__(self, tokenizer):
        require_byte_level(tokenizer)
        self.tokenizer, backend = tokenizer, tokenizer.backend
        added = backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.added = {i: token.content for i, token in added.items() if not token.special}
        control = set(self.special.values())
        self.ordinary = {t: i for t, i in backend.get_vocab(with_added_tokens=False).items() if i not in control}
        characters = byte_characters()
        for i, content in self.added.items():
            self.ordinary.setdefault("".join(characters[byte] for byte in content.encode("utf-8")), i)

    def pieces(self, token, text=None):
        """Ids of the bytes of a `token` of another vocabulary, [] where one of them is missing. text: it is an added token.

        The BPE model is asked directly, without its pre-tokenizer: a token is one word already, and may not be whole UTF-8.
        """
        if text is not None:
            return self.tokenizer.encode(text)
        pieces = self.tokenizer.backend.model.tokenize(token)
        return [piece.id for piece in pieces] if "".join(piece.value for piece in pieces) == token else []


def require_byte_level(tokenizer):
    """Raise InputError unless a TextTokenizer is byte-level BPE, saying what it is instead."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    kind = json.loads(tokenizer.backend.to_str())["model"]["type"]
    if kind == "BPE" and "Ā" in vocabulary:  # how byte-level BPE writes the byte 0
        return
    if kind == "Unigram" or "▁" in vocabulary or "<0x00>" in vocabulary:
        kind = "SentencePiece"
    raise InputError(
        f"{tokenizer.path}: not a byte-level BPE tokenizer but {kind}: its tokens are no byte strings that two vocabularies could "
        "share; take a base model and a new tokenizer with byte-level BPE (Llama 3, Qwen, GPT-2, …)"
    )
