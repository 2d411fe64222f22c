"""Inputs for a benchmark where a recipe's own are not there: token shards, a tokenizer, a model with random weights.

Speed does not depend on what weights and tokens say, but on their sizes, and a little on how often a token occurs (the embedding's
gradient) and how long documents are (attention within them): ids are drawn with probabilities as 1 / rank, as in Zipf's law, and lengths
from a log-normal distribution with a median of 400 tokens, so that most documents are shorter than a sample of 2,048.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from dilqur.common.atomic import atomic_folder, write_json
from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.data.shard_writer import ShardWriter
from dilqur.tokenizer.text_tokenizer import TextTokenizer

MOST_TOKENS = 1 << 26
MEDIAN_LENGTH, SPREAD = 400, 1.0


def synthetic_inputs(folder, model_config, tokens, encoder, with_model, seed=0):
    """The folder with `tokenizer`, `shards` and, if with_model, `model`: made in `folder`, under a name that says of what, where it is
    not there yet. tokens: wanted, of which there are MOST_TOKENS at most. Raises InputError where model_config is no model's."""
    made_of = json.dumps([model_config, min(tokens, MOST_TOKENS), encoder, with_model, seed], sort_keys=True)
    target = folder / hashlib.sha256(made_of.encode()).hexdigest()[:12]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as out:
            make_tokenizer(out / "tokenizer", encoder, model_config["vocab_size"])
            hashed = TextTokenizer(out / "tokenizer").hash
            make_shards(out / "shards", min(tokens, MOST_TOKENS), model_config["vocab_size"], hashed, seed)
            if with_model:
                make_model(out / "model", model_config, out / "tokenizer", seed)
    return target


def make_tokenizer(folder, encoder, vocab_size):
    """A small one, of the corpus that comes with the quickstart, and as many tokens that no text has as vocab_size wants."""
    corpus = ROOT / "recipes" / "quickstart" / "corpus" / "en"
    kind = ["--control_tokens", "encoder"] if encoder else []
    program = ROOT / "data_tools" / "train_tokenizer.py"
    command = [sys.executable, str(program), "--input", str(corpus), "--vocab_size", "300", *kind]
    done = subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{program.name} could not make a tokenizer: {done.stderr.strip()[-300:]}")
    size, file = TextTokenizer(folder).size, folder / "tokenizer.json"
    if size > vocab_size:
        raise InputError(f"model_config: vocab_size {vocab_size}: the tokenizer alone has {size} tokens")
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] |= {f"<unused {number}>": number for number in range(size, vocab_size)}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def make_shards(folder, tokens, vocab_size, tokenizer_hash, seed):
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, random.lognormal(np.log(MEDIAN_LENGTH), SPREAD, 2 * tokens // MEDIAN_LENGTH + 2)).astype(
        int
    )
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
    ids = np.exp(random.random(lengths.sum(), dtype=np.float32) * np.log(vocab_size)).astype(np.int32) - 1
    with ShardWriter(folder, 1 << 28) as writer:
        writer.add(np.clip(ids, 0, vocab_size - 1), lengths)
        fields = writer.close()
    fields |= {"tokenizer_sha256": tokenizer_hash, "vocab_size": vocab_size, "utf8_bytes": 4 * fields["tokens"]}
    write_json(folder / "manifest.json", {**fields, "eos_id": None})


def make_model(folder, model_config, tokenizer, seed):
    """A Llama with random weights, in fp32."""
    from shutil import copy2

    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    try:
        LlamaForCausalLM(LlamaConfig(**model_config)).save_pretrained(folder)
    except (TypeError, ValueError) as problem:
        raise InputError(f"model_config: transformers cannot build this Llama ({problem})") from None
    for file in Path(tokenizer).glob("*.json"):
        if file.name != "manifest.json":
            copy2(file, folder)
