"""The matrices of a model that have a row for each token: what they are called, found without loading a weight."""

import copy
from dataclasses import dataclass

import torch

from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import equal_bytes

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class TokenMatrices:
    """Names in the model's files. embeddings: of the input embeddings. head: of the output matrix, None where it is tied to
    them. bias: of the head's bias (a number for each token), or None. duplicate: a tied head that the files hold all the same."""

    embeddings: str
    head: str | None
    bias: str | None
    duplicate: str | None


def token_matrices(folder, tensors):
    """(TokenMatrices, transformers config) of a model folder. tensors: its `stored_tensors`.

    The model is built on the meta device, with no memory for weights. Raises InputError where the files do not fit it, or it has
    other parameters that grow with the vocabulary.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        model, larger = _on_meta(config), _on_meta(config, more=1)
    except (ValueError, OSError, KeyError) as problem:
        raise InputError(f"{folder}: transformers cannot build this model ({str(problem).splitlines()[0]})") from None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None:
        raise InputError(f"{folder}: this model has no head over the vocabulary")
    tied, bias = head.weight is embeddings, getattr(head, "bias", None)
    every = dict(model.named_parameters(remove_duplicate=False))
    second = next((n for n, p in every.items() if p is head.weight and n != names[id(embeddings)]), None)
    shapes = {name: p.shape for name, p in larger.named_parameters(remove_duplicate=False)}
    known = {id(embeddings), id(head.weight), id(bias)}
    if others := [n for n, p in every.items() if p.shape != shapes[n] and id(p) not in known]:
        raise InputError(
            f"{folder}: {others[0]} grows with the vocabulary too, and nothing here knows how to make its rows"
        )

    def stored(parameter):
        """Its name in the files: some leave out the prefix of the backbone, as GPT-2's do."""
        name = names[id(parameter)]
        short = name.removeprefix(f"{model.base_model_prefix}.")
        found = name if name in tensors else short
        if found not in tensors:
            raise InputError(
                f"{folder}: its files hold no {name}, which its config.json promises; convert the model again"
            )
        if tensors[found].shape != tuple(parameter.shape):
            raise InputError(
                f"{folder}: {found} is {' × '.join(map(str, tensors[found].shape))}, its config.json says "
                f"{' × '.join(map(str, parameter.shape))}; convert the model again"
            )
        if tensors[found].dtype not in FLOATS:
            raise InputError(
                f"{folder}: {found} is {tensors[found].dtype}, not a float; take the model before it was quantised"
            )
        return found

    duplicate = second if tied and second in tensors else None
    matrices = TokenMatrices(
        stored(embeddings), None if tied else stored(head.weight), None if bias is None else stored(bias), duplicate
    )
    if duplicate and not equal_bytes(tensors[duplicate], tensors[matrices.embeddings]):
        raise InputError(
            f"{folder}: config.json ties the head to the embeddings, but {duplicate} differs from {matrices.embeddings}; set "
            "tie_word_embeddings to false there, or remove the tensor"
        )
    return matrices, config


def _on_meta(config, more=0):
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key in [
        key for key in vars(text) if key.startswith("vocab_size")
    ]:  # Gemma 3n's per-layer embeddings have their own
        setattr(text, key, getattr(text, key) + more)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
