"""The Apptainer image: its mistakes are one line, launch.sh enters it with what a job needs; and a real one, on a real Slurm.

A stand-in notes how Apptainer is called, and runs what it should have run, where Slurm's commands are not: as inside. The real
image takes minutes to build and is not built here: tests/slurm/try_image.sh builds one and comes back here with it.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import test_lab
from conftest import ROOT
from test_pipeline import Tree
from virtual_cluster import Lab, skip_where_impossible

# -- the definition ---------------------------------------------------------------------------------------------------

DEFINITION = (ROOT / "apptainer" / "dilqur.def").read_text()


def section(name):
    return re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.DOTALL | re.MULTILINE)[1]


def test_the_base_is_an_argument_and_the_default_one_is_pinned():
    assert DEFINITION.startswith("Bootstrap: {{ BOOTSTRAP }}\nFrom: {{ BASE }}\n")
    defaults = dict(line.strip().split("=", 1) for line in section("arguments").split("\n") if "=" in line)
    assert set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION)) == set(defaults), (
        "an argument without a default ends a build"
    )
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", defaults["BASE"])


def test_all_it_copies_is_there_and_its_test_finds_it():
    copied = dict(line.split() for line in section("files").splitlines() if line.strip().count(" ") == 1)
    assert all((ROOT / source).exists() and target == f"/opt/dilqur/{source}" for source, target in copied.items())
    for program in re.findall(r"python (\S+\.py)", section("test")):
        assert any(program == source or program.startswith(f"{source}/") for source in copied), program


def test_a_package_of_another_version_or_none_is_found(tmp_path):
    check = ["python", ROOT / "apptainer" / "check_imports.py"]
    (tmp_path / "pins.txt").write_text("numpy==1.0  # old\nnot-there==2.0\nPyYAML\n-e .\n")
    done = subprocess.run([*check, tmp_path / "pins.txt"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("1 of 3 pinned packages")
    assert re.search("numpy: .* is installed, pinned is ==1.0\nnot-there: PackageNotFoundError", done.stderr)


# -- build.sh ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    made = Tree(tmp_path / "checkout")
    (made / "apptainer").symlink_to(ROOT / "apptainer")
    return made


@pytest.fixture
def build(checkout):
    """Runs apptainer/build.sh with a stand-in that writes an image, or fails where the environment says FAIL."""
    (checkout / "apptainer").unlink()
    (checkout / "apptainer").mkdir()
    for file in ("build.sh", "dilqur.def"):
        (checkout / "apptainer" / file).write_bytes((ROOT / "apptainer" / file).read_bytes())
    (checkout / "apptainer/build.sh").chmod(0o755)
    keep = 'env | grep ^APPTAINERENV_ >>"$NOTES"\neval "image=\\${$(($# - 1))}"\necho image >"$image"\n[[ -z ${FAIL:-} ]]\n'
    checkout.fake("apptainer", keep)

    def start(*words, code=0, **environment):
        return checkout.run("apptainer/build.sh", *words, code=code, **environment)

    return start


def test_the_image_takes_its_name_when_its_test_has_passed(checkout, build):
    assert "error: no image" in build(code=1, FAIL="yes").stderr
    assert not list(checkout.root.glob("*.sif"))
    assert build().stdout.startswith(f"{checkout.root}/dilqur.sif: ")
    assert [file.name for file in checkout.root.glob("*.sif")] == ["dilqur.sif"]
    assert "dilqur.sif: is there already; --force replaces it" in build(code=2).stderr
    build("--force")


def test_base_commit_and_pip_s_settings_come_along(checkout, build):
    (checkout / "debian/usr").mkdir(parents=True)
    words = ("--base", "debian", "--", "--bind", "/wheels:/mnt")
    build("new.sif", *words, PIP_FIND_LINKS="/mnt", PIP_INDEX_URL="https://user:secret@mirror/simple")
    told = checkout.noted("apptainer")[0]
    assert f"--build-arg BOOTSTRAP=localimage --build-arg BASE={checkout.root}/debian --bind /wheels:/mnt" in told
    assert "COMMIT=" in told and told.endswith(" apptainer/dilqur.def") and "secret" not in told
    assert {"APPTAINERENV_PIP_FIND_LINKS=/mnt"} < set(checkout.noted("APPTAINERENV_PIP"))
    build("other.sif", "--base", "docker://nvidia/cuda:1")
    assert "--build-arg BOOTSTRAP=docker --build-arg BASE=nvidia/cuda:1 " in checkout.noted("apptainer")[1]


def test_uncommitted_changes_are_in_the_label(checkout, build):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", checkout.root]
    for words in (["init", "-q"], ["add", "apptainer"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    build("one.sif")
    with (checkout / "apptainer/dilqur.def").open("a") as file:
        file.write("\n")
    build("two.sif")
    assert [re.search(r"COMMIT=(\S+)", line)[1] for line in checkout.noted("apptainer")] == [commit, f"{commit}-dirty"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "nowhere"], "nowhere: no such base: docker://NAME:TAG, a folder"),
        (["--base"], "--base: which?"),
        (["a.sif", "b.sif"], "b.sif: one image at a time"),
        (["no/where/a.sif"], "no/where: no such folder, or not writable"),
        (["image"], "image: usage: apptainer/build.sh"),
        (["--base", "full"], "full/dev: empty it"),
    ],
)
def test_a_mistake_is_one_line(checkout, build, words, said):
    for folder in ("full/usr", "full/dev/null"):
        (checkout / folder).mkdir(parents=True)
    errors = build(*words, code=2).stderr
    assert errors.startswith("error: ") and said in errors and errors.count("\n") == 1
    assert not checkout.noted()


def test_without_apptainer_both_say_so(checkout, build):
    (checkout / "fakes/apptainer").unlink()
    path = {"PATH": f"{checkout.fakes}:/usr/bin:/bin"}
    if subprocess.run(["bash", "-c", "command -v apptainer"], env=path, capture_output=True).returncode == 0:
        pytest.skip("this machine has Apptainer")
    assert build(code=2, **path).stderr.startswith("error: apptainer is not on PATH")
    (checkout / "x.sif").touch()
    errors = checkout.run("slurm/lib/launch.sh", "tools/stub.py", code=2, DILQUR_IMAGE="x.sif", **path).stderr
    assert errors.startswith("error: DILQUR_IMAGE is set, but apptainer is not on PATH on ") and errors.count("\n") == 1


# -- launch.sh --------------------------------------------------------------------------------------------------------

SAY = "import json, os, sys\nprint(json.dumps({**os.environ, 'argv': sys.argv[1:]}))\n"


@pytest.fixture
def launch(checkout):
    """Runs launch.sh with an image, x.sif. Inside it there is Python, but no Slurm and no site."""
    (checkout / "x.sif").touch()
    (checkout / "tools/say.py").write_text(SAY)
    checkout.fake("accelerate")
    checkout.fake("nvidia-smi", "exit 9\n", note=False)
    checkout.fake(
        "apptainer",
        "while [[ $1 != *.sif ]]; do shift; done\n"
        'for name in scontrol squeue apptainer; do printf "#!/bin/bash\\nexit 127\\n" >"${0%/*}/$name"; done\n'
        'export APPTAINER_CONTAINER=$1; shift; exec "$@"\n',
    )

    def start(*words, program="tools/say.py", code=0, **environment):
        return checkout.run(
            "slurm/lib/launch.sh", program, *words, code=code, **{"DILQUR_IMAGE": "x.sif", **environment}
        )

    return start


def test_the_checkout_is_bound_where_it_is_and_the_environment_comes_along(checkout, launch):
    seen = json.loads(launch("--config", "a b.yaml", TMPDIR="/tmp", SECRET_OF_MINE="kept").stdout)
    root = checkout.root
    assert checkout.noted() == [
        f"apptainer exec --pwd {root} --bind {root} x.sif slurm/lib/launch.sh tools/say.py --config a b.yaml"
    ]
    assert seen["argv"] == ["--config", "a b.yaml"] and seen["PWD"] == str(root) and seen["SECRET_OF_MINE"] == "kept"
    assert seen["TORCH_EXTENSIONS_DIR"].startswith("/tmp/dilqur-"), (
        "not in the home folder, which is seen inside and outside"
    )


def test_a_site_s_file_is_read_outside_and_its_folders_are_bound(checkout, launch):
    scratch, fast = checkout / "scratch", "/var/tmp"
    (scratch / "runs").mkdir(parents=True)
    (checkout / "runs").symlink_to(scratch / "runs")
    (checkout / "slurm/site.env").write_text(
        f"echo read\nDILQUR_BINDS='{scratch}, {fast}:/fast:ro'\nDILQUR_IMAGE=x.sif\n"
    )
    out = launch(SLURM_TMPDIR=fast).stdout
    assert out.count("read\n") == 1 and "DILQUR_BINDS" in out
    (told,) = checkout.noted()
    assert f"--bind {fast} --bind {scratch}/runs --bind {scratch} --bind {fast}:/fast:ro x.sif" in told


def test_gpus_come_along_where_there_are_some(checkout, launch):
    checkout.fake("nvidia-smi", "echo 'GPU 0: H100'\n", note=False)
    launch()
    assert " --nv x.sif " in checkout.noted()[0]


def test_what_slurm_knows_is_asked_before(checkout, launch):
    checkout.fake("scontrol", "echo localhost; echo n8\n", note=False)
    (checkout / "scripts/cpt.py").unlink()
    (checkout / "scripts/cpt.py").write_text("")
    step = {"SLURM_JOB_ID": "5", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[7-8]", "SLURM_NODEID": "0"}
    launch(program="scripts/cpt.py", DILQUR_NUM_PROCESSES="1", **step)
    assert "--machine_rank 0 --main_process_ip localhost --main_process_port 20005 " in checkout.noted("accelerate")[0]


def test_the_end_of_the_job_comes_along(checkout, launch):
    checkout.fake("squeue", "echo '2030-01-02T03:04:05 '\n", note=False)
    assert json.loads(launch(SLURM_JOB_ID="5", TZ="UTC").stdout)["SLURM_JOB_END_TIME"] == "1893553445"


def test_a_job_without_an_end_does_without(checkout, launch):
    checkout.fake("squeue", "echo N/A\n", note=False)
    assert "SLURM_JOB_END_TIME" not in json.loads(launch(SLURM_JOB_ID="5").stdout)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DILQUR_IMAGE": "gone.sif"}, "DILQUR_IMAGE: gone.sif: not there on "),
        ({"DILQUR_BINDS": "/nowhere:/data"}, "DILQUR_BINDS: /nowhere: not there on "),
    ],
)
def test_what_is_not_there_is_one_line(checkout, launch, environment, said):
    errors = launch(code=2, **environment).stderr
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1 and not checkout.noted()


# -- a real image, on a real Slurm ------------------------------------------------------------------------------------

SETTINGS = ("DILQUR_LAB_ROOT", "DILQUR_LAB_IMAGE")
write, one_process = test_lab.write, test_lab.one_process  # recipes, and the losses of a process without the image


@pytest.fixture(scope="module")
def image():
    if missing := [name for name in SETTINGS if not os.environ.get(name)]:
        pytest.skip(f"an image takes minutes to build: tests/slurm/try_image.sh does, and sets {' and '.join(missing)}")
    return Path(os.environ["DILQUR_LAB_IMAGE"])


@pytest.fixture(scope="module")
def lab(image, tree, tmp_path_factory):
    """Two nodes with another Debian than this one's, without Python; what they see of this machine is named."""
    skip_where_impossible()
    share = f"{tmp_path_factory.getbasetemp()}:{image.parent}"
    with Lab(
        tmp_path_factory.mktemp("lab"), tree, 2, LAB_ROOT=os.environ["DILQUR_LAB_ROOT"], LAB_SHARE=share
    ) as running:
        yield running


@pytest.fixture(scope="module")
def submit(lab, image, made):
    """submit(name, strategy) submits cpt_p5.sbatch on two nodes, in the image; the job's number."""
    assert lab.run("bash", "-c", "type python || type python3", code=None).returncode, "only the image has Python"

    def submit(name, strategy):
        extensions = str(made / "extensions")  # DeepSpeed's, of a CPU: both nodes wait for one compiler
        return test_lab.submit(
            lab,
            name,
            2,
            DILQUR_ACCELERATE_CONFIG=f"accelerate_configs/{strategy}.yaml",
            DILQUR_IMAGE=str(image),
            DILQUR_BINDS=str(made),
            TORCH_EXTENSIONS_DIR=extensions,
        )

    return submit


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_inside_the_image_the_shipped_batch_file_learns_the_same_on_two_nodes(
    lab, submit, write, one_process, strategy
):
    folder = write(f"image-{strategy}", max_steps=12)
    job = submit(f"image-{strategy}", strategy)
    assert lab.wait(job, seconds=600) == "COMPLETED", lab.log(job)
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert (result["strategy"], result["processes"]) == (strategy, 2)
    assert test_lab.metrics(folder) == pytest.approx(one_process, rel=test_lab.ROUNDING)


def test_inside_the_image_a_warned_job_goes_on_and_a_cancelled_one_has_saved(lab, submit, write):
    folder = write("image-stopped", **test_lab.LONG | {"save_steps": 1000})
    job = submit("image-stopped", "ddp")
    test_lab.wait_for_steps(lab, job, folder, 30)
    lab.run("scancel", "--signal=USR1", "--batch", job)
    test_lab.wait_for_steps(lab, job, folder, 30)
    assert lab.job(job)["Restarts"] == "1"
    lab.run("scancel", job)
    assert lab.wait(job) == "CANCELLED"
    (saved,) = folder.glob("checkpoints/step-*/COMPLETE")
    assert int(saved.parent.name.removeprefix("step-")) == test_lab.steps_done(folder) >= 60
