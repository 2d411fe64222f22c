r"""Gives a model another tokenizer: base model + new tokenizer → the same model with a new embedding matrix.

    python scripts/transplant_tokenizer.py --model_name_or_path runs/quickstart/base \
        --tokenizer runs/quickstart/tokenizer --output_dir runs/try/m
    python scripts/transplant_tokenizer.py --config recipes/quickstart/transplant.yaml --check

The new tokenizer replaces the old one or extends it: tokens of both vocabularies keep their rows to the bit, `method` makes the
others, for the embeddings and, where it is not tied, for the head. Every other weight goes from file to file as it is; no model
is loaded, so a few GB of memory do for 8B. Special tokens and generation_config follow the new tokenizer. OUTPUT_DIR is a
Hugging Face folder. docs/transplant.md says which method to take.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dilqur.common.atomic import atomic_files
from dilqur.common.constants import Positive
from dilqur.common.errors import InputError
from dilqur.common.markdown import markdown, number
from dilqur.common.startup import quiet_libraries
from dilqur.data.documents import ReadingSettings, read_input
from dilqur.models.config import read_config
from dilqur.models.safetensors_io import read_tensor, rewrite, stored_tensors
from dilqur.pipeline.inputs import Documents, ModelPath, TokenizerPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.llama3 import EOT, PAD
from dilqur.tokenizer.text_tokenizer import TextTokenizer, padded_size
from dilqur.transplant.vocabulary_map import VocabularyMap

SPARSITY = 64
NORMS = ("norm_made", "norm_written")
READS_TEXT = ("calibrated_piece_mean", "focus", "orthogonal_matching_pursuit")


@dataclass(kw_only=True)
class TransplantSettings(ReadingSettings, StageSettings):
    model_name_or_path: ModelPath = setting("base model: its folder, a stage, or a Hub name in the local cache")
    tokenizer: TokenizerPath = setting("folder of the new tokenizer")
    method: Literal[
        "random",
        "mean",
        "piece_mean",
        "weighted_piece_mean",
        "calibrated_piece_mean",
        "focus",
        "orthogonal_matching_pursuit",
    ] = setting("how a new token's row starts", default="piece_mean")
    input: list[Documents] | None = setting(
        f"text of the language, for {', '.join(READS_TEXT)}: files, folders or globs", default=None
    )
    max_input_tokens: Positive = setting("tokens of input that are read", default=20_000_000)
    donor_model_name_or_path: ModelPath | None = setting(
        "orthogonal_matching_pursuit: a model that has the new tokenizer, instead of input", default=None
    )
    sparsity: Positive | None = setting(
        f"orthogonal_matching_pursuit: tokens that make up a new one; {SPARSITY}", default=None
    )
    match_norms: Literal["none", "row", "class"] = setting(
        "scale what is made to the mean norm of the old rows: each row, or each class by one factor", default="none"
    )
    pad_to_multiple_of: Positive = setting("rows of the matrix, for tensor cores", default=128)
    seed: int = setting("of random's noise and of the decomposition of input", default=42)


# -- what can be seen in a second -------------------------------------------------------------------------------------


def check(settings):
    """(old TextTokenizer, new one, VocabularyMap, {name: Stored} of the base). Raises InputError."""
    method, donor = settings.method, settings.donor_model_name_or_path
    if settings.input and method not in READS_TEXT:
        raise InputError(f"input: method {method} reads no text; remove the key, or take {', '.join(READS_TEXT)}")
    for key in ("donor_model_name_or_path", "sparsity"):
        if getattr(settings, key) is not None and method != "orthogonal_matching_pursuit":
            raise InputError(f"{key}: is for method orthogonal_matching_pursuit, not {method}; remove it")
    if method == "focus" and not settings.input:
        raise InputError("input missing: method focus compares tokens by the text they stand in")
    if method == "orthogonal_matching_pursuit" and bool(settings.input) == bool(donor):
        raise InputError(
            "give donor_model_name_or_path (a model that has the new tokenizer) or input (text), and one of them: method "
            "orthogonal_matching_pursuit looks there for what a new token is like"
        )
    old, new = TextTokenizer(settings.model_name_or_path), TextTokenizer(settings.tokenizer)
    if new.hash == old.hash:
        raise InputError(f"tokenizer: {settings.tokenizer} is the tokenizer {settings.model_name_or_path} has already")
    vocabulary = VocabularyMap(old, new)
    check_rows(settings.model_name_or_path, old)
    if donor:
        if TextTokenizer(donor).hash != new.hash:
            raise InputError(f"donor_model_name_or_path: {donor} has another tokenizer than {settings.tokenizer}")
        check_rows(donor, new)
        stored_tensors(donor)
    return old, new, vocabulary, stored_tensors(settings.model_name_or_path)


def check_rows(folder, tokenizer):
    config = read_config(folder)
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if rows is not None and rows < tokenizer.size:
        raise InputError(
            f"{folder}: rows for {rows:,} tokens, its tokenizer has ids up to {tokenizer.size - 1:,}: they do not belong together"
        )


# -- what new tokens are like -----------------------------------------------------------------------------------------


def count_tokens(settings, tokenizer):
    """int64 (size,): how often each id occurs in the first max_input_tokens of input."""
    import numpy as np

    counts, batch = np.zeros(tokenizer.size, np.int64), []

    def add():
        for ids in tokenizer.encode_batch(batch):
            counts[:] += np.bincount(ids, minlength=tokenizer.size)
        batch.clear()

    for document in read_input(settings)[0]:
        batch.append(document.text)
        if len(batch) == 256:
            add()
            if counts.sum() >= settings.max_input_tokens:
                break
    add()
    return counts


def spaces(settings, tokenizer, tied, device):
    """{matrix: float32 (size, d)}: vectors of the new tokens, from the donor's matrices or from the text."""
    if settings.donor_model_name_or_path:
        from dilqur.transplant.token_matrices import token_matrices

        folder = settings.donor_model_name_or_path
        tensors = stored_tensors(folder)
        names, _ = token_matrices(folder, tensors)
        rows = {"embeddings": names.embeddings, "head": names.head or names.embeddings, "tied": names.embeddings}
        wanted = ("tied",) if tied else ("embeddings", "head")
        return {kind: read_tensor(tensors[rows[kind]], rows[kind])[: tokenizer.size].float() for kind in wanted}
    from dilqur.transplant.corpus_embeddings import corpus_embeddings

    texts = (document.text for document in read_input(settings)[0])
    space = corpus_embeddings(
        texts, tokenizer, tokenizer.size, max_tokens=settings.max_input_tokens, seed=settings.seed
    )
    if not space.any():
        raise InputError(f"input: no two tokens next to each other in {', '.join(settings.input)}; give more text")
    return dict.fromkeys(("tied", "embeddings", "head"), space)


# -- the folder -------------------------------------------------------------------------------------------------------


def write_configs(source, folder, config, tokenizer, rows):
    """config.json and generation_config.json with the new tokenizer's BOS, EOS and PAD; generation ends at EOS and <|eot_id|>."""
    pad, eot = (tokenizer.backend.token_to_id(token) for token in (PAD, EOT))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in ids.items():
            setattr(part, key, value)
    config.get_text_config().vocab_size = rows
    config.save_pretrained(folder)
    path = Path(source) / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as problem:
        raise InputError(f"{path}: damaged ({problem})") from None
    ends = [i for i in (tokenizer.eos_id, eot) if i is not None]
    generation |= ids | {"eos_token_id": ends or None}
    (Path(folder) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def table(classes):
    """The rows of each class and the mean of their norms, before and after match_norms, of each matrix."""
    heads = ["class", "rows", *(head for matrix in classes for head in (f"{matrix}: norm made", "written"))]
    first = next(iter(classes.values()))
    norms = {name: [number(c[name][key], ".4f") for c in classes.values() for key in NORMS] for name in first}
    return markdown(heads, [[name, f"{row['count']:,}", *norms[name]] for name, row in first.items()])


@program(TransplantSettings, check, kind="transplant")
def main(settings, stage, checked):
    old, new, vocabulary, tensors = checked
    stage.open()
    quiet_libraries()
    import torch

    from dilqur.tokenizer.files import copy_tokenizer
    from dilqur.transplant.embedding_init import new_matrix, plan_rows
    from dilqur.transplant.piece_calibration import Calibration, Examples, new_levels
    from dilqur.transplant.token_matrices import token_matrices

    names, config = token_matrices(settings.model_name_or_path, tensors)
    if tensors[names.embeddings].shape[0] < old.size:
        raise InputError(f"{settings.model_name_or_path}: fewer rows than its tokenizer has ids")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    similar = settings.method in ("focus", "orthogonal_matching_pursuit")
    space = spaces(settings, new, names.head is None, device) if similar else {}
    calibrated = settings.method == "calibrated_piece_mean"
    if calibrated:
        examples = Examples(old, vocabulary)
        levels = new_levels(vocabulary, count_tokens(settings, new) if settings.input else None)

    rows = padded_size(new.size, settings.pad_to_multiple_of)
    tables, explained, replaced = {}, {}, {}

    def make(matrix, name):
        """The new tensor in place of `name`; what was done goes into `tables`."""
        weight = read_tensor(tensors[name], name)
        if matrix == "bias":  # of the head, a number for each token: kept, or the mean
            return new_matrix(weight.unsqueeze(1), vocabulary, plan_rows("mean", vocabulary), rows)[0].squeeze(1)
        parts = plan_rows(settings.method, vocabulary, matrix, space.get(matrix), settings.sparsity or SPARSITY, device)
        calibration = Calibration(weight, examples, levels) if calibrated else None
        if calibrated:
            explained[matrix] = round(calibration.explained, 4)
        made, tables[matrix] = new_matrix(
            weight, vocabulary, parts, rows, settings.match_norms, settings.seed, calibration
        )
        return made

    for matrix, name in (
        ("tied" if names.head is None else "embeddings", names.embeddings),
        ("head", names.head),
        ("bias", names.bias),
    ):
        if name is not None:  # made when it is written: one of them is in memory at a time
            replaced[name] = ((rows, *tensors[name].shape[1:]), functools.partial(make, matrix, name))
    with atomic_files(stage.folder) as part:
        parameters = rewrite(tensors, replaced, {names.duplicate}, part)
        write_configs(settings.model_name_or_path, part, config, new, rows)
        copy_tokenizer(settings.tokenizer, part)
        if TextTokenizer(part).hash != new.hash:
            raise RuntimeError("saving the tokenizer changed it")
    copied = sum(len(ids) for ids in vocabulary.copied.values())
    result = {
        "rows": rows,
        "copied": copied,
        "made": new.size - copied,
        "padding_rows": rows - new.size,
        "tied": names.head is None,
        "parameters": parameters,
        "tokenizer_sha256": new.hash,
        "classes": dict(sorted(tables.items())),  # whichever file came first
        **({"variance_explained": explained} if calibrated else {}),
    }
    stage.finish(result)
    print(table(result["classes"]))
    print(
        f"{stage.folder}: {rows:,} rows, {copied:,} copied, {result['made']:,} made by {settings.method}, "
        f"{result['padding_rows']} padding; {parameters:,} parameters"
    )


if __name__ == "__main__":
    main()
