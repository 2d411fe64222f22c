"""One page of everything in a run folder: claims as measured, tokenizers, losses, bits per byte, generations, manifests.

    python scripts/report.py --run_dir runs/quickstart --output_dir runs/try/report
    python scripts/report.py --config recipes/quickstart/report.yaml --check

OUTPUT_DIR/report.html is one file that loads nothing else. A section is there if a stage for it has finished; what a stage
is for is read from its manifest's `program`, not from its name. The text a model has seen in training is added up along its
inputs, from the model that all began with. Its control is a model that began with the same one, kept its tokenizer, and has
seen as much text (within 5 %).
"""

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.data.documents import read_jsonl
from dilqur.evals.scores import RANDOM_WEIGHTS
from dilqur.pipeline.inputs import Input
from dilqur.pipeline.manifest import file_identity, read_manifest
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings

TRAINING = ("cpt.py", "mlm.py")
EQUAL = 0.05  # a difference in text seen that counts as none
VERDICT = {True: "holds", False: "does not hold at this size"}


@dataclass(kw_only=True)
class ReportSettings(StageSettings):
    run_dir: Annotated[str, Input("run")] | None = setting(
        "run folder; runs/NAME for recipes/NAME/STAGE.yaml", default=None
    )
    title: str = setting("what the page is called", default="What the run gave")
    stages: list[str] | None = setting("stages to show; all that have finished", default=None)


# -- what was measured ------------------------------------------------------------------------------------------------


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


@dataclass
class Past:
    """Where a model comes from: the model it began as, the bytes of text seen since, the programs it went through."""

    origin: str
    utf8_bytes: int = 0
    programs: tuple = ()


def past(model, run_dir):
    """The Past of the model at this path: up the `model_name_or_path` of stages, to random weights or a model from
    elsewhere, which is where counting begins. Stages of a run folder that was moved are looked for where it is now."""
    folder = Path(model).parent if Path(model).name == "model" else Path(model)
    folder = folder if folder.exists() else run_dir / folder.name
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
    source = manifest.get("arguments", {}).get("model_name_or_path")
    if not isinstance(source, str):
        return Past(str(folder))
    before = past(source, run_dir)
    seen = before.utf8_bytes + manifest["result"].get("utf8_bytes_seen", 0)
    return Past(before.origin, seen, (*before.programs, manifest["program"]))


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
        pasts = {name: past(m["model"], run_dir) for name, m in models.items()}
        trained = [name for name, p in pasts.items() if p.utf8_bytes and "sft.py" not in p.programs]
        custom = [name for name in trained if "transplant_tokenizer.py" in pasts[name].programs]
        for name, control in ((n, c) for n in custom for c in trained if c not in custom):
            mine, other = pasts[name], pasts[control]
            equal = abs(mine.utf8_bytes - other.utf8_bytes) <= EQUAL * max(mine.utf8_bytes, other.utf8_bytes)
            if equal and mine.origin == other.origin:
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


# -- tables and charts ------------------------------------------------------------------------------------------------


def short(number, unit=""):
    """1467205 → "1.47 M"; with the unit B "1.47 MB"."""
    scale, letter = next(((s, c) for s, c in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= s), (1, ""))
    return f"{number / scale:.3g} {letter}{unit}".strip()


def cell(template, figures):
    """`template` filled with `figures`, texts escaped; a dash where one is missing."""
    try:
        return template.format(**{key: escape(v) if isinstance(v, str) else v for key, v in figures.items()})
    except (KeyError, TypeError):
        return "–"


def table(name, rows, columns):
    """rows: {name: figures}; columns: {heading: template}. Columns of numbers go to the right, those of dashes are left out."""
    head, body = f'<th scope="col">{name}</th>', [f'<th scope="row">{escape(row)}</th>' for row in rows]
    for heading, template in columns.items():
        cells = [cell(template, figures) for figures in rows.values()]
        if set(cells) == {"–"}:
            continue
        kind = ' class="number"' if all(c[0].isdigit() or c[0] == "–" for c in cells) else ""
        head += f'<th scope="col"{kind}>{heading}</th>'
        body = [f"{row}<td{kind}>{c}</td>" for row, c in zip(body, cells, strict=True)]
    lines = "\n".join(f"<tr>{row}</tr>" for row in body)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'
    )


BAR = '<span class="bar" style="width: {share:.2f}rem"></span>'


def with_bars(rows, key):
    """The rows with what BAR needs: their `key` as a length, the largest 6 rem."""
    largest = max(figures[key] for figures in rows.values()) or 1
    return {name: {**figures, "share": 6 * figures[key] / largest} for name, figures in rows.items()}


def ticks(low, high):
    """About five round numbers that begin at or below `low` and end at or above `high`."""
    power = 10 ** math.floor(math.log10((high - low or 1) / 5))
    step = power * next(m for m in (1, 2, 5, 10) if (high - low or 1) <= 5 * power * m)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def chart(title, x_label, unit, names, lines, dots):
    """A figure with lines and dots, {name: [(x, y), …]}. names: all there may be, for their colours; `unit` is that of x."""
    points = [point for part in (*lines.values(), *dots.values()) for point in part]
    xs, ys = ticks(0, max(x for x, _ in points)), ticks(min(y for _, y in points), max(y for _, y in points))

    def at(x, y):
        return 44 + 460 * x / xs[-1], 250 - 238 * (y - ys[0]) / (ys[-1] - ys[0])

    drawn = [f'<line x1="44" x2="504" y1="{at(0, y)[1]:.1f}" y2="{at(0, y)[1]:.1f}"/>' for y in ys]
    drawn += [f'<text x="38" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>' for y in ys]
    drawn += [f'<text x="{at(x, 0)[0]:.1f}" y="268" text-anchor="middle">{short(x, unit)}</text>' for x in xs]
    drawn += [f'<text x="504" y="290" text-anchor="end">{x_label}</text>']
    keys = ""
    for name, line in lines.items():
        colour = f"c{names.index(name) % 8}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        drawn.append(f'<polyline points="{path}" class="{colour}"><title>{escape(name)}</title></polyline>')
        for x, y in dots.get(name, ()):
            where = 'cx="{:.1f}" cy="{:.1f}"'.format(*at(x, y))
            drawn.append(f'<circle {where} r="4" class="{colour}"><title>{escape(name)}: {y:.4f}</title></circle>')
        keys += f'<li class="{colour}">{escape(name)}</li>'
    svg = f'<svg viewBox="0 0 530 296" role="img" aria-label="{title}">' + "\n".join(drawn) + "</svg>"
    return f'<figure><figcaption>{title}</figcaption><ul>{keys}</ul><div class="scroll">{svg}</div></figure>'


def thin(points, most=300):
    """At most `most` points: the means of stretches of equal length."""
    size = -(-len(points) // most)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]


# -- sections: the HTML of each, "" where there is no stage for it ----------------------------------------------------


def summary(found, run_dir, fertility, bpb, encoder):
    def card(title, figure, holds, text):
        verdict = f'<p class="{"yes" if holds else "no"}">{VERDICT[holds]}</p>'
        return f'<div class="card"><h3>{title}</h3><p class="figure">{figure}</p>{verdict}<p>{escape(text)}</p></div>'

    cards, notes = "", ""
    if f := fertility:
        figure = f"{f['base_fertility']:.2f} → {f['fertility']:.2f}"
        cards += card("Fewer tokens per word", figure, f["holds"], f"{f['base']} → {f['custom']}, on the same text")
    if b := bpb:
        figure = f"{b['bits_per_byte']:.3f} against {b['control_bits_per_byte']:.3f}"
        seen = f"{short(b['utf8_bytes_seen'], 'B')} and {short(b['control_utf8_bytes_seen'], 'B')} of text seen"
        text = f"{b['model']} against {b['control']}; {seen} in training"
        cards += card("Fewer bits per byte than the control at equal bytes seen", figure, b["holds"], text)
    for stage, e in encoder.items():
        figure, text = (
            f"{e['score']:.3f} against {e['random']:.3f}",
            f"{stage}: {e['metric']}, {e['encoder']} against random weights",
        )
        cards += card("Better for having been pre-trained", figure, e["holds"], text)
    for _, manifest in by_program(found, "eval_bpb.py").values():
        models = manifest["result"]["models"].items()
        each = [f"{n} {m['bits_per_byte']:.3f} ({short(past(m['model'], run_dir).utf8_bytes, 'B')})" for n, m in models]
        notes += f"<p>Bits per byte, and text seen in training since the common base: {escape('; '.join(each))}.</p>"
        if not bpb:
            notes += "<p>None of them has a control that saw as much text: no claim is made about the tokenizer.</p>"
    for folder, manifest in found.items():
        if changed := changed_inputs(manifest):
            notes += (
                f'<p class="no">{folder.name} was made before {", ".join(changed)} was made again: run it again.</p>'
            )
    return f'<div class="cards">{cards}</div>{notes}' if cards or notes else ""


def tokenizers(found):
    html = ""
    for _, manifest in by_program(found, "eval_tokenizer.py").values():
        result, stated = manifest["result"], manifest["arguments"]
        columns = {
            "tokens per word": "{fertility:.3f}",
            "": BAR,
            "95 % interval": "{intervals[fertility][0]:.3f} to {intervals[fertility][1]:.3f}",
            "bytes per token": "{bytes_per_token:.3f}",
            "words kept whole": "{words_kept_whole:.1%}",
            "vocabulary": "{vocab_size:,}",
            "of it occurs": "{vocab_share_used:.1%}",
            "tokens": "{tokens:,}",
        }
        rows = with_bars(result["tokenizers"], "fertility")
        for number, (pair, translated) in enumerate(result.get("parallel", {}).items()):
            columns[f"{escape(pair)}: premium"] = f"{{premium{number}:.2f}}"
            for name, figures in translated["tokenizers"].items():
                rows[name][f"premium{number}"] = figures["premium"]
        html += table("tokenizer", rows, columns)
        read = stated["input"] or [path for documents in stated["document_sets"] for path in documents["input"]]
        html += f"<p>Measured on {escape(', '.join(read))}. Tokens per word (fertility): tokens "
        html += "without special tokens / whitespace-separated words."
        if result.get("parallel"):
            html += " Premium: tokens / tokens of the same content in the other language."
        html += f"</p>{splits(result.get('splits'))}"
        for sweep in result.get("sweeps", []):
            line = {"fertility": list(zip(sweep["vocab_sizes"], sweep["fertility"], strict=True))}
            html += chart(f"Tokens per word; knee: {escape(str(sweep['knee']))}", "vocabulary", "", [*line], line, line)
    return html


def splits(words):
    """{word: {tokenizer: its pieces}} as a table with a coloured box for every token."""
    if not words:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("word", *next(iter(words.values()))))
    body = ""
    for word, by_tokenizer in words.items():
        body += f'<tr><th scope="row">{escape(word)}</th>'
        for pieces in by_tokenizer.values():
            boxes = "".join(f'<b class="c{n % 8}">{escape(piece)}</b>' for n, piece in enumerate(pieces))
            body += f'<td class="split">{boxes}</td>'
        body += "</tr>\n"
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def training(found, run_dir):
    rows, losses, evaluations, bits = {}, {}, {}, {}
    for name, (folder, manifest) in by_program(found, *TRAINING).items():
        result, steps = manifest["result"], records(folder / "metrics.jsonl")
        a_step, a_token = result["tokens"] / result["steps"], result["utf8_bytes_seen"] / result["tokens"]
        losses[name] = thin([(s["step"] * a_step, s["loss"]) for s in steps if s["loss"] is not None])
        evaluations[name] = [(s["step"] * a_step, s["eval_loss"]) for s in steps if "eval_loss" in s]
        memory = max((s["peak_memory_gb"] for s in steps if "peak_memory_gb" in s), default=None)
        rows[name] = {**result, "seen": short(result["utf8_bytes_seen"], "B"), "memory": memory}
        if spent := result.get("bounded_by"):  # older runs have none
            rows[name]["bound"] = f"{spent['bound']}, {spent['shares'][spent['bound']]:.0%}"
        if manifest["program"] == "cpt.py" and (source := manifest["arguments"]["model_name_or_path"]):
            start = past(source, run_dir).utf8_bytes
            bits[name] = [(start + x * a_token, y / math.log(2) / a_token) for x, y in losses[name]]
    if not rows:
        return ""
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
    charts = chart(
        "Loss a token (lines), eval_loss (dots)", "tokens seen in the stage", "", list(rows), losses, evaluations
    )
    if bits:
        charts += chart("Training loss in bits per byte", "text seen since the common base", "B", list(rows), bits, {})
    return f"""{table("stage", rows, columns)}<div class="charts">{charts}</div>
<p>A loss per token, in nats, compares only between stages of one tokenizer: longer tokens are fewer and harder to guess. In bits
a byte (loss / ln 2 / bytes of text a token) it compares between tokenizers too. There a line begins where the stage before it
ended; a base trained from random weights is left out. Bounded by: what had the largest share of the time after the first two steps
(dilqur/training/profiling.py).</p>"""


def bits_per_byte(found, run_dir):
    html = ""
    for _, manifest in by_program(found, "eval_bpb.py").values():
        rows = with_bars(manifest["result"]["models"], "bits_per_byte")
        for figures in rows.values():
            line = past(figures["model"], run_dir)
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
        html += table("model", rows, columns)
        html += f"<p>{figures['documents']:,} held-out documents, {figures['utf8_bytes']:,} bytes of UTF-8. Fewer bits are better. "
        html += "Text seen: in training, since the model named beside it.</p>"
    return html


def vocabulary_study(found):
    html = ""
    for _, manifest in by_program(found, "vocabulary_study.py").values():
        result = manifest["result"]
        html += f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in result['choices'])}</ul>"
        rows = with_bars(result["tokenizers"], "bits_per_byte")
        for figures in rows.values():
            figures["seen"] = short(figures["utf8_bytes"], "B")
            figures["each"] = ", ".join(f"{value:.3f}" for value in figures["repetitions"])
        columns = {
            "at equal": "{at_equal}",
            "bits per byte": "{bits_per_byte:.3f}",
            "": BAR,
            "95 % interval": "{interval[0]:.3f} to {interval[1]:.3f}",
            "less the control": "{difference:+.3f}",
            "its 95 % interval": "{difference_interval[0]:+.3f} to {difference_interval[1]:+.3f}",
            "repetitions": "{each}",
            "text seen": "{seen}",
            "floating-point operations": "{flops:.2e}",
        }
        html += table("model", rows, columns)
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
            html += table("initialisation", rows, columns)
            title = "Held-out samples, bits per byte, by how the new embeddings began"
            html += chart(title, "steps since the base model", "", list(lines), lines, {})
        if lost := result["base_language"]:
            columns = {"bits per byte of its language": "{bits_per_byte:.3f}", "": BAR}
            html += table("model", with_bars(lost, "bits_per_byte"), columns)
    return html


def encoders(found):
    html = ""
    for name, (_, manifest) in by_program(found, "eval_encoder.py").items():
        result, stated = manifest["result"], manifest["arguments"]
        columns = {
            escape(result["metric"]): "{score:.3f}",
            "": BAR,
            "95 % interval": "{interval[0]:.3f} to {interval[1]:.3f}",
            "less the first": "{difference:+.3f}",
            "its 95 % interval": "{difference_interval[0]:+.3f} to {difference_interval[1]:+.3f}",
            "each seed": "{each}",
            "learning rate": "{learning_rate:g}",
        }
        rows = with_bars(result["models"], "score")
        for figures in rows.values():
            if scores := figures.get("scores"):
                figures["each"] = ", ".join(f"{value:.3f}" for value in scores)
        html += f"<h3>{escape(name)}</h3>{table('encoder', rows, columns)}"
        if "examples" in result:
            train, _, test = result["examples"].values()
            html += f"<p>{len(result['labels'])} labels, fine-tuned on {train:,} examples of {escape(', '.join(stated['train']))}, "
            html += f"measured on {test:,}{' a fold' * result['folds']}. "
            html += f"Intervals: over documents{' and seeds' * (not result['folds'])}."
            if twice := result["test_in_train"]:
                html += f" {twice:,} of the test examples are in train, too."
            html += "</p>"
        for kind, title in (("by_frequency", "in the training documents"), ("by_suffix", "ending")):
            if groups := result.get("in_group", {}).get(kind):
                shares = {str(n): m[kind] for n, m in result["models"].items()}
                rows = {
                    key: {"words": many, **{f"m{i}": s[key] for i, s in enumerate(shares.values())}}
                    for key, many in groups.items()
                }
                columns = {escape(n): f"{{m{i}:.1%}}" for i, n in enumerate(shares)}
                html += table(title, rows, {"words": "{words:,}", **columns})
        for sentence, by_model in result.get("fill_mask", {}).items():
            guesses = {
                n: {"guesses": ", ".join(f"{token} {share:.2f}" for token, share in g)} for n, g in by_model.items()
            }
            html += f"<p>{escape(sentence)}</p>{table('encoder', guesses, {'finds likeliest': '{guesses}'})}"
    return html


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
    return table("stage", rows, columns) if rows else ""


def generations(found):
    languages = [m["arguments"].get("language") for _, m in by_program(found, "clean_corpus.py").values()]
    lang = f' lang="{escape(languages[0])}"' if languages and languages[0] else ""
    html = ""
    for folder, manifest in by_program(found, "compare_generations.py").values():
        columns = {
            "repetition (rep-4)": "{repetition:.3f}",
            "ends by itself": "{ended:.0%}",
            "words per answer": "{words:.1f}",
        }
        html += table("model", manifest["result"]["models"], columns)
        html += "<p>rep-4: 1 − distinct 4-grams / 4-grams of words. An answer that repeats nothing has 0, and so has a short one.</p>"
        for record in records(folder / "generations.jsonl"):
            html += f'<h3{lang}>{escape(record["prompt"])}</h3><div class="cards">'
            for name, a in record["answers"].items():
                text = escape(" ".join(a["text"].split())) or "(nothing)"
                how = f"repetition {a['repetition']:.2f}, {a['tokens']} tokens{'' if a['ended'] else ', cut off'}"
                html += f'<div class="card"><h4>{escape(name)}</h4><p{lang}>{text}</p><p class="note">{how}</p></div>'
            html += "</div>"
    return html


def manifests(found):
    first, rows, raw = next(iter(found.values())), {}, ""
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
        text = escape(json.dumps(manifest, indent=1, ensure_ascii=False))
        raw += f"<details><summary>{folder.name}/manifest.json</summary><pre>{text}</pre></details>\n"
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
    return f"<p>{first['stage']} ran on {escape(about)}.</p>{table('stage', rows, columns)}{raw}"


STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #59636e; --line: #d9dee3; --paper: #fff; --card: #f4f6f8;
  --yes: #1a7f4b; --no: #a8480c; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0578d; --c4: #8a6d00; --c5: #3a9bd9;
  --c6: #6b6b6b; --c7: #7a4fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #343b43; --paper: #14181d;
  --card: #1d2329; --yes: #4cc38a; --no: #f0955a; --c0: #56b4e9; --c1: #ff8c42; --c2: #2fc79a; --c3: #e39ac6; --c4: #e0c043;
  --c5: #9fd3ff; --c6: #b0b0b0; --c7: #b79cf0; } }
body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } h4 { font-size: .85rem; margin: 0; color: var(--soft); }
p { margin: .5rem 0; max-width: 50rem; } a { color: inherit; margin-right: 1rem; white-space: nowrap; }
header p, section > p, .note { color: var(--soft); font-size: .9rem; } .yes, .no { font-weight: 600; }
.yes { color: var(--yes); } .no, section > .no { color: var(--no); }
.scroll { overflow-x: auto; margin: .75rem 0; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-size: .8rem; font-weight: normal; } .number { text-align: right; }
.bar { display: block; height: .8rem; min-width: 1px; background: var(--c0); border-radius: 2px; }
.split b { font: .85rem ui-monospace, monospace; padding: .15rem .3rem; margin-right: 2px; border-radius: 3px;
  background: color-mix(in srgb, var(--c) 25%, transparent); }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); }
.card { background: var(--card); border-radius: 6px; padding: .9rem 1rem; } .card h3 { margin: 0; }
.card p { margin: .25rem 0; font-size: .9rem; } .card .figure { font-size: 1.5rem; font-weight: 600; }
.charts { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 1.5rem 0 0; min-width: 0; } figcaption { font-weight: 600; } svg { width: 100%; min-width: 28rem; }
figure ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: .9rem; }
li::before { content: ""; display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem;
  background: var(--c); }
svg text { fill: var(--soft); font-size: 12px; } svg line { stroke: var(--line); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.5; } circle { fill: var(--c); stroke: var(--paper); }
summary { cursor: pointer; padding: .25rem 0; } pre { overflow: auto; max-height: 30rem; font-size: .8rem; }
""" + "".join(f".c{n} {{ --c: var(--c{n}); }} " for n in range(8))


def page(title, run_dir, found, *claims):
    """The whole page."""
    sections = {
        "Summary": summary(found, run_dir, *claims),
        "Tokenizers": tokenizers(found),
        "Training": training(found, run_dir),
        "Bits per byte": bits_per_byte(found, run_dir),
        "Vocabulary study": vocabulary_study(found),
        "Encoders": encoders(found),
        "Fine-tuning": fine_tuning(found),
        "Generations": generations(found),
        "Manifests": manifests(found),
    }
    links = body = ""
    for name, html in sections.items():
        if html:
            links += f'<a href="#{name.replace(" ", "-")}">{name}</a>'
            body += f'<section><h2 id="{name.replace(" ", "-")}">{name}</h2>\n{html}\n</section>\n'
    minutes, ended = sum(m["seconds"] for m in found.values()) / 60, max(m["ended"] for m in found.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1>
<p>{len(found)} stages of {escape(str(run_dir))}, {minutes:,.1f} minutes in all; the last one ended {ended}.</p>
<nav>{links}</nav></header>
<main>{body}</main></body></html>
"""


def find_stages(stage):
    """Note every finished stage of the run folder as an input: with one more, the report is not of the whole run any longer."""
    if not stage.run_dir:
        raise InputError("--run_dir missing: give it, or a recipe (--config)")
    found = finished_stages(stage.run_dir, stage.settings.stages, [row.name for row in stage.pipeline])
    stage.settings.stages = [folder.name for folder in found]
    stage.inputs = {str(folder): "run" for folder in found}


def check(settings):
    """{folder: manifest} of the finished stages. Raises InputError where there are none."""
    if not settings.stages:
        raise InputError(f"{settings.run_dir}: no stage has finished in there: nothing to report")
    folders = [Path(settings.run_dir) / name for name in settings.stages]
    return {folder: read_manifest(folder) for folder in folders}


@program(ReportSettings, check, inputs=find_stages)
def main(settings, stage, found):
    stage.open()

    fertility, bpb, encoder = fertility_claim(found), bpb_claim(found, stage.run_dir), encoder_claims(found)
    with atomic_file(stage.folder / "report.html", "w", encoding="utf-8") as file:
        file.write(page(settings.title, stage.run_dir, found, fertility, bpb, encoder))
    speeds = {name: m["result"]["tokens_per_second"] for name, (_, m) in by_program(found, *TRAINING).items()}
    stage.finish({"fertility": fertility, "bits_per_byte": bpb, "encoders": encoder, "tokens_per_second": speeds})
    if f := fertility:
        figures = f"{f['base_fertility']:.2f} → {f['fertility']:.2f} tokens per word ({f['base']} → {f['custom']})"
        print(f"fertility      {figures}; fewer: {VERDICT[f['holds']]}")
    if b := bpb:
        figures = f"{b['bits_per_byte']:.3f} {b['model']}, {b['control_bits_per_byte']:.3f} {b['control']}, its control"
        seen = f"{short(b['utf8_bytes_seen'], 'B')} and {short(b['control_utf8_bytes_seen'], 'B')} seen"
        print(f"bits per byte  {figures} ({seen}); fewer: {VERDICT[b['holds']]}")
    for name, e in encoder.items():
        figures = f"{e['metric']} {e['score']:.3f} {e['encoder']}, {e['random']:.3f} random weights"
        print(f"{name:<14} {figures}; better, interval and all: {VERDICT[e['holds']]}")
    if speeds:
        print("tokens/s       " + ", ".join(f"{speed:,.0f} {name}" for name, speed in speeds.items()))
    print(f"report         {stage.folder}/report.html")


if __name__ == "__main__":
    main()
