"""Measures reading token shards: from a billion to a trillion tokens, against a permutation held in memory.

    python benchmarks/reader.py --folder /tmp/reader
    python benchmarks/reader.py --folder /tmp/reader --statistics

The large folders are sparse files: real headers, real sizes, no bytes on the disk. Writes benchmarks/results/reader.json and prints
a Markdown table. --statistics also runs the long checks of the order: every n up to 5,000, chi-square, worlds and workers.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from dilqur.common.atomic import write_json
from dilqur.data.batches import TokenSamples, training_batches
from dilqur.data.best_fit import place
from dilqur.data.sample_order import permute
from dilqur.data.token_shards import FORMAT, VERSION
from dilqur.pipeline.manifest import hardware

HERE = Path(__file__).parent
LENGTH, BATCH, GLOBAL_BATCH = 2048, 16, 224
SHARD = 1 << 28


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for 1 GB of test files; removed at the end")
    parser.add_argument("--statistics", action="store_true", help="the long checks of the order too")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # measures one folder in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        measure = measure_start if arguments.one.name != "real" else measure_from_disk
        return print(json.dumps(measure(arguments.one)))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    result = {
        "command": "python benchmarks/reader.py --folder FOLDER" + " --statistics" * arguments.statistics,
        "commit": git.stdout.strip() or None,
        "packages": {name: metadata.version(name) for name in ("numpy", "orjson", "torch")},
        "hardware": hardware(),
        "max_length": LENGTH,
        "batch": BATCH,
    }
    try:
        result["start"] = {}
        for name, shards in folders(arguments.folder):
            runs = [alone(arguments.folder, shards) for _ in range(9)]
            result["start"][name] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        result["steady"] = measure_steady(arguments.folder / "real")
        runs = [alone(arguments.folder, arguments.folder / "real") for _ in range(3)]
        result["from_disk"] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        result["best_fit"] = measure_best_fit()
        if arguments.statistics:
            result["statistics"] = check_order(arguments.folder / "real")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    write_json(HERE / "results" / "reader.json", result)
    print(table(result))
    return None


def alone(folder, shards):
    """What is measured of one folder, in a process of its own."""
    command = [sys.executable, __file__, "--folder", folder, "--one", shards]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


# -- folders ----------------------------------------------------------------------------------------------------------


def folders(where):
    """(name, folder) of each size: sparse files, a document a shard; the last one gigabyte of real ids."""
    sizes = {
        "10⁹ tokens, 4 shards": [SHARD] * 3 + [10**9 - 3 * SHARD],
        "10¹² tokens, 3,726 shards": [SHARD] * (10**12 // SHARD) + [10**12 % SHARD],
        "10¹² tokens, one shard": [10**12],
    }
    made = [(name, sparse(where / str(number), tokens)) for number, (name, tokens) in enumerate(sizes.items())]
    real = sparse(where / "real", [SHARD])
    ids = np.memmap(real / "tokens-00000.npy", np.int32, "r+", offset=128)
    ids[:] = np.random.default_rng(0).integers(0, 100_000, SHARD, dtype=np.int32)
    ids.flush()
    return made


def sparse(folder, sizes):
    folder.mkdir(parents=True)
    entries = []
    for number, tokens in enumerate(sizes):
        files = {}
        for kind, dtype, count in (("tokens", "<i4", tokens), ("offsets", "<i8", 2)):
            path = folder / f"{kind}-{number:05d}.npy"
            with path.open("wb") as file:
                header = {"descr": dtype, "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, header)
                if kind == "offsets":
                    file.write(np.array([0, tokens], np.int64).data)
                else:
                    file.truncate(file.tell() + 4 * count)
            files[path.name] = {"bytes": path.stat().st_size, "xxh3": "0" * 16}
        entries.append({"documents": 1, "tokens": tokens, "files": files})
    total = {"documents": len(sizes), "tokens": sum(sizes), "utf8_bytes": 3 * sum(sizes)}
    rule = {"tokenizer_sha256": "0" * 64, "vocab_size": 100_000, "eos_id": 1}
    write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION, "shards": entries, **total, **rule})
    return folder


# -- start, resume, memory --------------------------------------------------------------------------------------------


def measure_start(folder):
    """CPU milliseconds and kilobytes, in a process that has read nothing before."""
    started = time.process_time()
    samples = TokenSamples([{"path": folder}], LENGTH, seed=42)
    opened = time.process_time()
    samples.batch(range(BATCH))
    first = time.process_time()
    TokenSamples([{"path": folder}], LENGTH, seed=42).batch(range(BATCH))  # whatever numpy does once is done
    again = TokenSamples([{"path": folder}], LENGTH, seed=42)
    before = time.process_time()
    again.batch(range(10**6 * GLOBAL_BATCH, 10**6 * GLOBAL_BATCH + BATCH))
    resumed = time.process_time()
    checked = time.process_time()
    samples.shards[0].check_files()
    checked = time.process_time() - checked
    anonymous = [rss_anon()]
    for part in range(2):
        for position in range(part * 20_000, (part + 1) * 20_000, BATCH):
            samples.batch(range(position, position + BATCH))
        anonymous.append(rss_anon())
    return {
        "construct_ms": (opened - started) * 1e3,
        "first_batch_ms": (first - started) * 1e3,
        "resume_at_step_1e6_ms": (resumed - before) * 1e3,
        "check_files_ms": checked * 1e3,
        "rss_anon_growth_first_20k_samples_kb": anonymous[1] - anonymous[0],
        "rss_anon_growth_next_20k_samples_kb": anonymous[2] - anonymous[1],
    }


def rss_anon():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1])


# -- steady -----------------------------------------------------------------------------------------------------------


def measure_steady(folder, rounds=15, samples_a_round=4096):
    """Samples per CPU-second, each way in turn in one process, every page in memory and mapped."""
    flat = np.memmap(folder / "tokens-00000.npy", np.int32, "r", offset=128)
    permutation = np.random.default_rng(0).permutation(SHARD // LENGTH - 1)
    plain = TokenSamples([{"path": folder}], LENGTH, seed=42)
    bounded = TokenSamples([{"path": folder}], LENGTH, seed=42, document_boundaries=True)

    def baseline(first, batch):
        """The fastest fair form: one array a batch, of which ids and labels are views."""
        chosen = permutation[first : first + batch]
        tokens = np.stack([flat[i * LENGTH : i * LENGTH + LENGTH + 1].astype(np.int64) for i in chosen])
        return tokens[:, :-1], tokens[:, 1:]

    def baseline_two_arrays(first, batch):
        """As nanoGPT does: ids and labels are arrays of their own."""
        chosen = permutation[first : first + batch]
        return tuple(
            np.stack([flat[i * LENGTH + k : i * LENGTH + LENGTH + k].astype(np.int64) for i in chosen]) for k in (0, 1)
        )

    ways = {
        "permutation in memory, np.memmap": baseline,
        "the same, labels an array of their own": baseline_two_arrays,
        "dilqur": lambda first, batch: plain.batch(range(first, first + batch)),
        "dilqur with position_ids": lambda first, batch: bounded.batch(range(first, first + batch)),
    }
    out = {}
    for tokens in (flat, *(samples.shards[0].read(0, SHARD) for samples in (plain, bounded))):
        tokens.max()  # from here on no page fault on any side
    for batch in (8, 16, 64):
        rates = {name: [] for name in ways}
        for number in range(rounds):
            for name, way in ways.items():
                first, started = number * samples_a_round, time.process_time()
                for at in range(first, first + samples_a_round, batch):
                    way(at, batch)
                rates[name].append(samples_a_round / (time.process_time() - started))
        out[f"batch {batch}"] = {name: round(np.median(r)) for name, r in rates.items()}
    return out


def measure_from_disk(folder, samples_each=4096):
    """Samples per second of the clock whose pages have to be fetched, in batches of 16."""
    file, out = folder / "tokens-00000.npy", {}
    permutation = np.random.default_rng(0).permutation(SHARD // LENGTH - 1)
    flat = np.memmap(file, np.int32, "r", offset=128)

    def baseline(first):
        chosen = permutation[first : first + BATCH]
        return np.stack([flat[i * LENGTH : i * LENGTH + LENGTH + 1].astype(np.int64) for i in chosen])

    samples = TokenSamples([{"path": folder}], LENGTH, seed=42)
    ways = {
        "permutation in memory, np.memmap": baseline,
        "dilqur": lambda first: samples.batch(range(first, first + BATCH)),
    }
    for name, way in ways.items():  # no page of the file is mapped yet: they can be forgotten
        forget(file)
        started = time.perf_counter()
        for first in range(0, samples_each, BATCH):
            way(first)
        out[name] = samples_each / (time.perf_counter() - started)
        flat = None  # its pages can be forgotten again
    return out


def forget(path):
    """Take a file's pages out of memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure_best_fit():
    out = {}
    for median, room in ((300, 2048), (300, 8192), (20, 2048), (1500, 2048)):
        lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(median), 1.3, 4_000_000).astype(np.int64))
        started = time.process_time()
        _, samples = place(np.concatenate([[0], np.cumsum(lengths)]), room)
        seconds = time.process_time() - started
        ends = np.cumsum(lengths)
        out[f"median {median} tokens, max_length {room}"] = {
            "million_documents_per_cpu_second": round(4 / seconds, 2),
            "padding": 1 - int(lengths.sum()) / ((len(samples) - 1) * room),
            "documents_cut": float((lengths > room).mean()),
            "documents_cut_by_concat": float(((ends - lengths) // room != (ends - 1) // room).mean()),
        }
    return out


# -- the order --------------------------------------------------------------------------------------------------------


def check_order(folder):
    """Fails where the order is not what it says; returns what was looked at."""
    for n in range(1, 5001):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=n)), np.arange(n)), n
    random = np.random.default_rng(1)
    for n in (2 ** random.uniform(20, 52, 200)).astype(np.int64).tolist():
        begin = int(random.integers(0, max(1, n - 10**5)))
        index = np.arange(begin, min(n, begin + 10**5))
        places = permute(index, n, seed=3, stream=1, epoch=5)
        assert places.min() >= 0 and places.max() < n and len(np.unique(places)) == len(index), n
    chi_square = {n: round(deviations(n, seeds=20_000), 2) for n in (*range(2, 17), 24, 31, 48, 64, 100)}
    # below nine samples so many seeds do see a difference: of five, a place is taken in 18.9 to 21.1 % instead of 20
    assert max(map(abs, chi_square.values())) < 5, chi_square
    n, serial, across = 10**6, 0, 0
    orders = [permute(np.arange(n), n, seed=5, stream=1, epoch=epoch) for epoch in range(8)]
    for i, one in enumerate(orders):
        serial = max(serial, abs(np.corrcoef(one[:-1], one[1:])[0, 1]))
        across = max([across, *(abs(np.corrcoef(one, other)[0, 1]) for other in orders[:i])])
    assert max(serial, across) < 5 / math.sqrt(n)
    samples, streams = TokenSamples([{"path": folder}], LENGTH, seed=42), set()
    for world in (1, 2, 3, 8):
        for workers in range(5):
            ranks = [list(training_batches(samples, 7, 3, 24 // world, 1, r, world, workers)) for r in range(world)]
            streams.add(b"".join(ranks[r][s][0]["input_ids"].numpy().tobytes() for s in range(3) for r in range(world)))
    assert len(streams) == 1
    return {
        "bijection_every_n_up_to": 5000,
        "injective_on_100000_neighbours_at_random_n_up_to_2^52": 200,
        "chi_square_of_20000_seeds_standard_deviations_by_n": chi_square,
        "serial_correlation_1e6_worst": serial,
        "correlation_across_8_epochs_1e6_worst": across,
        "same_stream_for_worlds": [1, 2, 3, 8],
        "same_stream_for_workers": [0, 1, 2, 3, 4],
    }


def deviations(n, seeds):
    """How far the places of n samples under many seeds are from all equally likely, in standard deviations.

    A table of permutations has fixed sums of rows and columns: its chi-square times (n - 1) / n has (n - 1)² degrees of
    freedom; the cube root makes a normal distribution of it (Wilson and Hilferty 1931).
    """
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    freedom = (n - 1) ** 2
    chi_square = ((counts - seeds / n) ** 2 / (seeds / n)).sum() * (n - 1) / n
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def table(result):
    machine = result["hardware"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, max_length {LENGTH}, batch {BATCH}", ""]
    lines += [
        "| | first batch, CPU ms | resume at step 10⁶, CPU ms | check of all files, CPU ms | RssAnon, kB over 20,000 samples |"
    ]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, row in result["start"].items():
        growth = (
            f"{row['rss_anon_growth_first_20k_samples_kb']:.0f}, then {row['rss_anon_growth_next_20k_samples_kb']:.0f}"
        )
        figures = f"{row['first_batch_ms']:.1f} | {row['resume_at_step_1e6_ms']:.1f} | {row['check_files_ms']:.1f}"
        lines.append(f"| {name} | {figures} | {growth} |")
    batches = result["steady"]
    lines += ["", "| samples / CPU-second | " + " | ".join(batches) + " |", "|---|" + "---:|" * len(batches)]
    for name in batches["batch 16"]:
        lines.append(f"| {name} | " + " | ".join(f"{rates[name]:,}" for rates in batches.values()) + " |")
    lines += ["", "| samples / second from the disk | batch 16 |", "|---|---:|"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in result["from_disk"].items()]
    lines += [
        "",
        "| best_fit, log-normal lengths | M documents / CPU-s | padding | cut | cut by concat |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["best_fit"].items():
        shares = f"{row['padding']:.4%} | {row['documents_cut']:.1%} | {row['documents_cut_by_concat']:.1%}"
        lines.append(f"| {name} | {row['million_documents_per_cpu_second']} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
