"""What a run shows: the stages that have finished, and whether tokenizer, model and encoder beat what they are compared with."""

from pathlib import Path

from dilqur.common.errors import InputError
from dilqur.data.documents import read_jsonl
from dilqur.evals.scores import RANDOM_WEIGHTS
from dilqur.pipeline.lineage import equal_bytes_seen, lineage
from dilqur.pipeline.manifest import file_identity, read_manifest

VERDICT = {True: "holds", False: "does not hold at this size"}


def finished_stages(run_dir, wanted, order):
    """{folder: manifest} of the finished stages, in the `order` of pipeline.txt; other reports are left out."""
    found = {path.parent: read_manifest(path.parent) for path in sorted(run_dir.glob("*/manifest.json"))}
    if missing := set(wanted or ()) - {folder.name for folder in found}:
        raise InputError(f"stages: {min(missing)} has not finished in {run_dir}")
    found = {f: m for f, m in found.items() if m.get("program", "report.py") != "report.py"}
    place = {name: number for number, name in enumerate(order)}
    found = sorted(found.items(), key=lambda item: (place.get(item[0].name, len(place)), item[1]["started"]))
    return {folder: manifest for folder, manifest in found if not wanted or folder.name in wanted}


def by_program(found, *programs):
    """{stage: (folder, manifest)}"""
    return {folder.name: (folder, m) for folder, m in found.items() if m["program"] in programs}


def fertility_claim(found):
    """The tokenizer that was transplanted (else the last one measured) against the first of the others, or None."""
    new = {m["result"]["tokenizer_sha256"] for _, m in by_program(found, "transplant_tokenizer.py").values()}
    for _, manifest in by_program(found, "eval_tokenizer.py").values():
        measured = manifest["result"]["tokenizers"]
        custom = next((n for n, r in measured.items() if r["tokenizer_sha256"] in new), list(measured)[-1])
        if base := next((n for n in measured if n != custom), None):
            before, after = measured[base]["fertility"], measured[custom]["fertility"]
            claim = {"base": base, "base_fertility": before, "custom": custom, "fertility": after}
            return {**claim, "holds": after < before}
    return None


def bpb_claim(found, run_dir):
    """Of the pairs (model with another tokenizer, its control) the one that has seen the most text, or None."""
    claims = []
    for _, manifest in by_program(found, "eval_bpb.py").values():
        models = manifest["result"]["models"]
        pasts = {name: lineage(m["model"], run_dir) for name, m in models.items()}
        trained = [name for name, p in pasts.items() if p.utf8_bytes and "sft.py" not in p.programs]
        custom = [name for name in trained if "transplant_tokenizer.py" in pasts[name].programs]
        for name, control in ((n, c) for n in custom for c in trained if c not in custom):
            mine, other = pasts[name], pasts[control]
            if equal_bytes_seen(mine.utf8_bytes, other.utf8_bytes) and mine.origin == other.origin:
                bits, control_bits = models[name]["bits_per_byte"], models[control]["bits_per_byte"]
                claim = {"model": name, "bits_per_byte": bits, "utf8_bytes_seen": mine.utf8_bytes, "control": control}
                claim |= {"control_bits_per_byte": control_bits, "control_utf8_bytes_seen": other.utf8_bytes}
                claims.append({**claim, "holds": bits < control_bits})
    return max(claims, key=lambda claim: claim["utf8_bytes_seen"], default=None)


def encoder_claims(found):
    """{stage: the first encoder beside its shape with random weights}, where that was asked for."""
    claims = {}
    for name, (_, manifest) in by_program(found, "eval_encoder.py").items():
        models, metric = manifest["result"]["models"], manifest["result"]["metric"]
        if control := models.get(RANDOM_WEIGHTS):
            encoder, span = next(iter(models)), control["difference_interval"]
            claim = {
                "metric": metric,
                "encoder": encoder,
                "score": models[encoder]["score"],
                "random": control["score"],
            }
            claims[name] = {**claim, "holds": bool(span) and span[1] < 0}
    return claims


def changed_inputs(manifest):
    """Names of the stages this one was made from that have been made again since."""
    files = {Path(f): was["xxh3"] for record in manifest["inputs"].values() for f, was in record["files"].items()}
    stages = {f: was for f, was in files.items() if f.name == "manifest.json" and f.exists()}
    return sorted({f.parent.name for f, was in stages.items() if file_identity(f)["xxh3"] != was})


def records(path):
    if not path.exists():
        raise InputError(f"{path}: missing, though {path.parent.name} has finished: run that stage again")
    return [record for _, record in read_jsonl(str(path))]
