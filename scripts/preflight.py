"""Checks in a second or two, on a login node, what a GPU hour could be lost to: without torch, and leaving nothing behind.

    python scripts/preflight.py recipes/quickstart
    python scripts/preflight.py --config recipes/quickstart/cpt-2-full.yaml --num_processes 2 --json

A folder: every stage of its pipeline.txt, in order; a recipe: its stage and the variants of it; then their batch files. A line a
check: ok, FAIL, skipped (and why), or later, where a stage above has to finish first; what can be known before that is checked now.
Exit code 2 if anything FAILs. The number of processes is the batch file's nodes × GPUs unless given; where Slurm answers, it is asked
what each batch file asks for on this site. What only nodes can tell: scripts/check_nodes.py.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dilqur.common.constants import ROOT
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.preflight.batch_file import check_file, read_batch_file
from dilqur.preflight.cluster import check_slurm, check_submit
from dilqur.preflight.findings import Findings
from dilqur.preflight.machine import check_driver, check_gpus, check_packages
from dilqur.preflight.planned import Context, StagePlan, rows_of
from dilqur.preflight.site import check_image, check_site
from dilqur.preflight.size_checks import check_files, check_main_memory, check_memory, check_space, check_time
from dilqur.preflight.stage_checks import (
    check_batch,
    check_conversations,
    check_fit,
    check_inputs,
    check_model,
    check_output,
    check_recipe,
    check_shards,
    check_strategy,
)


@dataclass(kw_only=True)
class PreflightSettings:
    recipe: str = setting("folder with a pipeline.txt, or a recipe in one (also as --config)")
    run_dir: str | None = setting("run folder; runs/NAME for recipes/NAME", default=None, recorded=False)
    num_processes: Annotated[int, Field(ge=1)] | None = setting("GPUs in all; those of the batch file", default=None)
    verify: bool = setting("read every shard and compare the checksums", default=False)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)
    check: bool = setting("check the arguments, print nothing else", default=False, recorded=False)


CHECKS = (
    check_shards,
    check_model,
    check_fit,
    check_conversations,
    check_strategy,
    check_batch,
    check_output,
    check_space,
    check_files,
    check_memory,
    check_main_memory,
    check_time,
)


def check_stage(findings, planned, known, wanted):
    """All checks of a stage. Of a finished one only what its own program says; of one not `wanted` nothing."""
    name, first = planned.row.name, len(findings.lines)
    whole = findings.run(name, check_recipe, planned, known) and findings.run(name, check_inputs, planned, known)
    if not wanted:
        del findings.lines[first:]
    elif whole and (planned.stage.folder / "manifest.json").exists():
        findings.run(name, check_fit, planned, known)
        findings.lines[first:] = findings.lines[-1:]
    elif whole:
        failed = set()
        for check in CHECKS:
            if not (check is check_fit and failed) and not findings.run(name, check, planned, known):
                failed.add(check)


@program(
    PreflightSettings, lambda settings: rows_of(Path(settings.recipe)), positional="recipe", config_is_positional=True
)
def main(settings, checked):
    folder, rows, chosen = checked

    # -- this machine, and the cluster it belongs to ------------------------------------------------------------------

    findings, known, site, partitions = Findings(), Context(verify=settings.verify), {}, {}
    findings.run("", check_packages)
    findings.run("", check_gpus, known.gpus)
    findings.run("", check_site, site)
    os.environ.update(site)  # as slurm/lib/launch.sh will
    findings.run("", check_image)
    findings.run("", check_slurm, partitions)
    known.on_a_cluster = bool(partitions)

    # -- the batch files ----------------------------------------------------------------------------------------------

    files = {row.batch: read_batch_file(ROOT / "slurm" / f"{row.batch}.sbatch") for row in rows}
    for name in dict.fromkeys(row.batch for row in rows if row.name in chosen):
        batch_file = files[name]
        findings.run(batch_file.path.name, check_submit, batch_file, folder.name, partitions)
        findings.run(batch_file.path.name, check_file, batch_file)

    # -- the stages ---------------------------------------------------------------------------------------------------

    for row in rows:
        where = ["--run_dir", settings.run_dir] if settings.run_dir else []
        batch_file = files[row.batch]
        processes = batch_file.nodes * batch_file.gpus or int(os.environ.get("DILQUR_NUM_PROCESSES", 1))
        planned = StagePlan(row, [*row.arguments(folder), *where], batch_file, settings.num_processes or processes)
        known.plans[row.name] = planned
        check_stage(findings, planned, known, wanted=row.name in chosen)
        if row.name == chosen[-1]:
            break
    bf16 = any(getattr(planned.settings, "bf16", False) for planned in known.plans.values())
    findings.run("", check_driver, known.gpus, bf16)

    # -- what was found -----------------------------------------------------------------------------------------------

    findings.report(settings.json, recipe=settings.recipe)


if __name__ == "__main__":
    main()
