"""A run folder: one writer, finished or not, and what was read to make it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dilqur.common.errors import AlreadyFinished, InputError
from dilqur.evals.model_names import display_names
from dilqur.pipeline.inputs import Documents, ModelPath, ShardsPath
from dilqur.pipeline.manifest import read_manifest
from dilqur.pipeline.rows import read_pipeline
from dilqur.pipeline.stage import Stage, StageSettings


@dataclass(kw_only=True)
class Settings(StageSettings):
    input: list[Documents]
    language: str = "az"
    config: str | None = None  # parse() adds it


@pytest.fixture
def text(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("salam\n")
    return tmp_path / "raw"


@pytest.fixture
def stage(tmp_path, text):
    """Makes the Stage of data_tools/clean_corpus.py on `text`, with other settings if given."""

    def make(program="data_tools/clean_corpus.py", **settings):
        return Stage(Settings(**{"input": [str(text)], "output_dir": str(tmp_path / "out"), **settings}), program)

    return make


@pytest.fixture
def finished(stage):
    stage().open().finish({"documents": 1})
    return stage


# -- finished or not --------------------------------------------------------------------------------------------------


def test_a_finished_stage_says_so_and_is_not_run_again(finished, tmp_path):
    with pytest.raises(AlreadyFinished, match=f"clean_corpus: finished .* nothing to do .*{tmp_path / 'out'}"):
        finished().refuse_finished()


def test_a_stage_without_a_manifest_is_run(stage):
    stage().open()
    stage().refuse_finished()


def test_other_settings_are_named_and_what_to_do_about_them(finished):
    with pytest.raises(InputError, match=r"finished with language = 'az', now 'en'; remove .* or give --overwrite_"):
        finished(language="en").refuse_finished()


def test_an_input_that_changed_since_is_named(finished, text):
    os.utime(text / "a.txt")  # touched, not changed: still the same
    with pytest.raises(AlreadyFinished):
        finished().refuse_finished()
    (text / "a.txt").write_text("Salam\n")  # of the same length
    with pytest.raises(InputError, match=r"its input .*a\.txt has changed since"):
        finished().refuse_finished()


def test_a_file_that_is_new_in_an_input_folder_is_named(finished, text):
    (text / "b.txt").write_text("yeni\n")
    with pytest.raises(InputError, match=r"its input .*b\.txt is new since"):
        finished().refuse_finished()


def test_raw_text_may_be_moved_away_once_its_result_stands(finished, text):
    text.rename(text.with_name("archive"))
    with pytest.raises(AlreadyFinished):
        finished().refuse_finished()
    with pytest.raises(InputError, match="no such file"):
        finished(overwrite_output_dir=True)


def test_overwriting_removes_a_result_of_this_program_and_of_no_other(finished, tmp_path):
    (tmp_path / "out" / "old").touch()
    with pytest.raises(InputError, match=r"holds a result of clean_corpus\.py, not of pack_mmap\.py"):
        finished("data_tools/pack_mmap.py", overwrite_output_dir=True).refuse_finished()
    again = finished(overwrite_output_dir=True)
    again.refuse_finished()
    assert (tmp_path / "out" / "old").exists()  # nothing is removed before the stage begins
    again.open()
    assert not (tmp_path / "out" / "old").exists()


def test_overwriting_is_not_done_by_a_check(finished):
    with pytest.raises(AlreadyFinished):
        finished(overwrite_output_dir=True, check=True).refuse_finished()


def test_a_damaged_manifest_is_named(finished, tmp_path):
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        finished().refuse_finished()


def test_the_manifest_says_what_was_read_with_what_and_on_what(finished, tmp_path, text):
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["stage"], manifest["program"]) == ("clean_corpus", "clean_corpus.py")
    assert manifest["result"] == {"documents": 1}
    assert manifest["arguments"] == {"input": [str(text)], "language": "az", "config": None}
    file = manifest["inputs"][str(text)]["files"][str(text / "a.txt")]
    assert file["bytes"] == 6 and len(file["xxh3"]) == 32  # "salam\n"; 128 bits as hexadecimal
    assert manifest["packages"]["numpy"] and manifest["hardware"]["cores"] >= 1
    assert manifest["started"] <= manifest["ended"]


# -- one writer -------------------------------------------------------------------------------------------------------


def test_a_folder_another_process_writes_is_refused_until_that_ends(stage, tmp_path, text):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_stage import Settings, Stage\n"
        "stage = Stage(Settings(input=[sys.argv[2]], output_dir=sys.argv[3]), 'x.py').open()\n"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, Path(__file__).parent, text, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=rf"out: process {other.pid} on .* is writing this folder"):
            stage().open()
        other.kill()  # a lock must not outlive its process, however it ends
    stage().open()


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_an_output_folder_that_cannot_be_is_said_in_a_line(stage, tmp_path, place):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="no folder can be made there"):
        stage(output_dir=str(tmp_path / place)).open()


# -- where things lie -------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    (folder / "pipeline.txt").write_text(
        "# a comment\n\nclean  data_tools/clean_corpus.py  cpu\n"
        "pack  data_tools/pack_mmap.py  cpu  --seed 7  # and another\n"
    )
    (folder / "pack.yaml").write_text("input: [clean/train]\n")
    return folder / "pack.yaml"


def test_a_recipe_names_the_stage_and_its_folder(recipe, text):
    stage = Stage(Settings(input=[str(text)], config=str(recipe)), "data_tools/pack_mmap.py")
    assert (stage.name, str(stage.folder)) == ("pack", "runs/mine/pack")


def test_a_variant_reads_the_recipe_and_has_a_name_and_a_folder_of_its_own(recipe, text, tmp_path):
    settings = Settings(input=[str(text)], config=str(recipe), run_dir=str(tmp_path), stage="pack@seed-1")
    stage = Stage(settings, "data_tools/pack_mmap.py")
    assert (stage.name, stage.folder) == ("pack@seed-1", tmp_path / "pack@seed-1")
    stage.open().finish({})
    manifest = read_manifest(stage.folder)
    assert manifest["stage"] == "pack@seed-1" and "stage" not in manifest["arguments"], "a name is no setting"


@pytest.mark.parametrize("name", ["clean@seed-1", "pack", "pack-2", "pack@", "pack@a/b", "pack@a b"])
def test_a_variant_named_after_another_recipe_or_unfit_for_a_folder_is_refused(recipe, text, name):
    with pytest.raises(
        InputError, match=rf"--stage {name}: a variant of .*pack\.yaml is called pack@ and then letters"
    ):
        Stage(Settings(input=[str(text)], config=str(recipe), stage=name), "pack_mmap.py")


def test_a_variant_without_its_recipe_is_refused(stage):
    with pytest.raises(InputError, match=r"--stage pack@a: .* give that, too \(--config\)"):
        stage(stage="pack@a")


def test_a_path_that_begins_with_a_variant_lies_in_its_folder(recipe, tmp_path):
    with (recipe.parent / "pipeline.txt").open("a") as file:
        file.write("clean@az data_tools/clean_corpus.py cpu --language az\n")
    train = tmp_path / "run" / "clean@az" / "train"
    train.mkdir(parents=True)
    (train / "a.txt").write_text("salam\n")
    (train.parent / "manifest.json").write_text("{}")
    settings = Settings(input=["clean@az/train"], config=str(recipe), run_dir=str(tmp_path / "run"))
    Stage(settings, "pack_mmap.py")
    assert settings.input == [str(train)]


def test_a_path_that_begins_with_a_stage_lies_in_the_run_folder_once_that_has_finished(recipe, tmp_path):
    def pack():
        return Stage(Settings(input=["clean/train"], config=str(recipe), run_dir=str(tmp_path / "run")), "pack_mmap.py")

    with pytest.raises(InputError, match=r"input: clean/train: the stage clean has not finished .*run it first"):
        pack()
    train = tmp_path / "run" / "clean" / "train"
    train.mkdir(parents=True)
    (train / "a.txt").write_text("salam\n")
    with pytest.raises(InputError, match="has not finished"):  # its files are there, its manifest is not
        pack()
    (train.parent / "manifest.json").write_text("{}")
    assert pack().settings.input == [str(train)]


def test_a_path_beside_the_recipe_is_found_there(recipe):
    (recipe.parent / "corpus").mkdir()
    (recipe.parent / "corpus" / "a.txt").write_text("salam\n")
    stage = Stage(Settings(input=["corpus", "corpus/*.txt"], config=str(recipe)), "pack_mmap.py")
    assert stage.settings.input == [str(recipe.parent / "corpus"), str(recipe.parent / "corpus/*.txt")]


def test_without_a_recipe_an_output_folder_is_asked_for_but_by_programs_that_print(stage):
    with pytest.raises(InputError, match="--output_dir missing"):
        stage(output_dir=None)


def test_a_program_that_prints_writes_nothing_without_a_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Stage(Settings(input=[str(text)]), "eval_tokenizer.py", prints_only_without_folder=True)
    stage.refuse_finished()
    stage.open()
    stage.finish({})
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ModelPath, "no config.json .*: not a Hugging Face model folder"),
        (ShardsPath, "no manifest.json .*: not a folder of token shards"),
    ],
)
def test_a_folder_of_the_wrong_kind_is_refused(kind, words, tmp_path):
    @dataclass(kw_only=True)
    class Reads(StageSettings):
        path: kind
        config: str | None = None

    with pytest.raises(InputError, match=words):
        Stage(Reads(path=str(tmp_path), output_dir="x"), "x.py")


def test_a_model_that_is_not_here_is_said_with_the_command_that_fetches_it(stage):
    with pytest.raises(InputError, match="on a machine with network: hf download nobody/nothing"):
        stage().path("nobody/nothing", "model", "model_name_or_path")


def test_a_stage_stands_for_the_model_it_wrote(stage, tmp_path):
    (tmp_path / "cpt" / "model").mkdir(parents=True)
    (tmp_path / "cpt" / "model" / "config.json").write_text("{}")
    assert stage().path(str(tmp_path / "cpt"), "model", "model_name_or_path") == str(tmp_path / "cpt" / "model")


# -- pipeline.txt -----------------------------------------------------------------------------------------------------


def test_a_pipeline_is_a_table_of_stage_program_batch_file_and_flags(recipe):
    rows = read_pipeline(recipe.parent)
    assert [(r.name, r.program, r.batch, r.flags) for r in rows] == [
        ("clean", "data_tools/clean_corpus.py", "cpu", ()),
        ("pack", "data_tools/pack_mmap.py", "cpu", ("--seed", "7")),
    ]


def test_a_row_of_a_variant_starts_its_program_with_the_recipe_the_name_and_the_flags(tmp_path):
    (tmp_path / "pipeline.txt").write_text("full t.py gpu --seed 7\nfull@a@1 t.py gpu --seed 8\n")
    plain, variant = read_pipeline(tmp_path)
    assert (variant.name, variant.recipe) == ("full@a@1", "full")
    assert plain.arguments(tmp_path) == ["--config", f"{tmp_path}/full.yaml", "--seed", "7"]
    assert variant.arguments("x") == ["--config", "x/full.yaml", "--stage", "full@a@1", "--seed", "8"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("first@ x.py cpu", r"pipeline\.txt:2: the stage first@ gives a folder its name: take letters, digits and"),
        ("@variant x.py cpu", r"pipeline\.txt:2: the stage @variant gives a folder its name"),
        ("a/b x.py cpu", r"pipeline\.txt:2: the stage a/b gives a folder its name"),
        ("clean data_tools/clean_corpus.py", r"pipeline\.txt:2: a line is: stage, program, batch file, flags"),
        ("first x.py cpu", r"pipeline\.txt:2: the stage first is there twice"),
        ("second x.py cpu --names 'Llama 3", r"pipeline\.txt:2: a quotation mark is not closed"),
    ],
)
def test_a_broken_pipeline_is_refused_with_its_line(tmp_path, line, words):
    (tmp_path / "pipeline.txt").write_text(f"first x.py cpu\n{line}\n")
    with pytest.raises(InputError, match=words):
        read_pipeline(tmp_path)


def test_names_in_tables_are_the_folders_names_and_whole_paths_only_where_two_are_alike():
    paths = ["runs/a/bpb", "runs/a/cpt/model", "x/same", "y/same"]
    assert list(display_names(paths)) == ["bpb", "cpt", "x/same", "y/same"]


def test_a_manifest_is_json_that_anything_reads(finished, tmp_path):
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["stage"] == "clean_corpus"
