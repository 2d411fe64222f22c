"""What clean_corpus finds of planted faults, and how fast it is.

    python benchmarks/cleaning.py --input FILES

Part one: dilqur's tests plant copies, Turkish, boilerplate, personal data, benchmark questions and repetition into real
documents (tests/support/plant.py); clean_corpus runs on them once, as a user would, with a setting for each. Recall: the
planted that were dropped for the reason they were planted for, or of which nothing is left in the text. Precision: of what
a setting dropped or masked, these.
Part two: clean_corpus on FILES with one worker, near copies and all, ROUNDS times; the median of its CPU seconds by the text
it read.
Results go to benchmarks/results/cleaning.json.
"""

import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dilqur.common.constants import ROOT
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.pipeline.manifest import git_commit, hardware, read_manifest
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting

ROUNDS = 5  # of part two
sys.path.insert(0, str(ROOT / "tests" / "support"))
REASONS = {  # planted label → what clean_corpus calls it
    "exact_duplicate": {"exact_duplicate"}, "near_duplicate": {"near_duplicate"}, "digits_changed": {"near_duplicate"},
    "other_language": {"other_language"}, "benchmark": {"benchmark"},
    "repetition": {"repeated_lines", "repeated_ngrams"},
}  # fmt: skip


@dataclass(kw_only=True)
class CleaningSettings:
    input: list[str] = setting("text to measure the speed on")
    seed: int = setting("of what is planted", default=0)
    output: str = setting("where the JSON goes", default=str(ROOT / "benchmarks" / "results" / "cleaning.json"))


def clean(recipe, folder):
    """Run clean_corpus by a recipe; returns its CPU seconds."""
    before = os.times()
    command = [sys.executable, "data_tools/clean_corpus.py", "--config", recipe, "--output_dir", folder]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def planted_scores(folder, seed):
    """(documents, scores) of one run over the planted corpus; see `scores`."""
    from plant import BOILERPLATE_PATTERNS, FIN_PATTERN, PII, write

    records = write(folder, seed)
    recipe = {
        "input": [str(folder / "corpus.jsonl")],
        "text_field": "text",
        "dotted_i": True,
        "language": "az",
        "max_repeated_ngram_share": 0.5,
        "boilerplate_patterns": BOILERPLATE_PATTERNS,
        "boilerplate_files": [str(folder / "boilerplate.txt")],
        "benchmarks": [str(folder / "benchmark.jsonl")],
        "pii": dict.fromkeys(PII, "mask"),
        "pii_patterns": {"fin": FIN_PATTERN},
        "pii_region": "AZ",
        "near_duplicate_threshold": 0.65,
        "write_dropped": True,
    }
    (folder / "clean.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    clean(folder / "clean.yaml", folder / "out")
    texts, reasons = {}, {}
    for document in read(
        sorted(str(p) for kind in ("train", "dropped") for p in (folder / "out" / kind).glob("*.zst"))
    ):
        texts[document.record["id"]] = document.text
        reasons[document.record["id"]] = document.record.get("reason")
    counts = read_manifest(folder / "out")["result"]
    assert len(texts) == len(records) == counts["read"]
    done = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))["done"]
    return len(records), scores(records, texts, reasons, done)


def scores(records, texts, reasons, done):
    """{label: {"planted", "recall", "precision"}}. records: those of plant.py; texts: {id: what became of the text};
    reasons: {id: why it was dropped, or None}; done: {what was done to texts: how often}.

    Of a copy and its original one is to go, whichever. What two labels have the same reason for counts against both where
    neither was planted, and else for its own alone.
    """
    planted = collections.defaultdict(list)
    for record in records:
        if record["planted"]:
            planted[record["planted"]].append(record)
    found = {  # by label: how many of the planted, in documents or in values
        label: sum(any(reasons[i] in REASONS[label] for i in {r["id"], r.get("of", r["id"])}) for r in planted[label])
        if label in REASONS
        else sum(value not in texts[r["id"]] for r in planted[label] for value in r["values"])
        for label in planted
    }
    result = {}
    for label, of_label in planted.items():
        if label in REASONS:
            total = len(of_label)
            others = [other for other in found if other != label and REASONS.get(other) == REASONS[label]]
            hits = sum(reason in REASONS[label] for reason in reasons.values()) - sum(found[other] for other in others)
        else:
            total = sum(len(r["values"]) for r in of_label)
            hits = done.get("boilerplate_lines" if label == "boilerplate" else f"pii_{label}", 0)
        right = min(found[label], hits)  # a value that another kind's mask hides is gone, and none of this kind's hits
        result[label] = {
            "planted": len(of_label),
            "recall": round(found[label] / total, 4),
            "precision": round(right / hits, 4) if hits else 0.0,
        }
    return result


@program(CleaningSettings)
def main(settings):
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        (scratch / "planted").mkdir()
        documents, found = planted_scores(scratch / "planted", settings.seed)
        recipe = {
            "input": [str(Path(p).absolute()) for p in settings.input], "language": "az", "dotted_i": True, "num_proc": 1,
            "pii": {"email": "mask", "phone": "mask"}, "pii_region": "AZ", "near_duplicate_threshold": 0.65,
        }  # fmt: skip
        (scratch / "real.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        rounds = [clean(scratch / "real.yaml", scratch / f"real-{number}") for number in range(ROUNDS)]
        cpu = statistics.median(rounds)
        report = json.loads((scratch / "real-0" / "report.json").read_text(encoding="utf-8"))
        markdown = (scratch / "real-0" / "report.md").read_text(encoding="utf-8")
    size = sum(len(d.text.encode()) for d in read(expand(settings.input)))
    out = {
        "planted": {"documents": documents, "seed": settings.seed, "scores": found},
        "real": {
            "bytes_read": size, "cpu_seconds": [round(seconds, 2) for seconds in rounds], "mb_per_cpu_second": round(size / 1e6 / cpu, 2),
            "counts": report["counts"], "dropped": report["dropped"], "done": report["done"],
        },
        "command": " ".join(sys.argv), "hardware": hardware(), "git": git_commit(),
    }  # fmt: skip
    Path(settings.output).write_text(json.dumps(out, indent=1) + "\n")
    print(f"{documents:,} documents\n\n| planted | documents | recall | precision |\n|---|---:|---:|---:|")
    for label, score in found.items():
        print(f"| {label} | {score['planted']} | {score['recall']:.3f} | {score['precision']:.3f} |")
    print(
        f"\n{size / 1e6:.1f} MB in {cpu:.1f} CPU seconds: {out['real']['mb_per_cpu_second']} MB/s per core\n\n{markdown}"
    )


if __name__ == "__main__":
    main()
