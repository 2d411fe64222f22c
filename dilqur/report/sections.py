"""The sections of the page as blocks: {"kind": "table" | "text" | "heading" | "list" | "cards" | "chart" | "splits" | "details", …}.

Texts are plain here; page.html.jinja escapes them. A section without a stage for it has no blocks.
"""

import json
import math
from pathlib import Path

from dilqur.pipeline.lineage import lineage
from dilqur.report.chart import chart, short, thin
from dilqur.report.claims import VERDICT, by_program, changed_inputs, records

TRAINING = ("cpt.py", "mlm.py")
BAR = "bar"  # instead of a template: the row's "length", rem


def text(words, kind="text"):
    return {"kind": kind, "text": words}


def cell(template, figures):
    """`template` filled with `figures`; a dash where one is missing. Of BAR the length as a number."""
    try:
        return figures["length"] if template is BAR else template.format(**figures)
    except (KeyError, TypeError):
        return "–"


def table(name, rows, columns):
    """rows: {name: figures}; columns: {heading: template}. Columns of numbers go to the right, those of dashes are left out."""
    cells = {heading: [cell(template, figures) for figures in rows.values()] for heading, template in columns.items()}
    shown = [heading for heading, column in cells.items() if set(column) != {"–"}]
    numbers = [all(isinstance(c, str) and (c[0].isdigit() or c[0] == "–") for c in cells[h]) for h in shown]
    head = list(zip(shown, numbers, strict=True))
    body = [(row, [cells[h][place] for h in shown]) for place, row in enumerate(rows)]
    return {"kind": "table", "name": name, "head": head, "rows": body}


def with_bars(rows, key):
    """The rows with what BAR needs: their `key` as a length, the largest 6 rem."""
    largest = max(figures[key] for figures in rows.values()) or 1
    return {name: {**figures, "length": round(6 * figures[key] / largest, 2)} for name, figures in rows.items()}


def summary(found, run_dir, fertility, bpb, encoder):
    def card(title, figure, holds, words):
        cards.append({"title": title, "figure": figure, "holds": holds, "verdict": VERDICT[holds], "text": words})

    cards, notes = [], []
    if f := fertility:
        figure = f"{f['base_fertility']:.2f} → {f['fertility']:.2f}"
        card("Fewer tokens per word", figure, f["holds"], f"{f['base']} → {f['custom']}, on the same text")
    if b := bpb:
        figure = f"{b['bits_per_byte']:.3f} against {b['control_bits_per_byte']:.3f}"
        seen = f"{short(b['utf8_bytes_seen'], 'B')} and {short(b['control_utf8_bytes_seen'], 'B')} of text seen"
        words = f"{b['model']} against {b['control']}; {seen} in training"
        card("Fewer bits per byte than the control at equal bytes seen", figure, b["holds"], words)
    for stage, e in encoder.items():
        words = f"{stage}: {e['metric']}, {e['encoder']} against random weights"
        card("Pre-trained vs. random initialization", f"{e['score']:.3f} against {e['random']:.3f}", e["holds"], words)
    for _, manifest in by_program(found, "eval_bpb.py").values():
        models = manifest["result"]["models"].items()
        seen = {name: short(lineage(m["model"], run_dir).utf8_bytes, "B") for name, m in models}
        each = "; ".join(f"{name} {m['bits_per_byte']:.3f} ({seen[name]})" for name, m in models)
        notes.append(text(f"Bits per byte, and text seen in training since the common base: {each}."))
        if not bpb:
            notes.append(
                text("None of them has a control that saw as much text: no claim is made about the tokenizer.")
            )
    for folder, manifest in found.items():
        if changed := changed_inputs(manifest):
            words = f"{folder.name} was made before {', '.join(changed)} was made again: run it again."
            notes.append({**text(words), "warning": True})
    return [{"kind": "cards", "cards": cards}, *notes] if cards or notes else []


def tokenizers(found):
    blocks = []
    for _, manifest in by_program(found, "eval_tokenizer.py").values():
        result, stated = manifest["result"], manifest["arguments"]
        columns = {
            "tokens per word": "{fertility:.3f}",
            "": BAR,
            "95 % interval": "{intervals[fertility][0]:.3f} to {intervals[fertility][1]:.3f}",
            "bytes per token": "{bytes_per_token:.3f}",
            "words kept whole": "{words_kept_whole:.1%}",
            "vocabulary": "{vocab_size:,}",
            "used here": "{vocab_share_used:.1%}",
            "tokens": "{tokens:,}",
        }
        rows = with_bars(result["tokenizers"], "fertility")
        for number, (pair, translated) in enumerate(result.get("parallel", {}).items()):
            columns[f"{pair}: premium"] = f"{{premium{number}:.2f}}"
            for name, figures in translated["tokenizers"].items():
                rows[name][f"premium{number}"] = figures["premium"]
        read = stated["input"] or [path for documents in stated["document_sets"] for path in documents["input"]]
        about = f"Measured on {', '.join(read)}. Tokens per word (fertility): tokens without special tokens / "
        about += "whitespace-separated words."
        if result.get("parallel"):
            about += " Premium: tokens / tokens of the same content in the other language."
        blocks += [table("tokenizer", rows, columns), text(about)]
        if words := result.get("splits"):
            blocks.append({"kind": "splits", "tokenizers": list(next(iter(words.values()))), "words": words})
        for sweep in result.get("sweeps", []):
            line = {"fertility": list(zip(sweep["vocab_sizes"], sweep["fertility"], strict=True))}
            title = f"Tokens per word; knee: {sweep['knee']}"
            blocks.append(chart(title, "vocabulary", "", [*line], line, line))
    return blocks


def training(found, run_dir):
    rows, losses, evaluations, bits = {}, {}, {}, {}
    for name, (folder, manifest) in by_program(found, *TRAINING).items():
        result, steps = manifest["result"], records(folder / "metrics.jsonl")
        per_step, per_token = result["tokens"] / result["steps"], result["utf8_bytes_seen"] / result["tokens"]
        losses[name] = thin([(s["step"] * per_step, s["loss"]) for s in steps if s["loss"] is not None])
        evaluations[name] = [(s["step"] * per_step, s["eval_loss"]) for s in steps if "eval_loss" in s]
        memory = max((s["peak_memory_gb"] for s in steps if "peak_memory_gb" in s), default=None)
        rows[name] = {**result, "seen": short(result["utf8_bytes_seen"], "B"), "memory": memory}
        if spent := result.get("bounded_by"):  # older runs have none
            rows[name]["bound"] = f"{spent['bound']}, {spent['shares'][spent['bound']]:.0%}"
        if manifest["program"] == "cpt.py" and (source := manifest["arguments"]["model_name_or_path"]):
            start = lineage(source, run_dir).utf8_bytes
            bits[name] = [(start + x * per_token, y / math.log(2) / per_token) for x, y in losses[name]]
    if not rows:
        return []
    columns = {
        "steps": "{steps:,}",
        "tokens": "{tokens:,}",
        "text seen": "{seen}",
        "loss": "{loss:.4f}",
        "eval_loss": "{eval_loss:.4f}",
        "held-out bits per byte": "{eval_bits_per_byte:.4f}",
        "masked accuracy": "{eval_accuracy:.1%}",
        "tokens/s": "{tokens_per_second:,.0f}",
        "bounded by": "{bound}",
        "peak memory": "{memory:.1f} GB",
        "parameters": "{parameters:,}",
        "of them trained": "{trainable:,}",
        "strategy": "{strategy}",
        "processes": "{processes}",
    }
    title = "Loss per token (lines), eval_loss (dots)"
    charts = [chart(title, "tokens seen in the stage", "", list(rows), losses, evaluations)]
    if bits:
        title, label = "Training loss in bits per byte", "text seen since the common base"
        charts.append(chart(title, label, "B", list(rows), bits, {}))
    about = """A loss per token, in nats, compares only between stages of one tokenizer: longer tokens are fewer and harder to
guess. In bits per byte (loss / ln 2 / bytes of text per token) it compares between tokenizers too. There a line begins where the stage
before it ended; a base trained from random weights is left out. Bounded by: what took the largest fraction of the time after the first
two steps (dilqur/training/bottleneck.py)."""
    return [table("stage", rows, columns), {"kind": "charts", "charts": charts}, text(about)]


def bits_per_byte(found, run_dir):
    blocks = []
    for _, manifest in by_program(found, "eval_bpb.py").values():
        rows = with_bars(manifest["result"]["models"], "bits_per_byte")
        for figures in rows.values():
            line = lineage(figures["model"], run_dir)
            figures |= {"seen": short(line.utf8_bytes, "B"), "origin": Path(line.origin).name}
        columns = {
            "bits per byte": "{bits_per_byte:.3f}",
            "": BAR,
            "95 % interval": "{interval[0]:.3f} to {interval[1]:.3f}",
            "text seen": "{seen}",
            "since": "{origin}",
            "bits per token": "{bits_per_token:.3f}",
            "bits per word": "{bits_per_word:.3f}",
            "tokens of the text": "{tokens:,}",
            "tokens at once": "{max_length:,}",
        }
        size = f"{figures['documents']:,} held-out documents, {figures['utf8_bytes']:,} bytes of UTF-8."
        about = f"{size} Fewer bits are better. Text seen: in training, since the model named beside it."
        blocks += [table("model", rows, columns), text(about)]
    return blocks


def vocabulary_study(found):
    blocks = []
    for _, manifest in by_program(found, "study.py", "vocabulary_study.py").values():
        result = manifest["result"]
        rows = with_bars(result["tokenizers"], "bits_per_byte")
        for figures in rows.values():
            figures["seen"] = short(figures["utf8_bytes"], "B")
            figures["each"] = ", ".join(f"{value:.3f}" for value in figures["repetitions"])
        columns = {
            "at equal": "{at_equal}",
            "bits per byte": "{bits_per_byte:.3f}",
            "": BAR,
            "95 % interval": "{interval[0]:.3f} to {interval[1]:.3f}",
            "Δ vs control": "{difference:+.3f}",
            "its 95 % CI": "{difference_interval[0]:+.3f} to {difference_interval[1]:+.3f}",
            "repetitions": "{each}",
            "text seen": "{seen}",
            "floating-point operations": "{flops:.2e}",
        }
        blocks += [{"kind": "list", "items": result["choices"]}, table("model", rows, columns)]
        if starts := result["initialisations"]:
            lines = {figures["method"]: figures["curve"] for figures in starts.values()}
            rows = {figures["method"]: {**figures, "all": figures["of_steps"]} for figures in starts.values()}
            columns = {
                "first": "{first:.3f}",
                "last": "{last:.3f}",
                "steps to the same": "{mean_steps:.0f}",
                "of": "{all}",
                "fewer": "{saved:.0%}",
            }
            title = "Held-out samples, bits per byte, by how the new embeddings were initialized"
            drawn = chart(title, "steps since the base model", "", list(lines), lines, {})
            blocks += [table("initialization", rows, columns), drawn]
        if lost := result["base_language"]:
            columns = {"bits per byte of its language": "{bits_per_byte:.3f}", "": BAR}
            blocks.append(table("model", with_bars(lost, "bits_per_byte"), columns))
    return blocks


def encoders(found):
    blocks = []
    for name, (_, manifest) in by_program(found, "eval_encoder.py").items():
        result, stated = manifest["result"], manifest["arguments"]
        columns = {
            result["metric"]: "{score:.3f}",
            "": BAR,
            "95 % interval": "{interval[0]:.3f} to {interval[1]:.3f}",
            "Δ vs first": "{difference:+.3f}",
            "its 95 % CI": "{difference_interval[0]:+.3f} to {difference_interval[1]:+.3f}",
            "each seed": "{each}",
            "learning rate": "{learning_rate:g}",
        }
        rows = with_bars(result["models"], "score")
        for figures in rows.values():
            if scores := figures.get("scores"):
                figures["each"] = ", ".join(f"{value:.3f}" for value in scores)
        blocks += [text(name, "heading"), table("encoder", rows, columns)]
        if "examples" in result:
            blocks.append(text(fine_tuned_on(result, stated)))
        models = result["models"].values()
        for kind, title in (("by_frequency", "in the training documents"), ("by_suffix", "ending")):
            groups = result.get("in_group", {}).get(kind) or {}
            rows = {g: {"words": n, **{f"m{i}": m[kind][g] for i, m in enumerate(models)}} for g, n in groups.items()}
            columns = {model: f"{{m{i}:.1%}}" for i, model in enumerate(result["models"])}
            blocks += [table(title, rows, {"words": "{words:,}", **columns})] if rows else []
        for sentence, by_model in result.get("fill_mask", {}).items():
            guesses = {n: ", ".join(f"{token} {part:.2f}" for token, part in g) for n, g in by_model.items()}
            rows = {n: {"guesses": words} for n, words in guesses.items()}
            blocks += [text(sentence), table("encoder", rows, {"finds likeliest": "{guesses}"})]
    return blocks


def fine_tuned_on(result, stated):
    train, _, test = result["examples"].values()
    words = f"{len(result['labels'])} labels, fine-tuned on {train:,} examples of {', '.join(stated['train'])}, "
    words += f"measured on {test:,}{' per fold' * result['folds']}. "
    words += f"Intervals: over documents{' and seeds' * (not result['folds'])}."
    twice = result["test_in_train"]
    return words + (f" {twice:,} of the test examples are in train, too." if twice else "")


def fine_tuning(found):
    rows = {name: {**m["arguments"], **m["result"]} for name, (_, m) in by_program(found, "sft.py").items()}
    columns = {
        "from": "{model_name_or_path}",
        "steps": "{steps:,}",
        "trained on": "{conversations[train]:,} conversations",
        "held out": "{conversations[validation]:,}",
        "too long": "{too_long:,}",
        "tokens with loss": "{trained_tokens:,}",
        "first loss": "{loss_first:.4f}",
        "loss": "{loss:.4f}",
        "eval_loss": "{eval_loss:.4f}",
        "parameters trained": "{trainable:,}",
    }
    return [table("stage", rows, columns)] if rows else []


def generations(found):
    languages = [m["arguments"].get("language") for _, m in by_program(found, "clean_corpus.py").values()]
    lang, blocks = next(iter(languages), None), []
    for folder, manifest in by_program(found, "compare_generations.py").values():
        columns = {
            "repetition (rep-4)": "{repetition:.3f}",
            "ends by itself": "{ended:.0%}",
            "words per answer": "{words:.1f}",
        }
        about = "rep-4: 1 − distinct 4-grams / 4-grams of words. An answer that repeats nothing has 0, and so has a short one."
        blocks += [table("model", manifest["result"]["models"], columns), text(about)]
        for record in records(folder / "generations.jsonl"):
            answers = [
                {
                    "model": name,
                    "text": " ".join(a["text"].split()) or "(nothing)",
                    "note": f"repetition {a['repetition']:.2f}, {a['tokens']} tokens{'' if a['ended'] else ', cut off'}",
                }
                for name, a in record["answers"].items()
            ]
            blocks += [
                {**text(record["prompt"], "heading"), "lang": lang},
                {"kind": "answers", "answers": answers, "lang": lang},
            ]
    return blocks


def manifests(found):
    first, rows, raw = next(iter(found.values())), {}, []
    for folder, manifest in found.items():
        git, packages = manifest["git"] or {}, manifest["packages"]
        other = [f"{p} {v}" for p, v in packages.items() if v != first["packages"].get(p)]
        rows[folder.name] = {
            **manifest,
            "started": manifest["started"].replace("T", " ").rstrip("Z"),
            "commit": git and git["commit"][:10] + (", changed" if git["dirty"] else ""),
            "changed": ", ".join(changed_inputs(manifest)) or "none",
            "versions": ", ".join(other) or "as above",
        }
        title, content = f"{folder.name}/manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False)
        raw.append({"kind": "details", "title": title, "text": content})
    columns = {
        "program": "{program}",
        "started (UTC)": "{started}",
        "seconds": "{seconds:,.1f}",
        "commit": "{commit}",
        "inputs made again since": "{changed}",
        "versions": "{versions}",
    }
    machine = "{cpu}, {cores} cores, {memory_gb} GB, Python {python}".format(**first["hardware"])
    versions = [f"{p} {v}" for p, v in first["packages"].items() if v]
    about = ", ".join([machine, *first["hardware"]["gpus"], *versions])
    return [text(f"{first['stage']} ran on {about}."), table("stage", rows, columns), *raw]
