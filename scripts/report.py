"""One page of everything in a run folder: claims as measured, tokenizers, losses, bits per byte, generations, manifests.

    python scripts/report.py --run_dir runs/quickstart --output_dir runs/try/report
    python scripts/report.py --config recipes/quickstart/report.yaml --check

OUTPUT_DIR/report.html is one file that loads nothing else. A section is there if a stage for it has finished; what a stage
is for is read from its manifest's `program`, not from its name. The text a model has seen in training is added up along its
inputs, from the model that all began with. Its control is a model that began with the same one, kept its tokenizer, and has
seen as much text (within 5 %).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from jinja2 import Environment, PackageLoader

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.pipeline.inputs import Input
from dilqur.pipeline.manifest import read_manifest
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.report import sections
from dilqur.report.chart import short
from dilqur.report.claims import VERDICT, bpb_claim, by_program, encoder_claims, fertility_claim, finished_stages


@dataclass(kw_only=True)
class ReportSettings(StageSettings):
    run_dir: Annotated[str, Input("run")] | None = setting(
        "run folder; runs/NAME for recipes/NAME/STAGE.yaml", default=None
    )
    title: str = setting("what the page is called", default="What the run gave")
    stages: list[str] | None = setting("stages to show; all that have finished", default=None)


def page(title, run_dir, found, *claims):
    """The whole page, as HTML."""
    blocks = {
        "Summary": sections.summary(found, run_dir, *claims),
        "Tokenizers": sections.tokenizers(found),
        "Training": sections.training(found, run_dir),
        "Bits per byte": sections.bits_per_byte(found, run_dir),
        "Vocabulary study": sections.vocabulary_study(found),
        "Encoders": sections.encoders(found),
        "Fine-tuning": sections.fine_tuning(found),
        "Generations": sections.generations(found),
        "Manifests": sections.manifests(found),
    }
    minutes, ended = sum(m["seconds"] for m in found.values()) / 60, max(m["ended"] for m in found.values())
    about = f"{len(found)} stages of {run_dir}, {minutes:,.1f} minutes in all; the last one ended {ended}."
    templates = Environment(
        loader=PackageLoader("dilqur.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = {name: found_blocks for name, found_blocks in blocks.items() if found_blocks}
    return templates.get_template("page.html.jinja").render(title=title, about=about, sections=shown)


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
    speeds = {name: m["result"]["tokens_per_second"] for name, (_, m) in by_program(found, *sections.TRAINING).items()}
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
