"""How far a recipe's stages are, on one screen: what `slurm/pipeline.sh NAME --status` prints. Standard library only, for a login node.

A stage's folder says most of it: manifest.json (finished), FAILED, REQUEUE, .lock (held by whoever writes there),
checkpoints, the last lines of metrics.jsonl. Slurm says what became of the jobs that slurm/pipeline.sh and
slurm/lib/run_stages.sh wrote into runs/NAME/jobs."""

import contextlib
import fcntl
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

from dilqur.pipeline.records import last_records

Job = namedtuple("Job", "number batch state where")  # where: its nodes, or why it waits
HEAD = ("stage", "state", "job", "step", "loss", "tokens/s", "left", "")


def ask(*command):
    """Standard output of a command of Slurm, or "" where there is none, or it fails (a job it has forgotten)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def read_jobs(folder):
    """{stage: its newest Job} of the lines of `folder`/jobs, "JOB BATCH STAGE …"."""
    file = folder / "jobs"
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    numbers = sorted({row[0] for row in rows})
    queued = {}
    if numbers:
        # an array of several tasks has several lines: one that runs says more than one that waits
        said = ask("squeue", "--noheader", f"--jobs={','.join(numbers)}", "--format=%F|%T|%R").splitlines()
        for number, state, where in sorted((line.split("|", 2) for line in said), key=lambda r: r[1] == "RUNNING"):
            queued[number] = (state, where)
    newest = {}
    for number, batch, *stages in rows:
        for stage in stages:
            newest[stage] = (number, batch)
    ended = {n: queued.get(n) or (state_of_ended(n), "") for n, _ in newest.values()}
    return {stage: Job(n, batch, *ended[n]) for stage, (n, batch) in newest.items()}


def state_of_ended(number):
    """Slurm's word for how a job ended: COMPLETED, CANCELLED, TIMEOUT, NODE_FAIL, …; "" once it has forgotten."""
    found = re.search(r"\bJobState=(\w+)", ask("scontrol", "show", "job", "-o", number))
    return (
        found[1] if found else ask("sacct", "-nX", "-o", "State", "-j", number).split(" by ")[0].strip().split("\n")[0]
    )


def writer_of(folder):
    """Who has the folder's lock, as its file says it ("" if it does not), or None. Asked for as a shared one: two may look at once."""
    with contextlib.suppress(OSError), (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip()
    return None


def newest_checkpoint(folder):
    """Its name, or None."""
    return max((file.parent.name for file in folder.glob("checkpoints/step-*/COMPLETE")), default=None)


def measured(folder):
    """(step, loss, tokens/s, left) of metrics.jsonl, as words; the rate is the median of the lines at the end."""
    records = last_records(folder, 200)
    if not records:
        return ("",) * 4
    last, rates = records[-1], [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
    step = f"{last['step']}/{last['max_steps']}" if "max_steps" in last else str(last["step"])
    loss = f"{last['loss']:.3f}" if last.get("loss") is not None else ""
    rate = f"{statistics.median(rates):,.0f}" if rates else ""
    return step, loss, rate, str(timedelta(seconds=round(last.get("seconds_left", 0))))


def why(text, folder):
    """What FAILED says, and the last line of the job's log that begins with `error:`, which is what a program says of a mistake."""
    log = re.search(r"; see (.+)\)$", text)
    lines = []
    with contextlib.suppress(OSError):
        if log:
            lines = Path(log[1]).read_text(errors="replace").splitlines()
    return [text, *[line for line in lines if line.startswith("error: ")][-1:]]


def row_of(stage, folder, job):
    """A stage's row, and lines to stand under it."""
    number = job.number if job else ""
    if (folder / "manifest.json").exists():
        done = json.loads((folder / "manifest.json").read_text())
        return (stage, "finished", number, "", "", "", "", f"{done['ended']}, {int(done['seconds'])} s"), []
    numbers, newest = measured(folder), newest_checkpoint(folder)
    waits = job and job.state and job.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
    goes_on = f"goes on from {newest or 'its start'}"
    if (writer := writer_of(folder)) is not None:
        asked = ", asked to stop" if (folder / "STOP").exists() else ""
        where = job.where if job and job.state == "RUNNING" else writer or "a process"
        return (stage, "running", number, *numbers, f"{where}{f', saved {newest}' if newest else ''}{asked}"), []
    if (folder / "FAILED").exists() and not waits:
        first, *more = why((folder / "FAILED").read_text().strip(), folder)
        return (stage, "failed", number, *numbers, first), more
    if waits:
        begun = (folder / ".lock").exists() or newest
        return (stage, "queued", number, *numbers, f"{job.where}{f', {goes_on}' if begun else ''}"), []
    if job and job.state == "RUNNING" and (folder / ".job").exists():
        return (stage, "starting", number, *numbers, job.where), []
    if job and job.state == "RUNNING":
        return (stage, "next", number, "", "", "", "", job.where), []
    if job and job.state not in ("", "COMPLETED") and not (folder / "REQUEUE").exists():
        begun = f", {goes_on} when started again" if (folder / ".lock").exists() or newest else ""
        return (stage, job.state.lower().replace("_", " "), number, *numbers, begun.removeprefix(", ")), []
    if (folder / "REQUEUE").exists():
        return (stage, "stopped", number, *numbers, f"{goes_on} when started again"), []
    if (folder / ".lock").exists() or newest:
        return (stage, "interrupted", number, *numbers, f"{goes_on} when started again"), []
    return (stage, "not started", "", "", "", "", "", ""), []


def main(name, *stages):
    run = Path("runs", name)
    jobs = read_jobs(run)
    for earlier, stage in itertools.pairwise(stages):
        job, before = jobs.get(stage), jobs.get(earlier)
        if job and job.where == "(Dependency)" and before:
            same = before.number == job.number  # then what that one waits for
            jobs[stage] = job._replace(where=before.where if same else f"after job {before.number}")
    rows = [row_of(stage, run / stage, jobs.get(stage)) for stage in stages]
    cells = [HEAD, *[row for row, _ in rows]]
    used = [i for i in range(len(HEAD)) if i in (0, 1) or any(row[i] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cells) for i in used}
    for row, more in [(HEAD, []), *rows]:
        texts = [f"{row[i]:>{widths[i]}}" if 3 <= i <= 6 else f"{row[i]:<{widths[i]}}" for i in used]
        print("  ".join(texts).rstrip())
        for line in more:
            print(f"{'':<{widths[0]}}  {line}")


if __name__ == "__main__":
    main(*sys.argv[1:])
