"""Measures what transplanting a tokenizer takes for a model of several GB: peak memory and time, for each way of making rows.

    python benchmarks/transplant.py --folder /tmp/transplant
    python benchmarks/transplant.py --folder /tmp/transplant --gigabytes 16 --methods piece_mean

The base is a Llama in bfloat16 with random weights, written shard by shard, with 128,256 rows of 4,096 and an untied head, as
Llama 3.1 8B has them; --gigabytes sets how many layers. Its tokenizer and the new one are trained on the corpora of the quickstart
and filled up with made-up tokens to 128,000 and 100,000. Writes benchmarks/results/transplant.json and prints a Markdown table.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from dilqur.common.atomic import write_json
from dilqur.pipeline.manifest import hardware
from dilqur.tokenizer.llama3 import SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import TextTokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent
CORPUS = ROOT / "recipes" / "quickstart" / "corpus"
HIDDEN, INNER, KEYS, ROWS = 4096, 14336, 1024, 128_256
METHODS = {"mean": [], "piece_mean": [], "calibrated_piece_mean": [], "focus": ["--input", str(CORPUS / "az")]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and a result of the same size")
    parser.add_argument("--gigabytes", type=float, default=4, help="of the base")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    folder = arguments.folder
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    result = {
        "command": f"python benchmarks/transplant.py --folder FOLDER --gigabytes {arguments.gigabytes:g} "
        f"--methods {' '.join(arguments.methods)}",
        "commit": git.stdout.strip() or None,
        "packages": {name: metadata.version(name) for name in ("safetensors", "torch", "transformers")},
        "hardware": hardware(),
    }
    try:
        make_tokenizer(folder / "new", CORPUS / "az", 100_000)
        make_base(folder / "base", arguments.gigabytes)
        result["base_gigabytes"] = size(folder / "base")
        result["methods"] = {}
        for method in arguments.methods:
            result["methods"][method] = measure(folder, method)
            print(method, result["methods"][method], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(HERE / "results" / "transplant.json", result)
    print(table(result))


def make_tokenizer(folder, corpus, vocab_size):
    """A byte-level BPE tokenizer of the corpus with merges of random tokens behind its own, up to `vocab_size`."""
    command = [sys.executable, str(ROOT / "data_tools" / "train_tokenizer.py"), "--input", str(corpus)]
    subprocess.run(
        [*command, "--vocab_size", "3072", "--output_dir", str(folder)], check=True, stdout=subprocess.DEVNULL
    )
    spec, choose = json.loads(TextTokenizer(folder).content), random.Random(vocab_size)
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    words = [token for token in vocab if token.isalpha()]
    while len(vocab) < vocab_size:
        pair = [choose.choice(words), choose.choice(words)]
        token = "".join(pair)
        if token not in vocab:
            vocab[token] = len(vocab)
            merges.append(pair)
            if len(token) < 12:
                words.append(token)
    for at, token in enumerate(spec["added_tokens"]):
        token["id"] = vocab_size + at
    spec["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def make_base(folder, gigabytes):
    """Shard by shard: no more than a shard is in memory."""
    import torch
    from safetensors.torch import save_file

    make_tokenizer(folder, CORPUS / "en", ROWS - len(SPECIAL_TOKENS))
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
    }
    layer |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    layer |= {"mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    elements = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in layer.values())
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * ROWS * HIDDEN) / elements))
    shards = [
        {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)},
        {"lm_head.weight": (ROWS, HIDDEN)},
    ]
    shards += [{f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()} for n in range(layers)]
    where = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
            folder / file,
            {"format": "pt"},
        )
        where |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": ROWS}
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
    }
    config |= {"num_key_value_heads": 8, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder, method):
    """Seconds, and the peak of the memory that is the process's own and of all it has mapped, files included, in GB."""
    command = [sys.executable, str(ROOT / "scripts" / "transplant_tokenizer.py"), "--method", method, *METHODS[method]]
    paths = ["--model_name_or_path", folder / "base", "--tokenizer", folder / "new", "--output_dir", folder / "out"]
    started, own, peak = time.perf_counter(), 0, 0
    process = subprocess.Popen([*command, *map(str, paths)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        values = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("RssAnon", "VmHWM"))
        }
        own, peak = max(own, int(values.get("RssAnon", 0))), max(peak, int(values.get("VmHWM", 0)))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{method}: exit code {process.returncode}")
    out = {"seconds": round(time.perf_counter() - started, 1), "result_gigabytes": size(folder / "out")}
    shutil.rmtree(folder / "out")
    return {
        **out,
        "peak_own_gigabytes": round(own * 1024 / 1e9, 2),
        "peak_resident_gigabytes": round(peak * 1024 / 1e9, 2),
    }


def size(folder):
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 2)


def table(result):
    machine = result["hardware"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores; base of {result['base_gigabytes']} GB", ""]
    lines += ["| method | seconds | peak memory of its own, GB | with mapped files, GB |", "|---|---:|---:|---:|"]
    for name, row in result["methods"].items():
        lines.append(
            f"| {name} | {row['seconds']:.0f} | {row['peak_own_gigabytes']} | {row['peak_resident_gigabytes']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
