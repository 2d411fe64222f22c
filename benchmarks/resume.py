"""From the start of loading to the first step: is a resume after a million steps as fast as one after ten?

    python benchmarks/resume.py --folder /tmp/resume

The real scripts/cpt.py's loop goes on from a checkpoint of step 10, and from the same state whose trainer.json says step 1,000,000, at
position 4,000,000 of a stream of 10⁹ tokens (sparse files: real sizes, no bytes on the disk). A run of a million steps has as many lines in
metrics.jsonl; the third row has none, to tell the two apart. In turn, each time in a process of its own that is forked after the imports;
seconds from its first line, and the parts of them. Writes benchmarks/resume.json and prints a Markdown table.
"""

import argparse
import json
import os
import runpy
import shutil
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

from dilqur.common.atomic import write_json
from dilqur.common.constants import ROOT

SAVED, FAR = 10, 10**6
LENGTH, BATCH = 256, 4
MODEL = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8192}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
ROWS = {"step 10": (SAVED, True), "step 1,000,000": (FAR, True), "the same without metrics.jsonl": (FAR, False)}
PARTS = ("until loading began", "loading the checkpoint", "metrics.jsonl", "the rest, with the first step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for 1 GB of test files; removed at the end", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # is the run, and writes its times there
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)  # train to SAVED and save
    arguments = parser.parse_args()
    if arguments.worker:
        return run(arguments.folder, arguments.worker, arguments.stop)
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import fork_launch

    fork_launch.import_everything()
    from dilqur.pipeline.manifest import git_commit, hardware

    def start(name, *flags):
        times = arguments.folder / "times.json"
        words = ["--folder", arguments.folder / name, "--worker", times, *flags]
        fork_launch.run("single", 1, words, arguments.folder / "log", program=__file__)
        return json.loads(times.read_text()) if times.exists() else None

    try:
        make_runs(arguments.folder, start)
        rows = {row: [] for row in ROWS}
        for number in range(arguments.rounds):
            for row in list(ROWS)[number % len(ROWS) :] + list(ROWS)[: number % len(ROWS)]:
                if not ROWS[row][1]:
                    (arguments.folder / row / "metrics.jsonl").unlink(missing_ok=True)
                rows[row].append(start(row))
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    result = {
        "command": f"python benchmarks/resume.py --folder FOLDER --rounds {arguments.rounds}",
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "hardware": hardware(),
        "config": MODEL,
        "seconds": rows,
    }
    write_json(arguments.output, result)
    print(table(result))
    return None


def make_runs(folder, start):
    """The three run folders; the first is trained, and the others made of it."""
    from reader import sparse

    from dilqur.checkpoint.format import publish, step_folder

    sparse(folder / "shards", [1 << 28] * 4)
    first = next(iter(ROWS))
    start(first, "--stop")
    saved = step_folder(folder / first / "checkpoints", SAVED)
    trainer = json.loads((saved / "trainer.json").read_text())
    line = (folder / first / "metrics.jsonl").read_text().splitlines()[-1]
    for row, (step, _) in list(ROWS.items())[1:]:
        part = folder / row / "checkpoints" / ".tmp"
        part.mkdir(parents=True)
        for file in saved.glob("rank-*"):
            shutil.copyfile(file, part / file.name)
        own = {k: v for k, v in trainer.items() if k not in ("version", "step", "world_size")}
        progress = {"position": step * BATCH, "tokens": step * BATCH * LENGTH, "optimizer_steps": step}
        publish(part, step_folder(part.parent, step), step, 1, {**own, **progress})
        with (folder / row / "metrics.jsonl").open("w") as file:
            file.writelines(line.replace(f'"step": {SAVED},', f'"step": {n},') + "\n" for n in range(1, step + 1))


def run(folder, times, stop):
    """Go on in `folder` with one step, and write when what was done; stop: train to SAVED instead."""
    import dilqur.training.loop
    import dilqur.training.metrics
    from dilqur.pipeline.settings_parser import parse
    from dilqur.pipeline.stage import Stage

    marks = {"began": time.perf_counter()}

    def marked(function, name):
        def wrapped(*words, **named):
            marks[f"{name} began"] = time.perf_counter()
            result = function(*words, **named)
            marks[f"{name} ended"] = time.perf_counter()
            return result

        return wrapped

    def first_step(metrics, step, **values):
        total = time.perf_counter() - marks["began"]
        parts = [
            marks["load began"] - marks["began"],
            marks["load ended"] - marks["load began"],
            marks["metrics ended"] - marks["metrics began"],
        ]
        write_json(times, {"step": step, "total": total, **dict(zip(PARTS, [*parts, total - sum(parts)], strict=True))})
        os._exit(0)

    cpt = runpy.run_path(str(ROOT / "scripts" / "cpt.py"))
    flags = ["--model_config", json.dumps(MODEL), "--datasets", f"{{path: {folder.parent}/shards}}"]
    flags += ["--max_length", LENGTH, "--global_batch_size", BATCH, "--per_device_train_batch_size", BATCH]
    flags += ["--max_steps", 2 * FAR, "--save_steps", 10**9, "--learning_rate", 1e-4, "--output_dir", folder]
    flags += ["--lr_scheduler_type", "constant", *(["--stop_at_step", SAVED] if stop else [])]
    settings = parse(cpt["CptSettings"], "", [str(flag) for flag in flags])
    if not stop:
        dilqur.training.loop.resume = marked(dilqur.training.loop.resume, "load")
        dilqur.training.metrics.Metrics.start = marked(dilqur.training.metrics.Metrics.start, "metrics")
        dilqur.training.metrics.Metrics.log = first_step
    model, _ = cpt["load_model"](settings)
    dilqur.training.loop.train(
        settings, Stage(settings, __file__), model, cpt["causal_loss"], lambda reader, folder: None
    )


def table(result):
    machine = result["hardware"]
    lines = [
        f"{machine['cpu']}, 1 thread; torch {result['packages']['torch']}; seconds, medians (ranges)",
        "",
        f"| resumed from | {' | '.join(('to the first step done', *PARTS))} |",
        f"|---|{'---:|' * (1 + len(PARTS))}",
    ]
    for row, runs in result["seconds"].items():
        columns = [[run[name] for run in runs] for name in ("total", *PARTS)]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
