"""What a study of vocabularies says: which tokenizer, how to begin its embeddings, what is lost of the base model's language.

    python scripts/vocabulary_study.py --run_dir runs/quickstart --bpb runs/quickstart/bpb --control control --output_dir runs/try/study
    slurm/pipeline.sh vocabulary-study --local

Reads what the other stages of the run folder left: the manifests and metrics of the training stages, and the bits per byte of every
document that eval_bpb measured. Stages that differ only in a last -sN are repetitions of one thing with different seeds. OUTPUT_DIR gets
study.md (tables, and what to choose by them) and results.json; report.py shows them, and the curves.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from dilqur.common.atomic import atomic_files, write_json
from dilqur.common.bootstrap import interval, resampled_ratios
from dilqur.common.errors import InputError
from dilqur.common.markdown import between, markdown, number
from dilqur.data.documents import read_jsonl
from dilqur.estimate.cost_model import training_flops_per_token
from dilqur.models.config import read_config
from dilqur.pipeline.inputs import FilePath
from dilqur.pipeline.lineage import EQUAL, lineage
from dilqur.pipeline.manifest import read_manifest
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings

REFERENCE = "mean"  # the initialisation that the others are measured against, in steps
REPETITION = re.compile(r"-s\d+$")


@dataclass(kw_only=True)
class StudySettings(StageSettings):
    bpb: FilePath = setting("stage of eval_bpb.py: the language, all models")
    base_language_bpb: FilePath | None = setting("stage of eval_bpb.py: the base model's language", default=None)
    control: str = setting("name, without -sN, of the models that kept the base's tokenizer", default="control@base")
    seed: Annotated[int, Field(ge=0)] = setting("of the draws that the intervals come from", default=42)


# -- what was run -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What it took to train one model from the base. curve: [(steps, bits per byte of the held-out samples)] over its phases, or none."""

    utf8_bytes: int = 0
    flops: float = 0.0
    steps: int = 0
    curve: tuple = ()
    method: str | None = None


def run_of(folder, base):
    """The Run of a training stage's folder, back to the stage folder `base`. Raises InputError where a stage is missing."""
    run = Run()
    for stage, manifest in lineage(folder, folder.parent).stages:
        arguments, result = manifest["arguments"], manifest["result"]
        if stage.name == base or manifest["program"] == "transplant_tokenizer.py":  # counting begins here
            run = Run(method=arguments.get("method"))
            continue
        config = read_config(stage / "model")
        flops = training_flops_per_token(config, arguments["max_length"], bool(arguments["unfrozen_parameters"]))
        run = Run(
            run.utf8_bytes + result["utf8_bytes_seen"],
            run.flops + flops * result["tokens"],
            run.steps + result["steps"],
            (*run.curve, *curve(stage, arguments, run.steps)),
            run.method,
        )
    return run


def curve(folder, arguments, steps_before):
    """[(steps since the base, eval_loss in bits per byte)] of a stage."""
    if not arguments["eval_datasets"]:
        return []
    shards = [read_manifest(dataset["path"]) for dataset in arguments["eval_datasets"]]
    bytes_per_token = sum(s["utf8_bytes"] for s in shards) / sum(s["tokens"] for s in shards)
    lines = [record for _, record in read_jsonl(str(folder / "metrics.jsonl"))]
    return [
        (steps_before + r["step"], r["eval_loss"] / math.log(2) / bytes_per_token) for r in lines if "eval_loss" in r
    ]


def groups_of(names):
    """{group: [its repetitions]} of stage names."""
    groups = {}
    for name in names:
        groups.setdefault(REPETITION.sub("", name), []).append(name)
    return groups


# -- bits per byte ----------------------------------------------------------------------------------------------------


class BitsPerByte:
    """What an eval_bpb stage measured, of groups of models: a group's figure is the mean of its repetitions."""

    def __init__(self, folder, seed):
        folder = Path(folder)
        self.models = list(read_manifest(folder)["result"]["models"])
        documents = np.load(folder / "documents.npz")
        self.bits, self.bytes = documents["nats"] / math.log(2), documents["utf8_bytes"]
        self.groups = groups_of(self.models)
        members = [[self.models.index(name) for name in names] for names in self.groups.values()]
        self.means = np.stack([self.bits[:, columns].mean(1) for columns in members], 1)
        self.draws = dict(zip(self.groups, resampled_ratios(self.means, self.bytes, seed).T, strict=True))

    def of(self, name):
        """float: of a group, or of one model."""
        column = (
            self.means[:, list(self.groups).index(name)]
            if name in self.groups
            else self.bits[:, self.models.index(name)]
        )
        return float(column.sum() / self.bytes.sum())

    def figures(self, group, reference=None):
        """{"bits_per_byte", "interval" over documents, "repetitions": each one's}, and how much more than `reference`, paired."""
        out = {
            "bits_per_byte": self.of(group),
            "interval": interval(self.draws[group]),
            "repetitions": [self.of(name) for name in self.groups[group]],
        }
        if reference and reference != group:
            out["difference"] = self.of(group) - self.of(reference)
            out["difference_interval"] = interval(self.draws[group] - self.draws[reference])
        return out


# -- steps ------------------------------------------------------------------------------------------------------------


def steps_to(curve, target):
    """The first number of steps at which a curve is at or below `target`, between two evaluations by a straight line; None if never."""
    before = None
    for steps, value in curve:
        if value <= target:
            if before is None or before[1] == value:
                return float(steps)
            return before[0] + (steps - before[0]) * (before[1] - target) / (before[1] - value)
        before = (steps, value)
    return None


def initialisations(runs, groups):
    """{group: {"method", "steps": of each repetition to the reference's last bits per byte, "saved": share of the reference's steps,
    "curve": the mean of the repetitions, …}} of groups that differ from the reference in the method alone; {} without one."""
    mine = {
        g: [runs[n] for n in names] for g, names in groups.items() if runs[names[0]].method and runs[names[0]].curve
    }
    reference = next((g for g, r in mine.items() if r[0].method == REFERENCE), None)
    if not reference:
        return {}
    same = {g: r for g, r in mine.items() if g == reference.removesuffix(REFERENCE) + r[0].method}
    targets = [run.curve[-1][1] for run in mine[reference]]
    target = sum(targets) / len(targets)
    out = {}
    for group, repetitions in same.items():
        steps = [steps_to(run.curve, target) for run in repetitions]
        whole = repetitions[0].steps
        reached = [s for s in steps if s is not None]
        mean = sum(reached) / len(reached) if len(reached) == len(steps) else None
        out[group] = {
            "method": repetitions[0].method,
            "target": target,
            "steps": steps,
            "of_steps": whole,
            "mean_steps": mean,
            "saved": None if mean is None else 1 - mean / whole,
            "first": sum(run.curve[0][1] for run in repetitions) / len(repetitions),
            "last": sum(run.curve[-1][1] for run in repetitions) / len(repetitions),
            "curve": [
                (points[0][0], sum(value for _, value in points) / len(points))
                for points in zip(*(run.curve for run in repetitions), strict=True)
            ],
        }
    return out


# -- the page ---------------------------------------------------------------------------------------------------------


def choices(results):
    """Sentences: what to choose, and by which figure."""
    out, table = [], results["tokenizers"]
    control = results["control"]
    others = {g: f for g, f in table.items() if f["at_equal"] == "bytes" and g != control}
    if others:
        best = min(others, key=lambda g: others[g]["bits_per_byte"])
        figures, own = others[best], table[control]
        sure = figures["difference_interval"] and figures["difference_interval"][1] < 0
        out.append(
            f"Tokenizer: {best}, {figures['bits_per_byte']:.3f} bits per byte against "
            f"{own['bits_per_byte']:.3f} of {control} at equal bytes "
            f"(difference {number(figures['difference'], '+.3f')} {between(figures['difference_interval'])}"
            f"{'' if sure else ': the interval holds 0, so these documents do not decide'}), in "
            f"{figures['flops'] / own['flops']:.0%} of its compute."
        )
        for group, equal in table.items():
            if equal["at_equal"] == "compute":
                bought = equal["bits_per_byte"] - figures["bits_per_byte"]
                out.append(
                    f"At equal compute {group} has {equal['bits_per_byte']:.3f}, {best} {figures['bits_per_byte']:.3f}: "
                    f"the shorter sequences buy {bought:.3f} bits per byte."
                )
    starts = {g: f for g, f in results["initialisations"].items() if f["method"] != REFERENCE}
    if starts:
        best = max(starts, key=lambda g: (starts[g]["saved"] is not None, starts[g]["saved"] or 0))
        saved = starts[best]["saved"]
        said = "no method reaches it" if saved is None else f"{starts[best]['method']} needs {saved:.0%} fewer steps"
        out.append(f"Initialisation: to the bits per byte that {REFERENCE} has in the end, {said}.")
    if lost := results["base_language"]:
        base, replay = results["base"], [g for g in lost if g.endswith("-replay")]
        for group in replay:
            without = group.removesuffix("-replay")
            bits = [measured[g]["bits_per_byte"] for measured, g in ((lost, base), (lost, without), (lost, group))]
            price = table[group]["bits_per_byte"] - table[without]["bits_per_byte"]
            out.append(
                f"The base model's language: {bits[0]:.3f} bits per byte before, {bits[1]:.3f} after {without}, {bits[2]:.3f} with a "
                f"share of it mixed in, which costs the new language {number(price, '+.3f')}."
            )
    return out


def repetitions(figures):
    return " ".join(number(value) for value in figures["repetitions"])


def page(results):
    """study.md"""
    parts = ["# Which vocabulary, and how to begin", "\n".join(f"- {sentence}" for sentence in results["choices"])]
    heads = [
        "model",
        "at equal",
        "bits per byte",
        "95 %",
        "repetitions",
        "less the control",
        "95 %",
        "text seen (MB)",
        "compute (TFLOP)",
    ]
    rows = [
        [
            group,
            f["at_equal"] or "–",
            number(f["bits_per_byte"]),
            between(f["interval"]),
            repetitions(f),
            number(f.get("difference"), "+.3f"),
            between(f.get("difference_interval")),
            number(f["utf8_bytes"] / 1e6, ".2f"),
            number(f["flops"] / 1e12, ".1f"),
        ]
        for group, f in results["tokenizers"].items()
    ]
    parts += ["## Tokenizers", markdown(heads, rows)]
    parts.append(
        "Bits per UTF-8 byte of the same held-out documents. Intervals are over documents (bootstrap), of the difference paired; "
        "repetitions are seeds. Text and compute (floating-point operations of training): since the base model."
    )
    if starts := results["initialisations"]:
        heads = ["method", "first", "last", "steps to it, each repetition", "of", "fewer steps"]
        rows = [
            [
                f["method"],
                number(f["first"]),
                number(f["last"]),
                " ".join("never" if steps is None else f"{steps:.0f}" for steps in f["steps"]),
                str(f["of_steps"]),
                number(f["saved"], ".0%"),
            ]
            for f in sorted(starts.values(), key=lambda f: -9 if f["saved"] is None else f["saved"], reverse=True)
        ]
        target = next(iter(starts.values()))["target"]
        parts += ["## Initialisations", markdown(heads, rows)]
        parts.append(
            f"Bits per byte of the held-out samples (eval_loss) at the first evaluation and the last; steps to {target:.3f}, "
            f"which {REFERENCE} has after all its steps."
        )
    if lost := results["base_language"]:
        rows = [[g, number(f["bits_per_byte"]), between(f["interval"]), repetitions(f)] for g, f in lost.items()]
        parts += ["## The base model's language", markdown(["model", "bits per byte", "95 %", "repetitions"], rows)]
    return "\n\n".join(parts) + "\n"


@program(StudySettings)
def main(settings, stage):
    stage.open()
    bits = BitsPerByte(settings.bpb, settings.seed)
    if settings.control not in bits.groups:
        raise InputError(f"control: {settings.control}: {settings.bpb} has {', '.join(bits.groups)}")
    base = next((name for name in bits.models if len(bits.groups.get(name, ())) == 1 and "@" not in name), None)
    trained = {group: names for group, names in bits.groups.items() if group != base}
    runs = {name: run_of(stage.run_dir / name, base) for names in trained.values() for name in names}

    tokenizers, own = {}, runs[trained[settings.control][0]]
    cheapest = min(runs[names[0]].flops for names in trained.values())
    for group, names in trained.items():
        run = runs[names[0]]
        same = abs(run.utf8_bytes - own.utf8_bytes) <= EQUAL * own.utf8_bytes
        cheap = abs(run.flops - cheapest) <= 3 * EQUAL * cheapest
        tokenizers[group] = {
            **bits.figures(group, settings.control),
            "utf8_bytes": run.utf8_bytes,
            "flops": run.flops,
            "steps": run.steps,
            "at_equal": "bytes" if same else "compute" if cheap and run.method is None else None,
        }
    starts = initialisations(runs, trained)
    lost = BitsPerByte(settings.base_language_bpb, settings.seed) if settings.base_language_bpb else None
    results = {
        "control": settings.control,
        "base": base,
        "tokenizers": tokenizers,
        "initialisations": starts,
        "base_language": {group: lost.figures(group) for group in lost.groups} if lost else {},
    }
    results["choices"] = choices(results)
    text = page(results)
    with atomic_files(stage.folder) as part:
        (part / "study.md").write_text(text, encoding="utf-8")
        write_json(part / "results.json", results)
    stage.finish(results)
    print(text)


if __name__ == "__main__":
    main()
