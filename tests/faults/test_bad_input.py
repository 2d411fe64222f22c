"""A person's mistake gets one line (what, where, what to do), exit code 2, and leaves nothing under a final name."""

import gzip
import shutil
import subprocess
import sys

import pytest
import zstandard
from conftest import CORPUS, ROOT

from dilqur.pipeline.manifest import read_manifest

CLEAN, PACK = "data_tools/clean_corpus.py", "data_tools/pack_mmap.py"
READERS = ("clean_corpus", "train_tokenizer", "eval_tokenizer", "pack_mmap")
TEXT = "Bakı Xəzər dənizinin sahilində yerləşən qədim və gözəl bir şəhərdir."
RECORD = f'{{"text": "{TEXT}"}}\n'.encode()


@pytest.fixture
def flags(made):
    """What each program that reads documents needs besides --input and --output_dir."""
    reads = ["--tokenizer", made / "tokenizer"]
    return {"clean_corpus": [], "train_tokenizer": ["--vocab_size", 260], "eval_tokenizer": reads, "pack_mmap": reads}


@pytest.fixture
def refused(run, tmp_path):
    """Runs a program into `out` and returns its one line; fails if there is another line, a traceback or a result."""

    def check(program, *arguments, out=tmp_path / "out"):
        output = ["--output_dir", out] if out else []
        done = run(program, *arguments, *output, code=2)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        shown = [p.relative_to(out) for p in out.rglob("*") if p.is_file()] if out else []
        assert not [p for p in shown if not any(part.startswith(".") for part in p.parts)]
        return done.stderr

    return check


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "text", "words"),
    [
        (CLEAN, "input: [a]\nlanguge: az\n", "stage.yaml:2: unknown key languge, did you mean language?"),
        (CLEAN, "min_chars: 1\ninput: [a]\nmin_chars: 2\n", "stage.yaml:3: min_chars is already set in line 1"),
        ("scripts/cpt.py", "bf16: 7\n", "stage.yaml:1: bf16 should be a valid boolean, not 7"),
        (CLEAN, "input: corpus\n", "stage.yaml:1: input should be a valid list, not 'corpus'"),
        (CLEAN, "input: [a]\nmin_chars: 0\n", "stage.yaml:2: min_chars should be greater than or equal to 1, not 0"),
        ("scripts/cpt.py", "learning_rate: 0\n", "stage.yaml:1: learning_rate should be greater than 0, not 0"),
        (
            "data_tools/pack_mmap.py",
            "input: [x]\n",
            "--tokenizer missing: give the flag, or the key in a recipe (--config)",
        ),
        ("data_tools/train_tokenizer.py", "vocab_size: 300\n", "give either --input or, in a recipe, sources"),
        (CLEAN, "language: az\n", "give either --input or, in a recipe, sources"),
        (CLEAN, "input: [a\n", "stage.yaml:2: not valid YAML"),
    ],
)
def test_a_recipe_with_a_mistake(refused, tmp_path, program, text, words):
    (tmp_path / "stage.yaml").write_text(text)
    assert words in refused(program, "--config", tmp_path / "stage.yaml")


def test_a_recipe_or_a_flag_that_is_not_there(refused):
    assert "nowhere.yaml: cannot read this recipe" in refused(CLEAN, "--config", "nowhere.yaml")
    assert "unknown argument --languge, did you mean --language?" in refused(
        CLEAN, "--input", CORPUS / "az", "--languge", "az"
    )
    assert "--output_dir missing: give it, or a recipe" in refused(CLEAN, "--input", CORPUS / "az", out=None)


def test_a_stage_run_before_the_one_it_needs(refused, tmp_path):
    program, recipe = "data_tools/train_tokenizer.py", tmp_path / "tokenizer.yaml"
    (tmp_path / "pipeline.txt").write_text(f"clean {CLEAN} cpu\ntokenizer {program} cpu\n")
    recipe.write_text("input: [clean/train]\nvocab_size: 1024\n")
    line = refused(program, "--config", recipe, "--run_dir", tmp_path / "run")
    assert "input: clean/train: the stage clean has not finished" in line and "run it first" in line


# -- text -------------------------------------------------------------------------------------------------------------

BAD_RECORDS = {
    "broken JSON": (b'{"text": "Bak\n', "broken JSON (Unterminated string"),
    "invalid UTF-8": (b'{"text": "Bak\xff"}\n', "invalid UTF-8 at byte 13"),  # 13 bytes stand before it
    "no text field": (b'{"content": "Bak"}\n', "no text field 'text' (keys: content); see --text_field"),
}
BAD_FILES = {
    "cut.jsonl.gz": (gzip.compress(RECORD * 9)[:-9], "truncated or damaged after line"),
    "cut.jsonl.zst": (zstandard.ZstdCompressor().compress(RECORD * 9)[:-1], "truncated or damaged after line"),
    "no.parquet": (b"PAR1", "not a whole parquet file"),
    "empty.jsonl": (b"", "in there: nothing to"),
    "empty.jsonl.zst": (zstandard.ZstdCompressor().compress(b"\n\n"), "in there: nothing to"),
}


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize(("data", "words"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_named_or_if_asked_skipped_and_counted(refused, run, flags, tmp_path, program, data, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(RECORD + data + RECORD)
    command = [f"data_tools/{program}.py", "--input", file, *flags[program]]
    line = refused(*command)
    assert f"{file}:2: " in line and words in line
    done = run(*command, "--on_error", "skip", "--output_dir", tmp_path / "skipped")
    assert done.stderr == line.replace("error: ", "skipped: ").replace(
        "; --on_error skip goes on without it and counts it", ""
    )
    written = "".join(p.read_text() for p in (tmp_path / "skipped").glob("*.json"))
    assert '"bad_record": 1' in written or '"bad_records": 1' in written


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_cut_or_empty_is_named(refused, flags, tmp_path, program, name):
    data, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    line = refused(f"data_tools/{program}.py", "--input", tmp_path / name, *flags[program])
    assert str(tmp_path / name) in line and words in line


@pytest.mark.parametrize("program", READERS)
def test_input_that_is_not_there(refused, flags, tmp_path, program):
    line = refused(f"data_tools/{program}.py", "--input", tmp_path / "missing.jsonl", *flags[program])
    assert f"{tmp_path / 'missing.jsonl'}: no such file, folder or pattern" in line


def test_what_a_failed_run_cleaned_is_not_there_for_the_next_one(refused, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(RECORD)
    (tmp_path / "b.jsonl").write_bytes(b"{")
    assert "b.jsonl:1: broken JSON" in refused(CLEAN, "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_another_process_is_writing(refused, tmp_path):
    code = (
        "import sys; from dilqur.pipeline.stage import Stage, StageSettings\n"
        "settings = StageSettings(output_dir=sys.argv[1]); settings.config = None\n"
        "stage = Stage(settings, 'x.py').open(); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        line = refused(CLEAN, "--input", CORPUS / "az")
        other.kill()
    assert f"process {other.pid} on " in line and "wait for it, or choose another --output_dir" in line


def test_an_output_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "taken").touch()
    line = refused(CLEAN, "--input", CORPUS / "az", "--output_dir", tmp_path / "taken", out=None)
    assert f"{tmp_path / 'taken'}: no folder can be made there" in line


def test_a_result_of_other_settings_or_of_another_program_is_not_overwritten(refused, made):
    clean = [CLEAN, "--input", CORPUS / "az", "--language", "az", "--output_dir", made / "clean"]
    assert "finished with validation_fraction = 0.1, now 0.0" in refused(*clean, out=None)
    line = refused(
        PACK,
        "--input",
        CORPUS / "az",
        "--tokenizer",
        made / "tokenizer",
        "--output_dir",
        made / "clean",
        "--overwrite_output_dir",
        "true",
        out=None,
    )
    assert "holds a result of clean_corpus.py, not of pack_mmap.py" in line
    assert read_manifest(made / "clean")["program"] == "clean_corpus.py"


def test_a_shard_whose_checksum_is_wrong(refused, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards")
    with (tmp_path / "shards" / "tokens-00000.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")  # the highest byte of a small id is 0
    line = refused("data_tools/inspect_tokens.py", "verify", tmp_path / "shards", out=None)
    assert "tokens-00000.npy: its checksum is not the one in manifest.json: damaged; pack again" in line


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of 1 MB of which 8 kB are free: enough for the lock file, for no result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a file system of 1 MB cannot be mounted here: {mount.stderr.strip()}")
    (disk / "other").write_bytes(bytes((1 << 20) - (8 << 10)))
    yield disk / "out"
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("program", READERS)
def test_a_full_disk(refused, flags, full_disk, program):
    line = refused(f"data_tools/{program}.py", "--input", CORPUS / "az", *flags[program], out=full_disk)
    assert "no space left on the device" in line and "choose another --output_dir" in line


def test_this_file_runs_every_program_of_data_tools_that_reads_documents():
    assert {p.stem for p in ROOT.glob("data_tools/*.py") if "list[Documents]" in p.read_text()} == set(READERS)
