"""One page of everything in a run folder: claims as measured, tokenizers, losses, bits per byte, generations, manifests.

    python scripts/report.py --run_dir runs/quickstart --output_dir /tmp/report
    python scripts/report.py --config recipes/quickstart/report.yaml --check

OUTPUT_DIR/report.html is one file that loads nothing else. A section is there if a stage for it has finished; what a stage
is for is read from its manifest's `program`, not from its name. A model's bytes seen are added up along its inputs, from
the model that all began with: a model that went through a transplant is compared with one that did not, began with the
same model, and has seen as many bytes (within 5 %).
"""

import json
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated

from dilqur.atomic import atomic_file
from dilqur.documents import read_jsonl
from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Input, Stage, StageSettings, file_identity, read_manifest

TRAINING = ("cpt.py", "mlm.py")
EQUAL = 0.05  # bytes seen that differ by less count as equal
VERDICT = {True: "holds", False: "does not hold at this size"}


@dataclass(kw_only=True)
class ReportSettings(StageSettings):
    run_dir: Annotated[str, Input("run")] | None = field(default=None, metadata={"help": "run folder; runs/NAME with a recipe"})
    title: str = field(default="What the run gave", metadata={"help": "what the page is called"})
    stages: list[str] | None = field(default=None, metadata={"help": "stages to show; all that have finished"})


# -- what was measured ------------------------------------------------------------------------------------------------


def finished_stages(run_dir, names, order):
    """{name: (folder, manifest)} of the finished stages, those of pipeline.txt in its order; reports are left out."""
    folders = [path.parent for path in Path(run_dir).glob("*/manifest.json")]
    if missing := set(names or ()) - {folder.name for folder in folders}:
        raise InputError(f"stages: {sorted(missing)[0]} has not finished in {run_dir}")
    found = {f.name: (f, read_manifest(f)) for f in folders if not names or f.name in names}
    found = {name: pair for name, pair in found.items() if pair[1].get("program") not in (None, "report.py")}
    place = {name: number for number, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (place.get(item[0], len(place)), item[1][1]["started"], item[0])))


def by_program(found, *programs):
    return {name: manifest for name, (_, manifest) in found.items() if manifest["program"] in programs}


@dataclass
class Lineage:
    """Where a model comes from. utf8_bytes: of text, seen in training since `origin`; programs: that made it, in order."""

    origin: str
    utf8_bytes: int = 0
    programs: tuple = ()


def lineage(path, run_dir):
    """Lineage of the model at `path`: up through the `model_name_or_path` of the stages, to one from random weights or from
    elsewhere. A run folder that was moved is searched under its own name."""
    folder = Path(path).parent if Path(path).name == "model" else Path(path)
    folder = folder if folder.exists() else Path(run_dir) / folder.name
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
    source = manifest.get("arguments", {}).get("model_name_or_path")
    if not isinstance(source, str):
        return Lineage(folder.name)
    before = lineage(source, run_dir)
    seen = before.utf8_bytes + manifest["result"].get("utf8_bytes_seen", 0)
    return Lineage(before.origin, seen, (*before.programs, manifest["program"]))


def fertility_claim(found):
    """The custom tokenizer (a transplant's, else the last one measured) against the first of the others; None without both."""
    wanted = {m["result"]["tokenizer_sha256"] for m in by_program(found, "transplant_tokenizer.py").values()}
    claim = None
    for manifest in by_program(found, "eval_tokenizer.py").values():
        measured = manifest["result"]["tokenizers"]
        custom = next((n for n, r in measured.items() if r["tokenizer_sha256"] in wanted), list(measured)[-1])
        base = next((n for n in measured if n != custom), None)
        if base:
            before, after = measured[base]["fertility"], measured[custom]["fertility"]
            claim = {"base": base, "custom": custom, "base_fertility": before, "fertility": after, "holds": after < before}
    return claim


def bpb_claim(found, run_dir):
    """The pair (with another tokenizer, control) that has seen most, both equally much; None if there is no such pair."""
    claims = []
    for manifest in by_program(found, "eval_bpb.py").values():
        models = manifest["result"]["models"]
        past = {name: lineage(model["model"], run_dir) for name, model in models.items()}
        trained = [n for n, line in past.items() if line.utf8_bytes and "sft.py" not in line.programs]
        custom = [n for n in trained if "transplant_tokenizer.py" in past[n].programs]
        for name, control in ((n, c) for n in custom for c in trained if c not in custom):
            seen, seen_by_control = past[name].utf8_bytes, past[control].utf8_bytes
            equal = abs(seen - seen_by_control) < EQUAL * max(seen, seen_by_control)
            if equal and past[name].origin == past[control].origin:
                bits, bits_of_control = models[name]["bits_per_byte"], models[control]["bits_per_byte"]
                claims.append({"model": name, "control": control, "bits_per_byte": bits, "control_bits_per_byte": bits_of_control,
                               "utf8_bytes_seen": seen, "control_utf8_bytes_seen": seen_by_control, "holds": bits < bits_of_control})
    return max(claims, key=lambda c: c["utf8_bytes_seen"], default=None)


def changed_inputs(manifest):
    """Names of the stages this one was made from that have been made again since."""
    files = {Path(f): was for i in manifest["inputs"].values() for f, was in i["files"].items() if Path(f).name == "manifest.json"}
    return sorted({f.parent.name for f, was in files.items() if f.exists() and file_identity(f)["xxh3"] != was["xxh3"]})


def records(path):
    if not path.exists():
        raise InputError(f"{path}: missing, though {path.parent.name} has finished: run that stage again")
    return [record for _, record in read_jsonl(str(path))]


# -- HTML -------------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup. Any other value is text and is escaped on its way into the page."""


def text(value):
    return value if isinstance(value, Html) else "–" if value is None else escape(str(value))


def tag(name, *parts, **attributes):
    """<name attributes>parts</name>; `class_` is the attribute class."""
    words = "".join(f' {key.strip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>{''.join(map(text, parts))}</{name}>")


def table(head, rows, words=()):
    """A table that scrolls in its own container. The first column and those in `words` are text, the others numbers."""
    kind = [{} if i == 0 or i in words else {"class_": "number"} for i in range(len(head))]
    lines = [tag("tr", *(tag("th", h, scope="col", **k) for h, k in zip(head, kind, strict=True)))]
    for row in rows:
        cells = zip(row[1:], kind[1:], strict=True)
        lines.append(tag("tr", tag("th", row[0], scope="row"), *(tag("td", c, **k) for c, k in cells)))
    return tag("div", tag("table", tag("thead", lines[0]), tag("tbody", *lines[1:])), class_="scroll", tabindex=0)


def bar(value, largest):
    return tag("span", class_="bar", style=f"width: {6 * value / largest:.2f}rem")


def short(number, unit=""):
    """1,467,205 → 1.47 M; with unit "B": 1.47 MB."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {letter}{unit}"
    return f"{number:,.3g} {unit}".strip()


def ticks(low, high):
    """Some five round numbers around [low, high]."""
    span = (high - low) or 1
    power = 10 ** math.floor(math.log10(span / 5))
    step = power * next(m for m in (1, 2, 5, 10) if span / (power * m) <= 5)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def chart(series, x_label, y_label, unit):
    """Lines as an SVG that follows the page's colours. series: {name: (colour, [(x, y), …], [(x, y), …])}; the second are dots."""
    points = [p for _, line, dots in series.values() for p in (*line, *dots)]
    xs, ys = ticks(0, max(p[0] for p in points)), ticks(min(p[1] for p in points), max(p[1] for p in points))
    left, right, top, bottom = 52, 744, 12, 290

    def at(x, y):
        return f"{left + (right - left) * x / xs[-1]:.1f}", f"{bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0]):.1f}"

    parts = []
    for y in ys:
        parts.append(tag("line", x1=left, x2=right, y1=at(0, y)[1], y2=at(0, y)[1], class_="grid"))
        parts.append(tag("text", f"{y:g}", x=left - 8, y=at(0, y)[1], dy="0.32em", text_anchor="end"))
    parts += [tag("text", short(x, unit), x=at(x, ys[0])[0], y=bottom + 20, text_anchor="middle") for x in xs]
    parts.append(tag("text", x_label, x=right, y=bottom + 40, text_anchor="end"))
    for name, (colour, line, dots) in series.items():
        path = "M" + "L".join(" ".join(at(*p)) for p in line)
        parts.append(tag("path", tag("title", name), d=path, style=f"stroke: var(--c{colour})"))
        for x, y in dots:
            cx, cy = at(x, y)
            parts.append(tag("circle", tag("title", f"{name}: {y:.4f}"), cx=cx, cy=cy, r=4.5, style=f"fill: var(--c{colour})"))
    keys = [tag("li", tag("span", class_="key", style=f"background: var(--c{c})"), n) for n, (c, _, _) in series.items()]
    drawing = tag("svg", *parts, viewBox="0 0 760 336", role="img", aria_label=f"{y_label}: {', '.join(series)}")
    return tag("figure", tag("figcaption", tag("b", y_label)), tag("ul", *keys, class_="keys"),
               tag("div", Html(drawing.replace("text_anchor", "text-anchor").replace("aria_label", "aria-label")), class_="scroll"))


def thin(points, most=400):
    """At most `most` points: the means of as many stretches of equal length."""
    size = -(-len(points) // most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(p[1] for p in part) / len(part)) for part in parts]


# -- the sections: each returns its parts, none where the stages for it are not there ---------------------------------------


def summary(found, run_dir, fertility, bpb):
    def card(title, figure, verdict, *more):
        judged = tag("p", VERDICT[verdict], class_=f"verdict {'yes' if verdict else 'no'}")
        return tag("div", tag("h3", title), tag("p", figure, class_="figure"), judged, *(tag("p", m) for m in more), class_="card")

    cards, notes = [], []
    if fertility:
        f = fertility
        cards.append(card("Fewer tokens a word", f"{f['base_fertility']:.2f} → {f['fertility']:.2f}", f["holds"],
                          f"{f['base']} → {f['custom']}, on the same text"))
    if bpb:
        seen = f"{short(bpb['utf8_bytes_seen'], 'B')} and {short(bpb['control_utf8_bytes_seen'], 'B')} of text seen in training"
        cards.append(card("Fewer bits a byte than the control", f"{bpb['bits_per_byte']:.4f} against {bpb['control_bits_per_byte']:.4f}",
                          bpb["holds"], f"{bpb['model']} against {bpb['control']}, the control: {seen}"))
    for manifest in by_program(found, "eval_bpb.py").values():
        each = [f"{name} {m['bits_per_byte']:.4f} ({short(lineage(m['model'], run_dir).utf8_bytes, 'B')})"
                for name, m in manifest["result"]["models"].items()]
        notes.append(tag("p", "Bits per byte of held-out text, and text seen in training since the common base: ", "; ".join(each), "."))
        if not bpb:
            notes.append(tag("p", "No two models, one with a transplanted tokenizer and one without, began with the same model and "
                                  "saw as much text: there is no comparison at equal bytes seen in this run."))
    if again := {n: c for n, (_, m) in found.items() if (c := changed_inputs(m))}:
        notes.append(tag("p", "Made from something that has been made again since: ",
                         "; ".join(f"{n} (from {', '.join(c)})" for n, c in again.items()), ". Run them again.", class_="warning"))
    return [*([tag("div", *cards, class_="cards")] if cards else []), *notes]


def tokenizers(found):
    parts = []
    for manifest in by_program(found, "eval_tokenizer.py").values():
        rows = manifest["result"]["tokenizers"]
        largest = max(r["fertility"] for r in rows.values())
        parts.append(table(["tokenizer", "tokens a word", "", "bytes a token", "words kept whole", "vocabulary", "of it occurs", "tokens"], [
            [name, bar(r["fertility"], largest), f"{r['fertility']:.3f}", f"{r['bytes_per_token']:.3f}", f"{r['words_kept_whole']:.1%}",
             f"{r['vocab_size']:,}", f"{r['vocab_share_used']:.1%}", f"{r['tokens']:,}"] for name, r in rows.items()], words=(1,)))
        parts.append(tag("p", "On ", ", ".join(manifest["arguments"]["input"]), ". Tokens a word is the fertility: tokens without special "
                              "tokens / whitespace-separated words."))
    return parts


def training(found, run_dir):
    stages, losses, comparable, rows = by_program(found, *TRAINING), {}, {}, []
    for number, (name, manifest) in enumerate(stages.items()):
        r, source = manifest["result"], manifest["arguments"].get("model_name_or_path")
        steps = records(found[name][0] / "metrics.jsonl")
        each, colour = r["tokens"] / r["steps"], number % 8
        line = thin([(s["step"] * each, s["loss"]) for s in steps])
        losses[name] = colour, line, [(s["step"] * each, s["eval_loss"]) for s in steps if "eval_loss" in s]
        if source and manifest["program"] == "cpt.py":
            begin, a_token = lineage(source, run_dir).utf8_bytes, r["utf8_bytes_seen"] / r["tokens"]
            comparable[name] = colour, [(begin + tokens * a_token, loss / math.log(2) / a_token) for tokens, loss in line], []
        memory = max((s["peak_memory_gb"] for s in steps if "peak_memory_gb" in s), default=None)
        rows.append([name, f"{r['steps']:,}", short(r["tokens"]), short(r["utf8_bytes_seen"], "B"), f"{r['loss']:.4f}",
                     r["eval_loss"] and f"{r['eval_loss']:.4f}", f"{r['tokens_per_second']:,.0f}", memory and f"{memory:.1f} GB",
                     f"{r['trainable']:,} of {r['parameters']:,}", r["strategy"], r["processes"]])
    if not rows:
        return []
    parts = [table(["stage", "steps", "tokens", "text seen", "loss", "eval_loss", "tokens/s", "peak memory", "parameters trained",
                    "strategy", "processes"], rows, words=(9,)),
             chart(losses, "tokens seen in the stage", "Loss a token (line) and eval_loss (dots), nats", ""),
             tag("p", "A loss a token compares only between stages of one tokenizer: longer tokens are harder to guess, and fewer.")]
    if comparable:
        parts += [chart(comparable, "text seen since the common base", "Training loss in bits a byte", "B"),
                  tag("p", "The same losses / ln 2 / (bytes of text a token), which does compare between tokenizers. A line begins where "
                           "the stage before it ended; a base trained from random weights is left out.")]
    return parts


def bits_per_byte(found, run_dir):
    parts = []
    for manifest in by_program(found, "eval_bpb.py").values():
        models = manifest["result"]["models"]
        past, largest = {n: lineage(m["model"], run_dir) for n, m in models.items()}, max(m["bits_per_byte"] for m in models.values())
        parts.append(table(["model", "bits a byte", "", "text seen", "since", "bits a token", "bits a word", "tokens of the text"], [
            [name, bar(m["bits_per_byte"], largest), f"{m['bits_per_byte']:.4f}", short(past[name].utf8_bytes, "B"), past[name].origin,
             f"{m['bits_per_token']:.3f}", f"{m['bits_per_word']:.3f}", f"{m['tokens']:,}"] for name, m in models.items()], words=(1, 4)))
        first = next(iter(models.values()))
        parts.append(tag("p", f"{first['documents']:,} held-out documents, {first['utf8_bytes']:,} bytes of UTF-8, at most "
                              f"{first['max_length']:,} tokens at once. Fewer is better. Text seen: in training, since the model named beside it."))
    return parts


def fine_tuning(found):
    rows = []
    for name, manifest in by_program(found, "sft.py").items():
        r = manifest["result"]
        rows.append([name, Path(manifest["arguments"]["model_name_or_path"].removesuffix("/model")).name, r["steps"],
                     f"{r['conversations']['train']:,} + {r['conversations']['validation']:,}", r["too_long"], r["bad_record"],
                     f"{r['trained_tokens']:,}", f"{r['loss_first']:.4f} → {r['loss']:.4f}", r["eval_loss"] and f"{r['eval_loss']:.4f}",
                     f"{r['trainable']:,}"])
    return rows and [table(["stage", "from", "steps", "conversations: trained + held out", "too long", "bad", "tokens with loss", "loss",
                            "eval_loss", "parameters trained"], rows, words=(1,))]


def generations(found):
    language = next((m["arguments"].get("language") for m in by_program(found, "clean_corpus.py").values()), None)
    spoken, parts = {"lang": language} if language else {}, []
    for name, manifest in by_program(found, "compare_generations.py").items():
        rows = [[n, f"{s['repetition']:.3f}", f"{s['ended']:.0%}", f"{s['words']:.1f}"] for n, s in manifest["result"]["models"].items()]
        parts.append(table(["model", "repetition (rep-4)", "ends by itself", "words an answer"], rows))
        parts.append(tag("p", "rep-4: 1 − distinct 4-grams / 4-grams of words; 0 repeats nothing."))
        for record in records(found[name][0] / "generations.jsonl"):
            answers = [tag("div", tag("h4", model), tag("p", " ".join(a["text"].split()) or "(nothing)", **spoken),
                           tag("p", f"repetition {a['repetition']:.2f}, {a['tokens']} tokens{'' if a['ended'] else ', cut off'}", class_="note"),
                           class_="card") for model, a in record["answers"].items()]
            parts += [tag("h3", record["prompt"], **spoken), tag("div", *answers, class_="cards")]
    return parts


def manifests(found):
    first, rows, raw = next(iter(found.values()))[1], [], []
    for name, (_, m) in found.items():
        versions = ", ".join(f"{p} {v}" for p, v in m["packages"].items() if v != first["packages"].get(p)) or "as above"
        git = m["git"] or {"commit": None, "dirty": None}
        rows.append([name, m["program"], m["started"].replace("T", " ").rstrip("Z"), f"{m['seconds']:,.1f}", git["commit"] and git["commit"][:10],
                     {True: "yes", False: "no"}.get(git["dirty"]), ", ".join(changed_inputs(m)) or "none", versions])
        raw.append(tag("details", tag("summary", name), tag("pre", json.dumps(m, indent=1, ensure_ascii=False))))
    hardware = first["hardware"]
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", f"{hardware['memory_gb']:g} GB", *hardware["gpus"]])
    return [tag("p", f"{first['stage']} ran on {machine}, with Python {hardware['python']}, ",
                ", ".join(f"{p} {v}" for p, v in first["packages"].items() if v), "."),
            table(["stage", "program", "started (UTC)", "seconds", "commit", "uncommitted changes", "inputs changed since", "versions"], rows,
                  words=(1, 2, 4, 5, 6, 7)), *raw]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #59636e; --line: #d9dee3; --paper: #fff; --card: #f5f7f9; --yes: #1a7f4b; --no: #a8480c;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0578d; --c4: #8a6d00; --c5: #3a9bd9; --c6: #6b6b6b; --c7: #7a4fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #343b43; --paper: #14181d; --card: #1d2329; --yes: #4cc38a;
  --no: #f0955a; --c0: #56b4e9; --c1: #ff8c42; --c2: #2fc79a; --c3: #e39ac6; --c4: #e0c043; --c5: #9fd3ff; --c6: #b0b0b0; --c7: #b79cf0; } }
body { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.3rem; margin: 3rem 0 1rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: .85rem; margin: 0 0 .35rem; color: var(--soft); } p { margin: .5rem 0; max-width: 46rem; } a { color: inherit; }
nav a { margin-right: 1rem; } header p, section > p, .note { color: var(--soft); font-size: .9rem; } section > .warning { color: var(--no); }
.scroll { overflow-x: auto; margin: .75rem 0; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: normal; }
thead th { color: var(--soft); font-size: .8rem; vertical-align: bottom; } tbody th { font-weight: 600; } .number { text-align: right; }
.bar { display: inline-block; height: .8rem; background: var(--c0); border-radius: 2px; } td:has(.bar) + td { padding-left: 0; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
.card { background: var(--card); border-radius: 6px; padding: .9rem 1rem; } .card h3 { margin: 0; } .card p { margin: .25rem 0; font-size: .9rem; }
.card .figure { font-size: 1.5rem; font-weight: 600; } .card .verdict { font-weight: 600; } .yes { color: var(--yes); } .no { color: var(--no); }
figure { margin: 1.5rem 0 0; } svg { width: 100%; min-width: 34rem; max-width: 60rem; font-size: 12px; } svg text { fill: var(--soft); }
path { fill: none; stroke-width: 1.6; stroke-linejoin: round; } circle { stroke: var(--paper); stroke-width: 1.5; } .grid { stroke: var(--line); }
.keys { list-style: none; padding: 0; margin: .25rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; } summary { cursor: pointer; } pre { overflow: auto; max-height: 30rem; font-size: .8rem; }
"""


def page(title, run_dir, found, fertility, bpb):
    """The whole page as a string."""
    sections = {"Summary": summary(found, run_dir, fertility, bpb), "Tokenizers": tokenizers(found), "Training": training(found, run_dir),
                "Bits per byte": bits_per_byte(found, run_dir), "Fine-tuning": fine_tuning(found), "Generations": generations(found),
                "Manifests": manifests(found)}
    sections = {name: parts for name, parts in sections.items() if parts}
    links = [tag("a", name, href=f"#{name.lower().replace(' ', '-')}") for name in sections]
    ended, seconds = max(m["ended"] for _, m in found.values()), sum(m["seconds"] for _, m in found.values())
    about = f"{len(found)} stages of {run_dir}, {seconds / 60:,.1f} minutes in all, the last one ended {ended.replace('T', ' ').rstrip('Z')} UTC."
    head = tag("head", Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
               tag("title", title), tag("style", Html(STYLE)))
    header = tag("header", tag("h1", title), tag("p", about), tag("nav", *links))
    body = [tag("section", tag("h2", name, id=name.lower().replace(" ", "-")), *parts) for name, parts in sections.items()]
    return "<!doctype html>\n" + tag("html", head, tag("body", header, tag("main", *body)), lang="en") + "\n"


@program
def main():
    settings = parse(ReportSettings, __doc__)
    stage = Stage(settings, __file__)
    if not stage.run_dir:
        raise InputError("--run_dir missing: give it, or a recipe (--config)")
    found = finished_stages(stage.run_dir, settings.stages, [row.name for row in stage.pipeline])
    settings.stages = list(found)  # into the manifest: with another stage finished, this report is no longer that of the run
    stage.inputs |= {str(folder): "run" for folder, _ in found.values()}
    stage.refuse_finished()
    if not found:
        raise InputError(f"{stage.run_dir}: no stage in it has finished: nothing to report")
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()

    fertility, bpb = fertility_claim(found), bpb_claim(found, stage.run_dir)
    with atomic_file(stage.folder / "report.html", "w", encoding="utf-8") as file:
        file.write(page(settings.title, stage.run_dir, found, fertility, bpb))
    speeds = {name: m["result"]["tokens_per_second"] for name, m in by_program(found, *TRAINING).items()}
    stage.finish({"fertility": fertility, "bits_per_byte": bpb, "tokens_per_second": speeds})
    if fertility:
        print(f"fertility      {fertility['base_fertility']:.2f} → {fertility['fertility']:.2f} tokens a word "
              f"({fertility['base']} → {fertility['custom']}): {VERDICT[fertility['holds']]}")
    if bpb:
        print(f"bits per byte  {bpb['bits_per_byte']:.4f} {bpb['model']}, {bpb['control_bits_per_byte']:.4f} {bpb['control']}, at "
              f"{short(bpb['utf8_bytes_seen'], 'B')} of text seen: {VERDICT[bpb['holds']]}")
    if speeds:
        print("tokens/s       " + ", ".join(f"{speed:,.0f} {name}" for name, speed in speeds.items()))
    print(f"report         {stage.folder}/report.html")
    return None


if __name__ == "__main__":
    main()
