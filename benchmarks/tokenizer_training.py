"""Speed and memory of data_tools/train_tokenizer.py on made text of several sizes, and what a sweep costs beside its largest size.

    python benchmarks/tokenizer_training.py --input data/az --gigabytes 1
    python benchmarks/tokenizer_training.py --input data/az --gigabytes 1 10 --scratch /scratch/me

The text is sentences of the input in random order; one word in fifty has a letter changed, so that different words become ever
more, as they do in text from the web. Memory is the peak of the program and its workers together. Results go to
benchmarks/tokenizer_training.json.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from peak_memory import run_and_watch

from dilqur.common.atomic import write_json
from dilqur.common.constants import ROOT
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.pipeline.manifest import git_commit, hardware, read_manifest

FILE_BYTES = 100_000_000
SIZES = (32000, 50048, 64000, 80000, 100096)


def write_text(folder, inputs, gigabytes):
    """Files of about FILE_BYTES of JSON lines in `folder`."""
    texts = [document.text for document in read(expand(inputs))]
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?])\s+|\n", text) if 4 <= len(s.split()) <= 40]
    letters = sorted({letter for s in sentences[:1000] for letter in s if letter.isalpha()})
    draw, left = random.Random(1), gigabytes * 1e9
    folder.mkdir()
    for number in range(round(max(1, gigabytes * 1e9 / FILE_BYTES))):
        size = 0
        with (folder / f"text-{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while size < min(FILE_BYTES, left):
                words = " ".join(draw.choices(sentences, k=20)).split(" ")
                for at in range(draw.randrange(50), len(words), 50):
                    cut = draw.randrange(len(words[at]) + 1)
                    words[at] = words[at][:cut] + draw.choice(letters) + words[at][cut + 1 :]
                line = json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n"
                size += len(line.encode("utf-8"))
                file.write(line)


def measure(text, out, *words):
    command = [sys.executable, "data_tools/train_tokenizer.py", "--input", str(text), "--output_dir", str(out), *words]
    peak, seconds = run_and_watch(list(map(str, command)), ROOT)
    result = read_manifest(out)["result"]
    (source,) = result["sources"].values()
    shutil.rmtree(out)
    return {
        "gigabytes": round(result["utf8_bytes"] / 1e9, 3),
        "counted": round(source["probability"], 4),
        "words": source["words"],
        "distinct_words": source["distinct_words"],
        "peak_gb": round(peak / 1e9, 2),
        "seconds": round(seconds, 1),
        "mb_per_second": round(result["utf8_bytes"] / 1e6 / seconds, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[1.0])
    parser.add_argument("--rounds", type=int, default=3, help="of the largest size and the sweep in turn")
    parser.add_argument("--scratch", help="a folder with room for the largest text")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "tokenizer_training.json"))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        scratch = Path(scratch)
        for gigabytes in arguments.gigabytes:
            write_text(scratch / "text", arguments.input, gigabytes)
            rows.append(measure(scratch / "text", scratch / "out", "--vocab_size", SIZES[-1]))
            print(rows[-1], flush=True)
            shutil.rmtree(scratch / "text")
        text, sweep = arguments.input[0], []
        for _ in range(arguments.rounds):  # interleaved: what else the machine does falls on both
            one = measure_seconds(text, scratch / "out", "--vocab_size", SIZES[-1])
            all_ = measure_seconds(text, scratch / "out", "--vocab_sizes", *SIZES)
            sweep.append({"largest_seconds": one, "sweep_seconds": all_, "ratio": round(all_ / one, 3)})
            print(sweep[-1], flush=True)
    about = {"git": git_commit(), "packages": {"tokenizers": metadata.version("tokenizers")}, "hardware": hardware()}
    write_json(Path(arguments.output), {**about, "command": " ".join(sys.argv), "text": rows, "sweep": sweep})


def measure_seconds(text, out, *words):
    command = [sys.executable, "data_tools/train_tokenizer.py", "--input", text, "--output_dir", out, *words]
    _, seconds = run_and_watch(list(map(str, command)), ROOT)
    shutil.rmtree(out)
    return round(seconds, 2)


if __name__ == "__main__":
    main()
