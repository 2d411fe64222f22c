"""How fast pack_mmap is beside the bare tokenizer and beside other packers, and what memory it takes.

    python benchmarks/packing.py --input FILES --tokenizer TOKENIZER [...] [--other_packers true]
    python benchmarks/packing.py --input FILES --tokenizer TOKENIZER --memory_gb 0.1 1 5

A round runs every row once, interleaved; a row's figure is the median of its rounds. CPU seconds are those of the whole
process tree, less those of the same program on a single short document (imports, loading the tokenizer). The bare
tokenizer is `encode_batch_fast` of HF tokenizers on texts in memory, one thread, its results thrown away.
Everything but the bare tokenizer reads files and writes files. Results go to benchmarks/results/packing.json.

Other packers: datatrove's DocumentTokenizer (pip install datatrove) and nanoGPT's way (tiktoken, one uint16/uint32 memmap).
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from peak_memory import run_and_watch

from dilqur.common.constants import ROOT
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.pipeline.manifest import git_commit, hardware
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting

ROUNDS = 5


@dataclass(kw_only=True)
class BenchmarkSettings:
    input: list[str] = setting("text to pack")
    tokenizer: list[str] = setting("folders with a tokenizer.json, or such files")
    rounds: int = setting("times each row is run", default=ROUNDS)
    other_packers: bool = setting("rows for datatrove and nanoGPT's way", default=False)
    repeat: int = setting("times the text comes; more than once flatters engines that remember words", default=1)
    workers: int | None = setting("a row with so many workers, timed by the clock", default=None)
    memory_gb: list[float] | None = setting("instead: peak memory at these sizes of text", default=None)
    output: str = setting("where the JSON goes", default=str(ROOT / "benchmarks" / "results" / "packing.json"))


BARE = """
import sys, time, json
from dilqur.data.documents import read
from dilqur.common.paths import expand
from dilqur.tokenizer.text_tokenizer import TextTokenizer
texts = [d.text for d in read(expand(sys.argv[2:]))]
encode = TextTokenizer(sys.argv[1]).backend.encode_batch_fast
started = time.process_time()
for i in range(0, len(texts), 64):
    encode(texts[i : i + 64], add_special_tokens=False)
print(time.process_time() - started)
"""

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
tokenizer, out, folder = sys.argv[1:4]
packer = DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=False)
LocalPipelineExecutor([JsonlReader(folder), packer], tasks=1, workers=1, logging_dir=out + "/logs").run()
"""

NANOGPT = """
import sys, json
import numpy as np
from dilqur.data.documents import read
from dilqur.common.paths import expand
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.tokenizer.engines import _ranks, split_pattern
import tiktoken
tokenizer = TextTokenizer(sys.argv[1])
spec = json.loads(tokenizer.backend.to_str())
encoding = tiktoken.Encoding("x", pat_str=split_pattern(spec), mergeable_ranks=_ranks(spec), special_tokens={})
parts = []
for document in read(expand(sys.argv[3:])):
    ids = encoding.encode_ordinary(document.text)
    ids.append(tokenizer.eos_id)
    parts.append(np.array(ids, np.uint32))
total = sum(map(len, parts))
out = np.memmap(sys.argv[2] + "/train.bin", dtype=np.uint32, mode="w+", shape=(total,))
at = 0
for part in parts:
    out[at : at + len(part)] = part
    at += len(part)
out.flush()
"""


def run(command, **environment):
    """Run it; returns (seconds by the clock, standard output)."""
    env = {
        **os.environ,
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]}\n{out}\n{err}")
    return seconds, out


def cpu_of(command, **environment):
    """(CPU seconds, clock seconds, output) of a command and of the processes that it waited for."""
    before = os.times()
    seconds, out = run(command, **environment)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, seconds, out


class Row:
    """command(out folder, input files) → a command line."""

    def __init__(self, name, command, prints_seconds=False, **environment):
        self.name, self.command, self.prints_seconds, self.environment = name, command, prints_seconds, environment
        self.cpu, self.clock, self.start = [], [], None

    def once(self, files, tiny, scratch):
        if self.start is None and not self.prints_seconds:
            self.start = sorted(self._measure(tiny, scratch) for _ in range(3))[1]
        cpu, clock = self._measure(files, scratch)
        start_cpu, start_clock = self.start or (0, 0)
        self.cpu.append(max(1e-3, cpu - start_cpu))
        self.clock.append(max(1e-3, clock - start_clock))

    def _measure(self, files, scratch):
        out = Path(tempfile.mkdtemp(dir=scratch))
        cpu, clock, printed = cpu_of(self.command(out / "out", files), **self.environment)
        shutil.rmtree(out)
        return (float(printed), float(printed)) if self.prints_seconds else (cpu, clock)


def pack_row(tokenizer, engine, workers=1):
    def command(out, files):
        flags = ["--tokenizer", tokenizer, "--output_dir", out, "--engine", engine, "--num_proc", workers]
        return [sys.executable, "data_tools/pack_mmap.py", "--input", *files, *map(str, flags)]

    return Row(f"pack_mmap, {engine}" + f", {workers} workers" * (workers > 1), command)


def rows_for(tokenizer, settings, plain):
    rows = [
        Row(
            "bare encode_batch_fast",
            lambda out, files: [sys.executable, "-c", BARE, tokenizer, *files],
            prints_seconds=True,
        )
    ]
    rows += [pack_row(tokenizer, engine) for engine in ("tokenizers", "tiktoken")]
    if settings.workers:
        rows += [pack_row(tokenizer, engine, settings.workers) for engine in ("tokenizers", "tiktoken")]
    if settings.other_packers:

        def nanogpt(out, files):
            out.mkdir()
            return [sys.executable, "-c", NANOGPT, tokenizer, str(out), *files]

        def datatrove(out, files):
            return [sys.executable, "-c", DATATROVE, plain, str(out), str(Path(files[0]).parent)]

        rows += [Row("nanoGPT's way, tiktoken", nanogpt), Row("datatrove DocumentTokenizer", datatrove)]
    return rows


def speed(settings, scratch):
    texts = [d.text for d in read(expand(settings.input))] * settings.repeat
    size = sum(len(t.encode()) for t in texts)
    files, tiny = scratch / "text" / "all.jsonl", scratch / "tiny" / "tiny.jsonl"
    for path, chosen in ((files, texts), (tiny, ["salam"])):
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in chosen), encoding="utf-8")
    out = []
    for path in settings.tokenizer:
        from dilqur.tokenizer.text_tokenizer import TextTokenizer

        tokenizer = TextTokenizer(path)
        plain = scratch / f"tokenizer-{len(out)}.json"  # datatrove reads a plain tokenizer.json
        plain.write_bytes(tokenizer.content)
        rows = rows_for(path, settings, str(plain))
        for number in range(settings.rounds):
            for row in rows:
                print(f"{path}: round {number + 1} of {settings.rounds}: {row.name}", file=sys.stderr, flush=True)
                row.once([str(files)], [str(tiny)], scratch)
        bare = statistics.median(rows[0].cpu)
        single = {row.name: statistics.median(row.clock) for row in rows}
        for row in rows:
            cpu, clock = statistics.median(row.cpu), statistics.median(row.clock)
            one = single.get(row.name.split(f", {settings.workers} workers")[0])
            out.append(
                {
                    "tokenizer": str(path),
                    "row": row.name,
                    "cpu_seconds": [round(s, 3) for s in row.cpu],
                    "clock_seconds": [round(s, 3) for s in row.clock],
                    "mb_per_cpu_second": round(size / 1e6 / cpu, 2),
                    "against_bare": round(bare / cpu, 3),
                    "clock_against_one_worker": round(one / clock, 3) if "workers" in row.name else None,
                }
            )
    return {"text_bytes": size, "repeat": settings.repeat, "documents": len(texts), "rows": out}


def memory(settings, scratch):
    """Peak of the summed proportional set sizes (PSS) of pack_mmap and its workers, at several sizes of text."""
    texts = [json.dumps({"text": d.text}, ensure_ascii=False) + "\n" for d in read(expand(settings.input))]
    data = "".join(texts).encode()
    out = []
    for gigabytes in settings.memory_gb:
        folder = scratch / f"{gigabytes}"
        folder.mkdir()
        for number in range(max(1, round(gigabytes * 1e9 / 100e6))):
            with (folder / f"{number:04d}.jsonl").open("wb") as file:
                for _ in range(max(1, round(min(gigabytes * 1e9, 100e6) / len(data)))):
                    file.write(data)
        row = pack_row(settings.tokenizer[0], "auto", settings.workers or 2)
        command = row.command(scratch / "packed", [str(folder)])
        peak, seconds = run_and_watch(command, ROOT)
        size = sum(p.stat().st_size for p in folder.iterdir())
        out.append(
            {"gb": round(size / 1e9, 2), "peak_mb": round(peak / 1e6), "mb_per_second": round(size / 1e6 / seconds, 2)}
        )
        print(out[-1], file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(scratch / "packed")
    return {"memory": out, "workers": settings.workers or 2}


def table(measured):
    lines = []
    if "rows" in measured:
        lines = [
            "| tokenizer | packer | MB a CPU second | against the bare tokenizer | clock against one worker |",
            "|---|---|---:|---:|---:|",
        ]
        for row in measured["rows"]:
            clock = row["clock_against_one_worker"]
            lines.append(
                f"| {Path(row['tokenizer']).name.split('.')[0]} | {row['row']} | {row['mb_per_cpu_second']:.2f} "
                f"| {row['against_bare']:.2f} | {f'{clock:.2f}' if clock else ''} |"
            )
    if "memory" in measured:
        lines += ["", "| text (GB) | peak memory (MB) | MB/s |", "|---:|---:|---:|"]
        lines += [f"| {m['gb']} | {m['peak_mb']} | {m['mb_per_second']} |" for m in measured["memory"]]
    return "\n".join(lines)


@program(BenchmarkSettings)
def main(settings):
    with tempfile.TemporaryDirectory() as scratch:
        measured = (memory if settings.memory_gb else speed)(settings, Path(scratch))
    packages = {}
    for name in ("tokenizers", "tiktoken", "numpy", "orjson", "datatrove"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    path = Path(settings.output)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "command": " ".join(sys.argv),
        "hardware": hardware(),
        "packages": packages,
        "git": git_commit(),
        "python": platform.python_version(),
    }
    path.write_text(
        json.dumps({**earlier, **measured, "speed" if "rows" in measured else "memory_run": about}, indent=1) + "\n"
    )
    print(table(measured))


if __name__ == "__main__":
    main()
