"""Measures dilqur/cleaning/near_duplicates.py on a made corpus with known near-duplicate copies.

    python benchmarks/near_duplicates.py --corpus data/az --mb 200
    python benchmarks/near_duplicates.py --corpus data/az --mb 5000 --processes 2 --output benchmarks/near_duplicates.json

A document is some sentences of real text in random order, 2 kB in the mean; one in ten is a copy of an earlier one
with 2 to 5 % of the words and every digit changed. Each is a function of its number, so nothing but signatures is stored, and
what is a copy of what can be told afterwards. Recall: copies in the cluster of their original. Precision: documents that
were merged with the original they are a copy of, or with another copy of it.
"""

import argparse
import functools
import gzip
import json
import multiprocessing
import random
import re
import resource
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

from dilqur.cleaning import near_duplicates
from dilqur.common.constants import ROOT
from dilqur.pipeline.manifest import hardware

MEAN_BYTES = 2000  # 100 GB in 50 million documents
FILE_DOCUMENTS = 10_000
COPIES = 0.1
MILLION = 1_000_000


@functools.cache
def sentences(folder):
    """Sentences of 4 to 40 words, of all files in `folder`: two documents that share a longer one would be alike."""
    found = []
    for file in sorted(Path(folder).glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line).get("text", "") for line in lines]
        found += [s for text in texts for s in re.split(r"(?<=[.!?])\s+|\n", text) if 4 <= len(s.split()) <= 40]
    return found


def origin(number):
    """The number of the document that `number` is a copy of; its own if it is none."""
    while number and (rng := random.Random(number)).random() < COPIES:
        number = rng.randrange(number)
    return number


def document(number, folder):
    rng = random.Random(number)
    rng.random()  # decided whether it is a copy
    if number == (first := origin(number)):
        parts, size, wanted = [], 0, MEAN_BYTES * rng.uniform(0.25, 1.75)
        while size < wanted:
            parts.append(rng.choice(sentences(folder)))
            size += len(parts[-1].encode("utf-8")) + 1
        return " ".join(parts)
    words = document(first, folder).split(" ")
    for place in rng.sample(range(len(words)), max(1, round(len(words) * rng.uniform(0.02, 0.05)))):
        words[place] = rng.choice(rng.choice(sentences(folder)).split())
    return re.sub(r"\d", lambda _: rng.choice("0123456789"), " ".join(words))


def sign(begin, end, folder, file):
    """Write the signatures of documents [begin, end). Returns (bytes of text, CPU seconds to sign them, peak bytes)."""
    texts = [document(number, folder) for number in range(begin, end)]
    near_duplicates.signatures(texts[:1])  # its tables are made once a process
    started = time.process_time()
    signed = near_duplicates.signatures(texts)
    seconds = time.process_time() - started
    np.save(file, signed)
    return sum(len(text.encode("utf-8")) for text in texts), seconds, peak()


def cluster(files, folder, memory_gb):
    """Returns (seconds, CPU seconds, peak bytes)."""
    started, cpu = time.perf_counter(), time.process_time()
    near_duplicates.cluster(files, folder, memory_gb=memory_gb)
    return time.perf_counter() - started, time.process_time() - cpu, peak()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(mb, processes, corpus, memory_gb, folder):
    documents = round(mb * 1e6 / MEAN_BYTES)
    fresh = multiprocessing.get_context("spawn")
    ranges = [(b, min(b + FILE_DOCUMENTS, documents)) for b in range(0, documents, FILE_DOCUMENTS)]
    files = [str(Path(folder) / f"{begin:010d}.npy") for begin, _ in ranges]
    started = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=fresh) as pool:
        jobs = [pool.submit(sign, *span, corpus, file) for span, file in zip(ranges, files, strict=True)]
        sizes, seconds, peaks = zip(*(job.result() for job in jobs), strict=True)
    signed = time.perf_counter() - started
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        wall, cpu, cluster_peak = pool.submit(cluster, files, folder, memory_gb).result()

    first = np.load(Path(folder) / "cluster_first.npy")
    origins = np.fromiter(map(origin, range(documents)), np.int64, documents)
    copies = origins != np.arange(documents)
    merged = first != np.arange(documents)
    return {
        "documents": documents,
        "text_bytes": sum(sizes),
        "copies": int(copies.sum()),
        "merged": int(merged.sum()),
        "recall": float((first[copies] == first[origins[copies]]).mean()),
        "precision": float((origins[merged] == origins[first[merged]]).mean()),
        "sign_mb_per_cpu_second": sum(sizes) / 1e6 / sum(seconds),
        "sign_seconds_with_making_the_text": signed,
        "sign_peak_bytes": max(peaks),
        "signature_bytes": near_duplicates.SIGNATURE.itemsize,
        "disk_bytes": sum(Path(file).stat().st_size for file in files),
        "cluster_seconds": wall,
        "cluster_cpu_seconds": cpu,
        "cluster_peak_bytes": cluster_peak,
        "cluster_seconds_for_50_million": wall * 50 * MILLION / documents,
    }


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200, help="text to make, in MB")
    parser.add_argument("--processes", type=int, default=1, help="that sign")
    parser.add_argument("--corpus", required=True, help="folder of *.jsonl.gz: documents are made of its sentences")
    parser.add_argument("--memory_gb", type=float, default=4.0, help="for clustering")
    parser.add_argument("--output", help="write the result as JSON to this file, too")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings.mb, settings.processes, settings.corpus, settings.memory_gb, folder)
    whole = {
        "benchmark": "near_duplicates",
        "arguments": {"mb": settings.mb, "processes": settings.processes, "memory_gb": settings.memory_gb},
        "parameters": {
            "words": near_duplicates.WORDS,
            "permutations": near_duplicates.PERMUTATIONS,
            "threshold": near_duplicates.THRESHOLD,
            "rows_and_bands": near_duplicates.rows_and_bands(near_duplicates.THRESHOLD),
            "version": near_duplicates.VERSION,
        },
        "result": result,
        "hardware": hardware(),
        "packages": {name: metadata.version(name) for name in ("numpy", "xxhash")},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "dilqur", "benchmarks/near_duplicates.py")),
    }
    text = json.dumps(whole, indent=1)
    print(text)
    if settings.output:
        Path(settings.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
