"""pipeline.sh, run_stages.sh and launch.sh: the whole chain here, and what they would tell Slurm.

Real programs where their work counts; where only the order of things does, a stub that keeps a stage's promises (STOP,
REQUEUE, manifest.json) in milliseconds. Stand-ins for sbatch, srun, scontrol and accelerate note what they are told.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_LLAMA

from dilqur.pipeline.rows import read_pipeline

STUB = """
import json, pathlib, sys, time
config = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
stage = sys.argv[sys.argv.index("--stage") + 1] if "--stage" in sys.argv else config.stem
folder = pathlib.Path("runs") / config.parent.name / stage
what = dict(line.split(": ") for line in config.read_text().splitlines())
print(stage, "said", *sys.argv[3:], flush=True)
if "hang" in what:  # the watchdog's way out, with a checkpoint made before or without
    (folder / what["hang"]).mkdir(parents=True, exist_ok=True)
    (folder / what["hang"] / "COMPLETE").touch()
    (folder / "REQUEUE").touch()
    sys.exit(1)
if "fail" in what:
    sys.exit(int(what["fail"]))
(folder / "started").touch()
end = time.monotonic() + float(what.get("seconds", 0))
while time.monotonic() < end:
    time.sleep(0.01)
    if (folder / "STOP").exists() and "deaf" not in what:
        if "no_step" not in what:
            steps = len(list(folder.glob("checkpoints/*"))) + 1
            (folder / f"checkpoints/step-{steps:07d}").mkdir(parents=True)
            (folder / f"checkpoints/step-{steps:07d}/COMPLETE").touch()
        (folder / "REQUEUE").touch()
        sys.exit(0)
if "requeue" in what:
    (folder / "REQUEUE").touch()
elif "forget" not in what:
    (folder / "manifest.json").write_text(json.dumps({"ended": "2026-01-02T03:04:05Z", "seconds": 7.5}, indent=1))
"""

NOTE = '#!/bin/bash\nprintf "%s" "$(basename "$0")" >>"$NOTES"; printf " %s" "$@" >>"$NOTES"; echo >>"$NOTES"\n'


class Tree:
    """A checkout in a folder of its own, with `tools/stub.py`, and `fakes/` in front of PATH."""

    def __init__(self, root):
        self.root, self.fakes, self.notes = root, root / "fakes", root / "notes"
        for name in ("fakes", "tools", "recipes", "scripts"):
            (root / name).mkdir(parents=True)
        shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("site.env"))
        for name in ("dilqur", "data_tools", "accelerate_configs", "scripts/cpt.py", "recipes/quickstart"):
            (root / name).symlink_to(ROOT / name)
        (root / "tools" / "stub.py").write_text(STUB)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DILQUR"))}
        path = f"{self.fakes}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **inherited,
            "PATH": path,
            "VIRTUAL_ENV": sys.prefix,
            "CUDA_VISIBLE_DEVICES": "",
            "NOTES": str(self.notes),
            "TMPDIR": str(root),
            "OMP_NUM_THREADS": "1",
        }  # for so tiny models

    def recipe(self, name, table, **stages):
        """recipes/NAME with this pipeline.txt, and RECIPE.yaml of these texts (empty for the recipes not named)."""
        folder = self.root / "recipes" / name
        folder.mkdir()
        (folder / "pipeline.txt").write_text(table)
        for row in read_pipeline(folder):
            (folder / f"{row.recipe}.yaml").write_text(stages.get(row.recipe, ""))

    def fake(self, name, body="", note=True):
        (self.fakes / name).write_text((NOTE if note else "#!/bin/bash\n") + body)
        (self.fakes / name).chmod(0o755)

    def fake_slurm(self):
        """One node: srun starts the program here; scontrol and sbatch only note what they are told."""
        self.fake("srun", 'while [[ $1 == -* ]]; do shift; done; SLURM_STEP_NUM_NODES=1 SLURM_NODEID=0 exec "$@"\n')
        self.fake("scontrol")
        self.fake("sbatch", 'grep -c ^sbatch "$NOTES" | sed "s/^/10/"\n')

    def start(self, *command, **environment):
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.root,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *command, code=0, **environment):
        """The CompletedProcess of `command` in the root; fails unless it exits with `code`."""
        process = self.start(*command, **environment)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{errors}"
        return subprocess.CompletedProcess(command, code, out, errors)

    def noted(self, name=""):
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line for line in lines if line.startswith(name)]

    def __truediv__(self, path):
        return self.root / path


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "checkout")


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not (path.exists() and (path.is_dir() or path.suffix != ".jsonl" or path.stat().st_size)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


# -- the table --------------------------------------------------------------------------------------------------------


def test_bash_gets_the_rows_as_python_reads_them(tree):
    tree.recipe(
        "hard",
        "# no\n\n  one\ttools/stub.py  a\r\ntwo t b --x 1 '{p: q, r: [s]}' \"a b\" c\\ d # more\nthree@b.1@c t c",
    )
    script = 'source slurm/lib/read_site.sh; source slurm/lib/read_rows.sh; read_rows "$1"; printf "%s\\n" "${stages[@]}" "${words_1[@]}"'
    said = tree.run("bash", "-euo", "pipefail", "-c", script, "-", "recipes/hard/").stdout.splitlines()
    assert said[:3] == ["one", "two", "three@b.1@c"]
    assert said[3:] == ["--config", "recipes/hard/two.yaml", "--x", "1", "{p: q, r: [s]}", "a b", "c d"]


@pytest.mark.parametrize("name", ["a/b", "../a", ".a", "-a", "@v", "a@", "a@v/w", "a:b"])
def test_a_name_that_is_no_folders_is_refused(tree, name):
    (tree / "recipes/new").mkdir()
    (tree / "recipes/new/pipeline.txt").write_text(f"{name} t c\n")
    done = tree.run("slurm/pipeline.sh", "new", "--status", code=2)
    assert f"the stage {name} gives a folder its name: take letters, digits and . _ -" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pipeline.sh"], "usage: slurm/pipeline.sh NAME"),
        (["pipeline.sh", "nowhere"], "recipes/nowhere/pipeline.txt: no such file; recipes with one: quickstart small"),
        (["pipeline.sh", "small", "--from", "c"], "recipes/small/pipeline.txt: no stage c; there are: a b"),
        (["pipeline.sh", "small", "--form", "a"], "unknown option --form"),
        (["pipeline.sh", "small", "--local", "--status"], "--status: --local is given already"),
        (["pipeline.sh", "small", "--dry-run"], "small/pipeline.txt: b: slurm/elsewhere.sbatch: no such batch file"),
        (["pipeline.sh", "small", "--local"], "recipes/small/b.yaml: no such file"),
        (["lib/run_stages.sh", "small", "cpt_p5"], "no row's batch file is cpt_p5; there are: elsewhere prepare_cpu"),
        (["lib/run_stages.sh", "small"], "usage: slurm/lib/run_stages.sh NAME BATCH"),
        (["lib/launch.sh"], "usage: slurm/lib/launch.sh PROGRAM"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tree, command, message):
    tree.recipe("small", "a tools/stub.py prepare_cpu\nb tools/stub.py elsewhere\n")
    if "--dry-run" not in command:
        (tree / "recipes/small/b.yaml").unlink()
    done = tree.run(f"slurm/{command[0]}", *command[1:], code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not (tree / "runs").exists()


# -- submitting -------------------------------------------------------------------------------------------------------

CHAIN = """# stage  program        batch file
clean      tools/stub.py  prepare_cpu
pack       tools/stub.py  prepare_cpu
cpt-1      tools/stub.py  cpt_p5
cpt-2      tools/stub.py  cpt_p5
bpb        tools/stub.py  eval_1gpu
report     tools/stub.py  prepare_cpu
"""


def test_dry_run_prints_the_commands_that_submit_a_chain(tree):
    tree.recipe("new", CHAIN)
    done = tree.run("slurm/pipeline.sh", "new", "--dry-run")
    sbatch = "sbatch --parsable --output=runs/new/%x-%j.out"
    after = "--dependency=afterok:$job{} --kill-on-invalid-dep=yes"
    assert done.stdout.splitlines() == [
        "mkdir -p runs/new",
        f"job1=$({sbatch} slurm/prepare_cpu.sbatch new clean pack)",
        f"job2=$({sbatch} {after.format(1)} slurm/cpt_p5.sbatch new cpt-1 cpt-2)",
        f"job3=$({sbatch} {after.format(2)} slurm/eval_1gpu.sbatch new bpb)",
        f"job4=$({sbatch} {after.format(3)} slurm/prepare_cpu.sbatch new report)",
    ]
    assert not (tree / "runs").exists() and not tree.noted()


def test_submitting_does_what_dry_run_prints(tree):
    tree.recipe("new", CHAIN)
    tree.fake_slurm()
    printed = tree.run("slurm/pipeline.sh", "new", "--dry-run", "--from", "cpt-2").stdout
    tree.run("bash", "-euc", printed)
    by_hand = tree.noted("sbatch")
    assert [line.rpartition("sbatch ")[2] for line in by_hand] == ["new cpt-2", "new bpb", "new report"]
    tree.notes.unlink()
    done = tree.run("slurm/pipeline.sh", "new", "--from", "cpt-2")
    assert tree.noted("sbatch") == by_hand and "afterok:101 " in by_hand[1] and "afterok:102 " in by_hand[2]
    assert done.stdout.splitlines()[0] == "job 101: slurm/cpt_p5.sbatch: cpt-2"


def test_a_refused_job_ends_the_submission_and_names_those_before_it(tree):
    tree.recipe("new", CHAIN)
    tree.fake("sbatch", 'if grep -q cpt_p5 "$NOTES"; then exit 1; fi; echo "77;cluster"\n')
    done = tree.run("slurm/pipeline.sh", "new", code=1)
    assert "slurm/cpt_p5.sbatch failed; submitted before it: 77" in done.stderr and len(tree.noted("sbatch")) == 2


# -- all of it here ---------------------------------------------------------------------------------------------------


def test_local_runs_the_real_programs_and_a_second_time_nothing(tree):
    tree.recipe(
        "small",
        "clean     data_tools/clean_corpus.py     prepare_cpu\n"
        "tokenizer data_tools/train_tokenizer.py  prepare_cpu --vocab_size 512  # flags win over the recipe\n"
        "pack      data_tools/pack_mmap.py        prepare_cpu --datasets '{name: train, input: [clean/train]}'\n",
        clean="input: [recipes/quickstart/corpus/az]\nlanguage: az\n",
        pack="tokenizer: tokenizer\n",
        tokenizer="input: [clean/train]\nvocab_size: 2048\n",
    )
    assert tree.run("slurm/pipeline.sh", "small", "--status").stdout.splitlines()[1].split() == [
        "clean",
        "not",
        "started",
    ]

    done = tree.run("slurm/pipeline.sh", "small", "--local")
    lines = [line[9:] for line in done.stdout.splitlines() if line[9:].startswith("[")]  # without the time of day
    assert lines[2] == "[2/3] tokenizer: data_tools/train_tokenizer.py --vocab_size 512"
    assert lines[1].startswith("[1/3] clean: ") and lines[1].endswith(" s"), "the time it took"
    assert (tree / "runs/small/pack/train/manifest.json").exists()
    status = tree.run("slurm/pipeline.sh", "small", "--status").stdout.splitlines()
    manifest = json.loads((tree / "runs/small/pack/manifest.json").read_text())
    assert status[3] == f"pack       finished  {manifest['ended']}, {int(manifest['seconds'])} s"

    again = tree.run("slurm/pipeline.sh", "small", "--local", PYTHONPROFILEIMPORTTIME="1")
    assert again.stdout.count("nothing to do") == 3
    imported = {line.split("|")[-1].strip() for line in again.stderr.splitlines() if line.startswith("import time:")}
    assert "dilqur.pipeline.stage" in imported
    # seconds each, and 20 finished stages are to be over in 20 s
    assert not imported & {"torch", "transformers", "tokenizers"}

    done = tree.run("slurm/pipeline.sh", "small", "--local", "--from", "pack")
    assert "[1/1] pack" in done.stdout and "tokenizer:" not in done.stdout

    (tree / "recipes/small/clean.yaml").write_text("input: [recipes/quickstart/corpus/az]\nlanguage: tr\n")
    done = tree.run("slurm/pipeline.sh", "small", "--local", code=2)
    assert "finished with language = 'az', now 'tr'" in done.stderr and "[2/3]" not in done.stdout


def test_a_study_is_rows_of_one_recipe_that_differ_in_flags(tree):
    tree.recipe(
        "study",
        "tokenizer          data_tools/train_tokenizer.py  prepare_cpu\n"
        "tokenizer@small    data_tools/train_tokenizer.py  prepare_cpu --vocab_size 300\n"
        "tokenizer@large    data_tools/train_tokenizer.py  prepare_cpu --vocab_size 600\n"
        "pack@small         data_tools/pack_mmap.py        prepare_cpu --tokenizer tokenizer@small\n",
        tokenizer="input: [recipes/quickstart/corpus/az]\nvocab_size: 400\n",
        pack="input: [recipes/quickstart/corpus/az]\ntokenizer: tokenizer\n",
    )
    done = tree.run("slurm/pipeline.sh", "study", "--local", "--from", "tokenizer@small")
    assert "[1/3] tokenizer@small: data_tools/train_tokenizer.py --vocab_size 300" in done.stdout
    tree.run("slurm/pipeline.sh", "study", "--local")
    sizes = {}
    for name in ("tokenizer", "tokenizer@small", "tokenizer@large"):
        manifest = json.loads((tree / f"runs/study/{name}/manifest.json").read_text())
        sizes[manifest["stage"]] = manifest["arguments"]["vocab_size"]
    assert sizes == {"tokenizer": 400, "tokenizer@small": 300, "tokenizer@large": 600}
    packed = json.loads((tree / "runs/study/pack@small/manifest.json").read_text())
    assert packed["arguments"]["tokenizer"] == "runs/study/tokenizer@small"

    again = tree.run("slurm/pipeline.sh", "study", "--local")
    assert again.stdout.count("nothing to do") == 4
    status = tree.run("slurm/pipeline.sh", "study", "--status").stdout.splitlines()
    assert [line.split()[:2] for line in status][4] == ["pack@small", "finished"]
    sent = tree.run("slurm/pipeline.sh", "study", "--dry-run", "--from", "tokenizer@large").stdout
    assert "slurm/prepare_cpu.sbatch study tokenizer@large pack@small)" in sent
    in_parts = tree.run("slurm/lib/run_part.sh", "study", "pack@small", "1", "0")
    assert "pack@small: finished" in in_parts.stdout


def test_a_failing_stage_ends_the_pipeline_with_its_code(tree):
    tree.recipe("new", CHAIN, pack="fail: 7\n")
    done = tree.run("slurm/pipeline.sh", "new", "--local", code=7)
    assert "clean said" in done.stdout and "cpt-1" not in done.stdout
    assert "[2/6] pack: exit code 7 after" in done.stderr
    done = tree.run("slurm/pipeline.sh", "new", "--local", "--from", "cpt-1")
    assert done.stdout.count(" said") == 4 and done.stdout.index("cpt-1 said") < done.stdout.index("report said")


def test_a_stage_that_wrote_its_result_elsewhere_is_no_finished_stage(tree):
    tree.recipe("new", CHAIN, clean="forget: 1\n")
    done = tree.run("slurm/pipeline.sh", "new", "--local", code=1)
    assert "runs/new/clean/manifest.json is not there: in a pipeline, leave run_dir and output_dir alone" in done.stderr


def test_status_tells_apart_what_a_stage_can_be(tree):
    tree.recipe("new", CHAIN, clean="seconds: 60\n")
    for stage in ("pack", "cpt-1", "cpt-2", "bpb"):
        (tree / "runs/new" / stage).mkdir(parents=True)
    (tree / "runs/new/pack/manifest.json").write_text(
        '{\n "result": {\n  "seconds": 1\n },\n "ended": "2026-01-02T03:04:05Z",\n "seconds": 61.5\n}'
    )
    for stage in ("cpt-1", "cpt-2"):
        (tree / "runs/new" / stage / "checkpoints/step-0000100").mkdir(parents=True)
        (tree / "runs/new" / stage / "checkpoints/step-0000100/COMPLETE").touch()
        (tree / "runs/new" / stage / "checkpoints/step-0000200").mkdir()  # half-written: it does not count
        (tree / "runs/new" / stage / "metrics.jsonl").write_text(
            '{"step": 119, "tokens_per_second": 1000}\n'
            '{"step": 120, "loss": 1.5, "tokens_per_second": 3000, "max_steps": 400, "seconds_left": 3601}\n{"st'
        )
        (tree / "runs/new" / stage / ".lock").write_text("process 5 on n1\n")
    (tree / "runs/new/cpt-1/REQUEUE").touch()
    (tree / "runs/new/bpb/.lock").write_text("process 6 on n1\n")
    (tree / "runs/new/bpb/STOP").touch()
    with (tree / "runs/new/bpb/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as Stage.open does
        status = tree.run("slurm/pipeline.sh", "new", "--status").stdout.splitlines()
    assert status == [
        "stage   state           step   loss  tokens/s     left",
        "clean   not started",
        "pack    finished                                        2026-01-02T03:04:05Z, 61 s",
        "cpt-1   stopped      120/400  1.500     2,000  1:00:01  goes on from step-0000100 when started again",
        "cpt-2   interrupted  120/400  1.500     2,000  1:00:01  goes on from step-0000100 when started again",
        "bpb     running                                         process 6 on n1, asked to stop",
        "report  not started",
    ]


# -- the rows of a batch file -----------------------------------------------------------------------------------------


def test_a_batch_file_runs_its_rows_up_to_those_that_wait_for_others(tree):
    """report is a prepare_cpu row as clean is, but comes after everything else."""
    tree.recipe("new", CHAIN)
    done = tree.run("bash", "slurm/prepare_cpu.sbatch", "new")
    assert "clean said" in done.stdout and "pack said" in done.stdout and "report said" not in done.stdout
    assert "the other prepare_cpu rows of recipes/new/pipeline.txt wait for cpt-1" in done.stdout
    tree.run("bash", "slurm/cpt_p4d.sbatch", "new")  # another machine for the rows of cpt_p5
    tree.run("bash", "slurm/eval_1gpu.sbatch", "new", "bpb")
    assert "report said" in tree.run("bash", "slurm/prepare_cpu.sbatch", "new").stdout
    assert tree.run("slurm/pipeline.sh", "new", "--status").stdout.count("finished") == 6


def tiny_run(made):
    """A recipe of cpt.py, but for its length."""
    return (
        f"datasets:\n  - {{path: {made}/shards}}\ntokenizer: {made}/tokenizer\nmodel_config: {TINY_LLAMA}\n"
        "max_length: 16\nglobal_batch_size: 2\nlearning_rate: 1.0e-3\n"
    )


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_asked_to_stop_a_run_leaves_a_checkpoint_and_goes_on_when_started_again(tree, made):
    tree.recipe(
        "new",
        "cpt scripts/cpt.py cpt_p5\nafter tools/stub.py cpt_p5\n",
        cpt=(tiny_run(made) + "max_steps: 80\nsave_steps: 1000\nlogging_steps: 40\n"),
    )
    process = tree.start("slurm/lib/run_stages.sh", "new", "cpt_p5")
    wait_for(tree / "runs/new/cpt/metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "to go on: slurm/lib/run_stages.sh new cpt_p5 cpt after" in out and "after said" not in out
    assert (tree / "runs/new/cpt/REQUEUE").exists() and not (tree / "runs/new/cpt/manifest.json").exists()
    (saved,) = (tree / "runs/new/cpt/checkpoints").glob("step-*/COMPLETE")
    done = tree.run("slurm/lib/run_stages.sh", "new", "cpt_p5")
    assert f"resumed     runs/new/cpt/checkpoints/{saved.parent.name}" in done.stdout and "after said" in done.stdout
    metrics = (tree / "runs/new/cpt/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 81)), "every step once"


@pytest.fixture
def job(tree):
    """A recipe of three cpt_p5 stages, the second of which waits to be stopped; and Slurm."""

    def make(**texts):
        tree.recipe("new", "".join(f"{stage} tools/stub.py cpt_p5\n" for stage in ("one", "two", "three")), **texts)
        tree.fake_slurm()
        return {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "cpt_p4d", "SLURM_JOB_NUM_NODES": "1"}

    return make


def stop_in(tree, stage, number, *command, code=0, **environment):
    process = tree.start(*command, **environment)
    wait_for(tree / f"runs/new/{stage}/started", process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{errors}"
    return out + errors


def test_a_job_that_is_cancelled_saves_and_is_not_requeued(tree, job):
    """scancel is a TERM without the warning before it."""
    slurm = job(two="seconds: 60\n")
    out = stop_in(tree, "two", signal.SIGTERM, "bash", "slurm/cpt_p4d.sbatch", "new", code=1, **slurm)
    assert "job 4242 was cancelled; to go on: sbatch slurm/cpt_p4d.sbatch new two three" in out
    assert not tree.noted("scontrol") and (tree / "runs/new/two/REQUEUE").exists()


def test_in_a_job_the_stage_that_runs_is_stopped_and_the_job_requeued(tree, job):
    slurm = job(two="seconds: 60\n")
    out = stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p4d.sbatch", "new", **slurm)
    assert tree.noted("scontrol") == ["scontrol requeue 4242"]
    assert "requeueing job 4242, to go on with two" in out and "three said" not in out
    assert not (tree / "runs/new/one/STOP").exists()
    flags = tree.noted("srun")[1].split(" slurm/lib/launch.sh ")
    assert flags[1] == "tools/stub.py --config recipes/new/two.yaml"
    assert {"--kill-on-bad-exit=1", "--nodes=1", "--ntasks-per-node=1"} <= set(flags[0].split())

    (tree / "recipes/new/two.yaml").write_text("seconds: 0.1\n")  # started again, it has time to finish
    done = tree.run("bash", "slurm/cpt_p4d.sbatch", "new", SLURM_RESTART_COUNT="1", **slurm)
    assert "job 4242, start 2" in done.stdout and "three said" in done.stdout and len(tree.noted("scontrol")) == 1


def test_where_requeueing_is_forbidden_the_job_says_what_to_type(tree, job):
    slurm = job(two="seconds: 60\n")
    words = ("two", signal.SIGUSR1, "bash", "slurm/cpt_p4d.sbatch", "new")
    out = stop_in(tree, *words, code=1, DILQUR_REQUEUE="0", **slurm)  # 1: the jobs behind it must not start
    assert "to go on: sbatch slurm/cpt_p4d.sbatch new two three" in out and not tree.noted("scontrol requeue")
    shutil.rmtree(tree / "runs/new/two")
    tree.fake("scontrol", "exit 1\n")
    out = stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p4d.sbatch", "new", code=1, **slurm)
    assert "cannot be requeued" in out, "exit code 1: the jobs behind it must not start"


def test_a_job_that_makes_no_step_is_not_requeued_for_ever(tree, job):
    """E.g. stop_at_step in a recipe: started again, it stops at once."""
    slurm = job(two="requeue: 1\n")
    done = tree.run("bash", "slurm/cpt_p5.sbatch", "new", code=1, **slurm)
    assert "requeueing would go on for ever" in done.stderr and not tree.noted("scontrol requeue")


def test_a_hang_after_a_checkpoint_requeues_the_job_and_one_without_ends_it(tree, job):
    slurm = job(two="hang: checkpoints/step-0000500\n")
    done = tree.run("bash", "slurm/cpt_p5.sbatch", "new", **slurm)
    assert "exit code 1" in done.stderr and tree.noted("scontrol requeue") == ["scontrol requeue 4242"]
    done = tree.run("bash", "slurm/cpt_p5.sbatch", "new", code=1, **slurm)  # again, at the same step
    assert "requeueing would go on for ever" in done.stderr and len(tree.noted("scontrol requeue")) == 1


def test_three_starts_without_progress_are_enough(tree, job):
    """A warning, or a crash, that comes before the first checkpoint, again and again."""
    slurm = job(two="seconds: 60\nno_step: 1\n")
    words = ("two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new")
    for _ in range(3):
        stop_in(tree, *words, **slurm)
        (tree / "runs/new/two/started").unlink()
    assert len(tree.noted("scontrol requeue")) == 3
    done = tree.run("bash", "slurm/cpt_p5.sbatch", "new", code=1, **slurm)
    assert "three restarts without a new checkpoint" in done.stderr and len(tree.noted("scontrol requeue")) == 3
    assert not (tree / "runs/new/two/started").exists()
    status = tree.run("slurm/pipeline.sh", "new", "--status").stdout
    assert re.search(r"two +failed +4242  three restarts without a new checkpoint", status)
    stop_in(tree, *words, **{**slurm, "SLURM_JOB_ID": "4243"})  # submitted anew, it counts anew


def test_a_second_job_of_the_same_run_ends_while_the_first_is_running(tree, job):
    slurm = job(two="seconds: 60\n")
    tree.fake("squeue", "[[ $* != *RUNNING*77* ]] || echo running\n")
    stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new", **{**slurm, "SLURM_JOB_ID": "77"})
    done = tree.run("bash", "slurm/cpt_p5.sbatch", "new", code=2, **slurm)
    assert "error: one: job 77 is running it; this one, 4242, ends here" in done.stderr
    assert (tree / "runs/new/two/REQUEUE").exists(), "what the first left is left alone"
    tree.fake("squeue")
    (tree / "runs/new/two/started").unlink()
    stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new", **slurm)


def test_what_is_in_the_queue_is_not_submitted_again(tree):
    tree.recipe("new", CHAIN)
    tree.fake_slurm()
    tree.run("slurm/pipeline.sh", "new")
    tree.fake("squeue", "echo 103; echo 103; echo 7\n")
    done = tree.run("slurm/pipeline.sh", "new", code=2)
    assert "in the queue already" in done.stderr and "scancel 103\n" in done.stderr
    assert len(tree.noted("sbatch")) == 4


def test_a_task_of_a_chain_leaves_the_rest_to_the_next_and_the_last_one_ends_it(tree, job):
    slurm = job(two="seconds: 60\n") | {
        "SLURM_ARRAY_JOB_ID": "4200",
        "SLURM_ARRAY_TASK_MAX": "3",
        "DILQUR_REQUEUE": "0",
    }
    tree.fake("scancel")
    words = ("two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new")
    out = stop_in(tree, *words, SLURM_ARRAY_TASK_ID="1", **slurm)
    assert "the next task of job 4200 goes on with two" in out
    (tree / "runs/new/two/started").unlink()
    out = stop_in(tree, *words, code=1, SLURM_ARRAY_TASK_ID="3", **slurm)
    assert "to go on: sbatch slurm/cpt_p4d.sbatch new two three" in out and not tree.noted("scancel")
    (tree / "recipes/new/two.yaml").write_text("")
    tree.run("bash", "slurm/cpt_p5.sbatch", "new", SLURM_ARRAY_TASK_ID="2", **slurm)
    assert tree.noted("scancel") == ["scancel --state=PENDING 4200"], "nothing is left for the others to do"


def test_asked_to_stop_before_the_first_step_a_job_is_requeued(tree, job):
    slurm = job(two="seconds: 60\nno_step: 1\n")
    stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new", **slurm)
    assert tree.noted("scontrol requeue") == ["scontrol requeue 4242"]


def test_a_stage_that_cannot_stop_is_finished_and_the_next_not_begun(tree, job):
    slurm = job(two="seconds: 0.5\ndeaf: 1\n")
    out = stop_in(tree, "two", signal.SIGUSR1, "bash", "slurm/cpt_p5.sbatch", "new", **slurm)
    assert "requeueing job 4242, to go on with three" in out and "three said" not in out
    assert (tree / "runs/new/two/manifest.json").exists()


def test_stale_markers_do_not_stop_anything(tree, job):
    slurm = job(two="seconds: 0.2\n")
    (tree / "runs/new/two").mkdir(parents=True)
    for marker in ("STOP", "REQUEUE"):
        (tree / "runs/new/two" / marker).touch()
    tree.run("bash", "slurm/cpt_p5.sbatch", "new", **slurm)
    assert (tree / "runs/new/three/manifest.json").exists() and not tree.noted("scontrol requeue")


def test_local_inside_an_allocation_asks_slurm_for_nothing(tree, job):
    slurm = job()
    tree.run("slurm/pipeline.sh", "new", "--local", SLURM_NNODES="2", SLURM_NODEID="0", **slurm)
    assert not tree.noted()


def test_ctrl_c_ends_the_program_too(tree, job):
    job(two="seconds: 60\n")
    process = tree.start("slurm/pipeline.sh", "new", "--local")
    wait_for(tree / "runs/new/two/started", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    process.communicate(timeout=30)  # until the pipes are closed: by the program, too
    assert process.returncode != 0 and time.monotonic() - started < 10
    assert not (tree / "runs/new/three").exists()


# -- launch.sh --------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tree):
    """Runs launch.sh with a stand-in for accelerate, and for a scripts/cpt.py that says what it is asked."""
    tree.fake("accelerate")
    tree.fake("scontrol", "echo localhost; echo n2\n", note=False)  # the first node has to be reached
    (tree / "scripts/cpt.py").unlink()
    (tree / "scripts/cpt.py").write_text(
        "import os, sys\nprint('python', *sys.argv[1:], 'WORLD_SIZE', os.environ.get('WORLD_SIZE'))\n"
        "if 'bad' in sys.argv: sys.exit('error: bad')\n"
        "if 'old' in sys.argv: print('x: finished 2026 in 1 s, nothing to do (runs/x)')\n"
    )

    def start(*words, program="scripts/cpt.py", **environment):
        return tree.run("slurm/lib/launch.sh", program, "--config", "c.yaml", *words, **environment)

    return start


def told_accelerate(tree):
    """Its flags, as one string; and forget them."""
    (line,) = tree.noted("accelerate")
    tree.notes.unlink()
    return line.removeprefix("accelerate launch ")


def test_one_process_is_started_without_accelerate(tree, launch):
    assert launch("--seed", "1").stdout == "python --config c.yaml --seed 1 WORLD_SIZE None\n"
    assert launch(SLURM_GPUS_ON_NODE="1").stdout.startswith("python")
    assert not tree.noted()


def test_a_process_for_each_gpu(tree, launch):
    tree.fake("nvidia-smi", 'for i in 0 1 2; do echo "GPU $i: H100 (UUID: $i)"; done\n', note=False)
    for processes, environment in {
        8: {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
        2: {"CUDA_VISIBLE_DEVICES": "4,5"},
        4: {"CUDA_VISIBLE_DEVICES": ""},
    }.items():
        launch("--seed", "1", DILQUR_NUM_PROCESSES="4", **environment)
        assert told_accelerate(tree) == (
            f"--config_file accelerate_configs/fsdp2.yaml --num_machines 1 --num_processes {processes} "
            "--machine_rank 0 --main_process_port 0 scripts/cpt.py --config c.yaml --seed 1"
        )
    del tree.environment["CUDA_VISIBLE_DEVICES"]
    launch(DILQUR_ACCELERATE_CONFIG="accelerate_configs/zero2.yaml")
    assert "accelerate_configs/zero2.yaml --num_machines 1 --num_processes 3 " in told_accelerate(tree)


def test_two_nodes_agree_on_address_and_port_and_differ_in_rank(tree, launch):
    step = {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
    }
    for node in (0, 1):
        launch(SLURM_NODEID=str(node), **step)
        assert told_accelerate(tree) == (
            f"--config_file accelerate_configs/fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank {node} "
            "--main_process_ip localhost --main_process_port 23456 --rdzv_backend static scripts/cpt.py --config c.yaml"
        )


def test_a_port_in_use_and_a_node_that_cannot_be_reached_are_one_line_in_seconds(tree, launch):
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
    }
    with socket.create_server(("localhost", 0)) as foreign:
        port = str(foreign.getsockname()[1])
        words = ("slurm/lib/launch.sh", "scripts/cpt.py", "--config", "c.yaml")
        done = tree.run(*words, code=2, SLURM_NODEID="0", DILQUR_PORT=port, **step)
    assert done.stderr == f"error: port {port} of localhost is in use: set DILQUR_PORT to another\n"
    tree.fake("scontrol", "echo n1.invalid; echo n2\n", note=False)
    done = tree.run(*words, code=2, SLURM_NODEID="1", **step)
    assert "cannot reach n1.invalid, port 20001 (Name or service not known): a firewall" in done.stderr
    assert done.stderr.count("\n") == 1 and not tree.noted("accelerate")


def test_shards_go_to_the_nodes_own_disk_where_the_site_has_one(tree, launch):
    said = launch(DILQUR_LOCAL_DIR="/local").stdout
    assert said.startswith("python --config c.yaml --local_dir /local ")
    assert "--local_dir /mine WORLD_SIZE" in launch("--local_dir", "/mine", DILQUR_LOCAL_DIR="/local").stdout


def test_modules_are_loaded_or_the_job_says_so(tree, launch):
    (tree / "slurm/site.env").write_text(
        'DILQUR_MODULES="cuda/13 gcc"\nmodule() { [[ $2 == cuda/13 ]] && export LOADED="$*"; }\n'
    )
    (tree / "tools/env.py").write_text("import os; print(os.environ['LOADED'])")
    assert launch(program="tools/env.py").stdout == "load cuda/13 gcc\n"
    (tree / "slurm/site.env").write_text("DILQUR_MODULES=cuda/12\nmodule() { return 1; }\n")
    done = tree.run("slurm/lib/launch.sh", "tools/env.py", code=2)
    assert "DILQUR_MODULES in slurm/site.env: module load cuda/12 failed on" in done.stderr


def test_a_program_that_does_not_train_runs_on_the_first_node_alone(tree, launch):
    (tree / "tools/say.py").write_text("print('here')")
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert launch(program="tools/say.py", SLURM_NODEID="0", **step).stdout == "here\n"
    assert launch(program="tools/say.py", SLURM_NODEID="1", **step).stdout == ""
    assert not tree.noted()


def test_mistakes_are_heard_before_accelerate_starts(tree, launch):
    launch("old", DILQUR_NUM_PROCESSES="2")
    assert not tree.noted(), "finished: nothing to start"
    launch("old", "--overwrite_output_dir", "true", DILQUR_NUM_PROCESSES="2")
    assert tree.noted()
    tree.notes.unlink()
    done = tree.run("slurm/lib/launch.sh", "scripts/cpt.py", "bad", code=1, DILQUR_NUM_PROCESSES="2")
    assert "bad --check WORLD_SIZE 2" in done.stderr and "error: bad" in done.stderr and not tree.noted()
    done = tree.run(
        "slurm/lib/launch.sh", "scripts/cpt.py", code=2, DILQUR_NUM_PROCESSES="2", DILQUR_ACCELERATE_CONFIG="zero9"
    )
    assert "DILQUR_ACCELERATE_CONFIG: zero9: no such file; there are: accelerate_configs/ddp.yaml" in done.stderr


def test_the_exit_code_of_a_mistake_is_the_first_node_s(tree, launch):
    """srun takes the highest: the others wait for a file that may come late (NFS), and leave with 0 when srun ends them."""
    process = tree.start(
        "slurm/lib/launch.sh",
        "scripts/cpt.py",
        "bad",
        SLURM_JOB_ID="1",
        SLURM_STEP_NUM_NODES="2",
        SLURM_NODEID="1",
        SLURM_GPUS_ON_NODE="1",
    )
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=10) and process.returncode == 0


def test_the_environment_is_that_of_a_compute_node(tree, launch):
    (tree / "slurm/site.env").write_text("SITE_SAYS=hello\n[[ -z $unset ]] || false\nfalse\n")
    (tree / "tools/env.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    seen = json.loads(launch(program="tools/env.py", SLURM_JOB_ID="9", USER="me", HF_HUB_OFFLINE="0").stdout)
    assert seen["PYTHONPATH"].split(":")[0] == str(tree.root) and seen["SITE_SAYS"] == "hello"
    assert (seen["TRANSFORMERS_OFFLINE"], seen["WANDB_MODE"]) == ("1", "offline")
    assert seen["HF_HUB_OFFLINE"] == "0", "what is set wins"
    assert seen["TRITON_CACHE_DIR"] == f"{tree.root}/dilqur-me-9/triton"
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").symlink_to(shutil.which("true"))
    assert launch(program="tools/env.py").stdout, "an active environment wins over .venv"
    del tree.environment["VIRTUAL_ENV"]
    assert not launch(program="tools/env.py").stdout


def test_two_real_processes(tree, made):
    """The whole way through accelerate, on a CPU: --check, fsdp2, two steps, model/."""
    tree.recipe("new", "cpt scripts/cpt.py cpt_p5\n", cpt=tiny_run(made) + "max_steps: 2\n")
    done = tree.run("slurm/pipeline.sh", "new", "--local", DILQUR_NUM_PROCESSES="2")
    assert "fsdp2, 2 processes on cpu" in done.stdout and (tree / "runs/new/cpt/model/config.json").exists()
    done = tree.run("slurm/pipeline.sh", "new", "--local", DILQUR_NUM_PROCESSES="2")
    assert "nothing to do" in done.stdout
