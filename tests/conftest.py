"""Fixtures: real programs run as a user would run them, on the project's own corpus, with models made on the spot."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from fork_launch import Server

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes is not what is tested
hypothesis.settings.load_profile("any machine")
ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as slurm/lib/launch.sh has it: waiting threads do not spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small a second thread only adds waiting
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
CORPUS = ROOT / "recipes" / "quickstart" / "corpus"
SHARED = ROOT.parent / "shared"  # real text and tokenizers, where a checkout has them beside it
# before a command: root may read and write everything, and this takes that away from it
WITHOUT_ROOTS_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

TINY_LLAMA = (
    "{vocab_size: 1280, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, tie_word_embeddings: true, bos_token_id: 1024, eos_token_id: 1025, pad_token_id: 1028}"
)


LONGEST = ("test_quickstart.py", "test_lab.py", "test_strategies.py", "test_second_language.py")


def pytest_collection_modifyitems(items):
    """Where test files run side by side, nobody should wait for the longest at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


TINY_NEOBERT = "{vocab_size: 1152, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 192, max_length: 64}"
_servers = []


def fork_server():
    """The process of this test runner that has imported torch and forks programs; started when first asked for."""
    if not _servers:
        _servers.append(Server().__enter__())
    return _servers[0]


def pytest_sessionfinish():
    while _servers:
        _servers.pop().__exit__()


@pytest.fixture(scope="session")
def server():
    return fork_server()


def run_program(program, *arguments, code=0, cwd=ROOT, prefix=(), **environment):
    """Run `program` (a path from the root) and return the CompletedProcess; fails unless it exits with `code`.
    prefix: what runs it, such as `env` or `setpriv` with their flags. It is forked from a process that has imported what takes long,
    where nothing about it is special: one to five seconds less. Programs as processes of their own are in test_quickstart.py, and
    how soon they answer in programs/test_every_program.py."""
    if not prefix and not set(environment) - {"OMP_NUM_THREADS"}:
        done = fork_server().run(ROOT / program, arguments, cwd=str(cwd))
    else:
        command = [*prefix, sys.executable, str(ROOT / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
        )
    assert code is None or done.returncode == code, (
        f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    )
    return done


@pytest.fixture(scope="session")
def run():
    return run_program


def run_pipeline(tree, name):
    """`slurm/pipeline.sh NAME --local` in `tree`, as the CompletedProcess; fails unless it exits with 0."""
    done = subprocess.run(
        ["slurm/pipeline.sh", name, "--local"], cwd=tree, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train_less(tree, name, model, **lengths):
    """Give recipes of `tree` another num_train_epochs or max_steps, {recipe, _ for -: its value}, and the model that is made in the
    recipe `model` two layers. Tests of a chain need it to learn, not to learn well; DILQUR_WHOLE=1 leaves the recipes as they are."""
    if os.environ.get("DILQUR_WHOLE"):
        return
    changes = [(recipe.replace("_", "-"), "num_train_epochs|max_steps", value) for recipe, value in lengths.items()]
    for recipe, keys, value in [*changes, (model, "  num_hidden_layers", 2)]:
        file = tree / "recipes" / name / f"{recipe}.yaml"
        text, changed = re.subn(rf"(?m)^({keys}): .*", rf"\1: {value}", file.read_text())
        assert changed == 1, file
        file.write_text(text)


def stage_result(tree, name, stage):
    """What a stage of recipe `name` measured, from its manifest."""
    return json.loads((tree / "runs" / name / stage / "manifest.json").read_text())["result"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What a clone has."""
    folder = tmp_path_factory.mktemp("clone") / "dilqur"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in files.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with `clean/`, `tokenizer/` (1,024 + 256 tokens), `shards/` and `held_out/`, all made by the programs."""
    folder = tmp_path_factory.mktemp("made")
    run_program(
        "data_tools/clean_corpus.py",
        "--input",
        CORPUS / "az",
        "--language",
        "az",
        "--validation_fraction",
        "0.1",
        "--output_dir",
        folder / "clean",
    )
    run_program(
        "data_tools/train_tokenizer.py",
        "--input",
        folder / "clean" / "train",
        "--vocab_size",
        1024,
        "--output_dir",
        folder / "tokenizer",
    )
    for name, split in (("shards", "train"), ("held_out", "validation")):
        run_program(
            "data_tools/pack_mmap.py",
            "--input",
            folder / "clean" / split,
            "--tokenizer",
            folder / "tokenizer",
            "--output_dir",
            folder / name,
        )
    return folder


@pytest.fixture(scope="session")
def made_encoder(tmp_path_factory):
    """A folder with an encoder's `tokenizer/` (1,024 + 128 tokens) and its `shards/`, all made by the programs."""
    folder = tmp_path_factory.mktemp("made_encoder")
    tokenizer = ("--control_tokens", "encoder", "--vocab_size", 1024, "--output_dir", folder / "tokenizer")
    run_program("data_tools/train_tokenizer.py", "--input", CORPUS / "az", *tokenizer)
    packed = ("--tokenizer", folder / "tokenizer", "--output_dir", folder / "shards")
    run_program("data_tools/pack_mmap.py", "--input", CORPUS / "az", *packed)
    return folder


@pytest.fixture(scope="session")
def english(tmp_path_factory):
    """The folder of an English tokenizer: 700 tokens, other merges than `made`'s, then the 256 control tokens."""
    folder = tmp_path_factory.mktemp("english") / "tokenizer"
    run_program("data_tools/train_tokenizer.py", "--input", CORPUS / "en", "--vocab_size", 700, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def sweep(made):
    """A folder of tokenizers, 300, 400, 600 and 1024: that of `made`, with only as many bytes and merges as their name says."""
    folder, whole = made / "sweep", json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    for size in (300, 400, 600, 1024):
        vocab = {token: i for token, i in whole["model"]["vocab"].items() if i < size}
        model = {**whole["model"], "vocab": vocab, "merges": whole["model"]["merges"][: size - 256]}
        added = [{**token, "id": token["id"] - 1024 + size} for token in whole["added_tokens"]]
        (folder / str(size)).mkdir(parents=True)
        cut = {**whole, "model": model, "added_tokens": added, "post_processor": None}
        (folder / str(size) / "tokenizer.json").write_text(json.dumps(cut))
    return folder


@pytest.fixture(scope="session")
def tiny_model(made):
    """A Hugging Face folder: a tiny Llama with random weights and the tokenizer of `made`, as `cpt.py` leaves one."""
    run_program(
        "scripts/cpt.py",
        "--datasets",
        f"{{path: {made}/shards}}",
        "--tokenizer",
        made / "tokenizer",
        "--model_config",
        TINY_LLAMA,
        "--max_length",
        64,
        "--global_batch_size",
        4,
        "--max_steps",
        2,
        "--learning_rate",
        "1e-3",
        "--output_dir",
        made / "tiny",
    )
    return made / "tiny" / "model"
