"""What clean_corpus finds of planted faults, and how fast it is.

    python benchmarks/cleaning.py --input FILES

Part one: dilqur's tests plant copies, Turkish, boilerplate, personal data, benchmark questions and repetition into real
documents (tests/faults/plant.py); clean_corpus runs on them once, as a user would, with a setting for each. Recall: the
planted that were dropped or masked. Precision: of what a setting dropped or masked, the planted.
Part two: clean_corpus on FILES with one worker, near copies and all; its CPU seconds by the text it read.
Results go to benchmarks/cleaning.json.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dilqur.documents import read
from dilqur.errors import program
from dilqur.recipe import parse
from dilqur.stage import _git, hardware, read_manifest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "faults"))
REASON = {  # planted label → what clean_corpus calls it
    "exact_duplicate": "exact_duplicate", "near_duplicate": "near_duplicate", "digits_changed": "near_duplicate",
    "other_language": "other_language", "benchmark": "benchmark",
}  # fmt: skip


@dataclass(kw_only=True)
class CleaningSettings:
    input: list[str] = field(metadata={"help": "text to measure the speed on"})
    seed: int = field(default=0, metadata={"help": "of what is planted"})
    output: str = field(default=str(ROOT / "benchmarks" / "cleaning.json"), metadata={"help": "where the JSON goes"})


def clean(recipe, folder):
    """Run clean_corpus by a recipe; returns its CPU seconds."""
    before = os.times()
    command = [sys.executable, "data_tools/clean_corpus.py", "--config", recipe, "--output_dir", folder]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def planted_scores(folder, seed):
    """{label: {"planted", "recall", "precision"}} of one run over the planted corpus."""
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
    kept = {d.record["id"]: d.text for d in read(sorted(map(str, (folder / "out" / "train").glob("*.zst"))))}
    dropped = {
        d.record["id"]: d.record["reason"] for d in read(sorted(map(str, (folder / "out" / "dropped").glob("*.zst"))))
    }
    counts = read_manifest(folder / "out")["result"]
    assert len(kept) + len(dropped) == len(records) == counts["read"]
    done = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))["done"]

    originals = collections.defaultdict(set)  # an original and its copies: whichever of them goes is right
    for record in records:
        if "of" in record:
            originals[record["of"]].add(record["planted"])
    scores = {}
    for label in dict.fromkeys(record["planted"] for record in records if record["planted"]):
        planted = [record for record in records if record["planted"] == label]
        if label in PII or label == "boilerplate":
            found = [
                r for r in planted if r["id"] in dropped or not any(value in kept[r["id"]] for value in r["values"])
            ]
            hits = done.get("boilerplate_lines" if label == "boilerplate" else f"pii_{label}", 0)
            precision = min(1.0, sum(len(r["values"]) for r in planted) / hits) if hits else 0.0
        elif "of" in planted[0]:
            found = [r for r in planted if r["id"] in dropped or r["of"] in dropped]
            same = [i for i, reason in dropped.items() if reason in ("exact_duplicate", "near_duplicate")]
            right = [i for i in same if i in originals or records_by_id(records)[i].get("of") is not None]
            precision = len(right) / max(1, len(same))
        else:
            found = [r for r in planted if r["id"] in dropped]
            reasons = {REASON.get(label)} if label in REASON else {"repeated_lines", "repeated_ngrams"}
            same = [i for i, reason in dropped.items() if reason in reasons]
            right = [i for i in same if records_by_id(records)[i]["planted"] == label]
            precision = len(right) / max(1, len(same))
        scores[label] = {
            "planted": len(planted),
            "recall": round(len(found) / len(planted), 4),
            "precision": round(precision, 4),
        }
    return len(records), scores


def records_by_id(records):
    return {record["id"]: record for record in records}


@program
def main():
    settings = parse(CleaningSettings, __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        (scratch / "planted").mkdir()
        documents, scores = planted_scores(scratch / "planted", settings.seed)
        recipe = {
            "input": [str(Path(p).absolute()) for p in settings.input], "language": "az", "dotted_i": True, "num_proc": 1,
            "pii": {"email": "mask", "phone": "mask"}, "pii_region": "AZ", "near_duplicate_threshold": 0.65,
        }  # fmt: skip
        (scratch / "real.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        cpu = clean(scratch / "real.yaml", scratch / "real")
        report = json.loads((scratch / "real" / "report.json").read_text(encoding="utf-8"))
        markdown = (scratch / "real" / "report.md").read_text(encoding="utf-8")
    size = sum(len(d.text.encode()) for d in read([str(p) for i in settings.input for p in sorted(Path(i).glob("*"))]))
    out = {
        "planted": {"documents": documents, "seed": settings.seed, "scores": scores},
        "real": {
            "bytes_read": size, "cpu_seconds": round(cpu, 2), "mb_per_cpu_second": round(size / 1e6 / cpu, 2),
            "counts": report["counts"], "dropped": report["dropped"], "done": report["done"],
        },
        "command": " ".join(sys.argv), "hardware": hardware(), "git": _git(),
    }  # fmt: skip
    Path(settings.output).write_text(json.dumps(out, indent=1) + "\n")
    print(f"{documents:,} documents\n\n| planted | documents | recall | precision |\n|---|---:|---:|---:|")
    for label, score in scores.items():
        print(f"| {label} | {score['planted']} | {score['recall']:.3f} | {score['precision']:.3f} |")
    print(
        f"\n{size / 1e6:.1f} MB in {cpu:.1f} CPU seconds: {out['real']['mb_per_cpu_second']} MB/s a core\n\n{markdown}"
    )


if __name__ == "__main__":
    main()
