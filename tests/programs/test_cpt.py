"""cpt.py in one process: it learns, stops, goes on to the bit, and refuses in one line what would waste GPU hours."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import CORPUS, TINY_LLAMA
from safetensors.torch import load_file

from dilqur.checkpoint.format import CheckpointReader, publish

LENGTH, BATCH, STEPS = 64, 8, 30


@pytest.fixture(scope="module")
def cpt(run, made, tiny_model):
    """Runs cpt.py on the tiny model and the corpus, 8 sequences of 64 tokens per step; flags given later win."""

    def start(*flags, model=tiny_model, shards=made / "shards", code=0, **environment):
        source = ("--model_name_or_path", model) if model else ()
        shape = f"--max_length {LENGTH} --global_batch_size {BATCH} --learning_rate 3e-3".split()
        flags = (*source, "--datasets", f"{{path: {shards}}}", *shape, *flags)
        # one thread: on a busy machine two wait for each other
        return run("scripts/cpt.py", *flags, code=code, OMP_NUM_THREADS="1", **environment)

    return start


@pytest.fixture(scope="module")
def base(cpt, made, tmp_path_factory):
    """An uninterrupted run of all weights, with evaluation."""
    folder = tmp_path_factory.mktemp("base") / "run"
    cpt(*training(made), "--output_dir", folder)
    return folder


def training(made):
    flags = f"--max_steps {STEPS} --warmup_steps 3 --save_steps 4 --eval_steps 10".split()
    return (*flags, "--eval_datasets", f"{{path: {made}/held_out}}")


@pytest.fixture(scope="module")
def english(run, made, tmp_path_factory):
    """Token shards of a tokenizer that is not the model's."""
    folder = tmp_path_factory.mktemp("english")
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    run("data_tools/train_tokenizer.py", "--input", CORPUS / "en", "--vocab_size", 700, "--output_dir", tokenizer)
    run("data_tools/pack_mmap.py", "--input", CORPUS / "en", "--tokenizer", tokenizer, "--output_dir", shards)
    return folder


def metrics(folder, *names):
    """One tuple of `names` a step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [tuple(r.get(name) for name in names) for r in records]


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refused(done, *says):
    """It said `says` in one line and nothing else."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(words in line for words in says), line


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_falls(base, made):
    losses = metrics(base, "loss")
    # the model knows nothing but the size of its vocabulary: ln 1,280 = 7.15; then it learns which tokens are frequent
    assert losses[0][0] == pytest.approx(7.15, abs=0.1)
    assert losses[-1][0] < 6.6
    evaluated = {step: loss for step, (loss,) in enumerate(metrics(base, "eval_loss"), 1) if loss}
    assert list(evaluated) == [10, 20, 30]
    assert evaluated[30] < evaluated[10] < 7.1
    manifest = json.loads((made / "held_out" / "manifest.json").read_text())
    bits = evaluated[30] / math.log(2) * manifest["tokens"] / manifest["utf8_bytes"]
    assert metrics(base, "eval_bits_per_byte")[-1][0] == pytest.approx(bits)


def test_the_model_loads_with_transformers_as_it_is(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(base / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # a next phase goes on from these
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    text = "Sabah hava necə olacaq?"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    out = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.max() < 1280
    assert (base / "model" / "chat_template.jinja").exists()


def test_the_manifest_says_what_the_model_was_made_of_and_where(base, made, tiny_model):
    manifest = json.loads((base / "manifest.json").read_text())
    assert {(path, record["kind"]) for path, record in manifest["inputs"].items()} == {
        (str(tiny_model), "model"),
        (f"{made}/shards", "shards"),
        (f"{made}/held_out", "shards"),
    }
    assert all(file["xxh3"] for record in manifest["inputs"].values() for file in record["files"].values())
    assert torch.__version__.startswith(manifest["packages"]["torch"])
    assert manifest["hardware"]["cores"] >= 1
    assert manifest["seed"] == 42
    assert manifest["arguments"]["learning_rate"] == 3e-3
    result = manifest["result"]
    assert result["steps"] == STEPS
    assert result["tokens"] == STEPS * BATCH * LENGTH
    assert result["data"]["end_position"] == STEPS * BATCH
    assert (result["loss"], result["eval_loss"]) == metrics(base, "loss", "eval_loss")[-1]


def test_embeddings_only_leaves_every_other_weight_as_it_was_to_the_bit(cpt, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, set_seed

    set_seed(0)
    shutil.copytree(tiny_model, tmp_path / "base")  # for its tokenizer; the weights are written by transformers alone
    LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(tiny_model).config).save_pretrained(tmp_path / "base")
    only = ("--unfrozen_parameters", "*embed_tokens*")
    cpt(*only, "--max_steps", 3, "--output_dir", tmp_path / "run", model=tmp_path / "base")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "run" / "model")
    assert before.keys() == after.keys()  # tied: neither has an lm_head of its own
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sizes = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]
    assert sizes["trainable"] == 1280 * 64 < sizes["parameters"]


def test_a_new_model_can_begin_with_random_weights_drawn_from_the_seed(cpt, made, tmp_path):
    new = ("--model_config", TINY_LLAMA, "--tokenizer", made / "tokenizer", "--max_steps", 1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cpt(*new, "--seed", seed, "--output_dir", tmp_path / name, model=None)
    a, b, c = (weights(tmp_path / name / "model") for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


@pytest.mark.parametrize("ceiling", [4, 1])  # 8 = 4 × 2 accumulated = 1 × 8 accumulated; the base run is 8 × 1
def test_the_memory_ceiling_does_not_change_the_run(cpt, base, made, tmp_path, ceiling):
    cpt(*training(made), "--per_device_train_batch_size", ceiling, "--output_dir", tmp_path / "run")
    for name in ("loss", "eval_loss", "grad_norm"):
        expected, found = ([v for (v,) in metrics(f, name) if v is not None] for f in (base, tmp_path / "run"))
        # fp32 sums in another order: 1e-5 is some 100 roundings of 6e-8. Gradients drift apart sooner than losses; in
        # the first steps, with ten times that, a norm of twice the size would be seen, which Adam hides from the loss
        compared, tolerance = (8, 1e-4) if name == "grad_norm" else (None, 1e-5)
        assert found[:compared] == pytest.approx(expected[:compared], rel=tolerance), name


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(cpt, made, tmp_path_factory):
    """The run of `base`, stopped after step 6: between the checkpoints of 4 and 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    done = cpt(*training(made), "--stop_at_step", 6, "--output_dir", folder)
    assert "stopped after step 6 of 30 (stop_at_step 6)" in done.stdout
    return folder


def test_a_stopped_run_leaves_a_checkpoint_and_a_note_but_no_result(stopped):
    assert (stopped / "REQUEUE").exists()
    assert (stopped / "checkpoints" / "step-0000006" / "COMPLETE").exists()
    assert not (stopped / "manifest.json").exists()
    assert not (stopped / "model").exists()
    assert len(metrics(stopped, "loss")) == 6


def test_going_on_with_another_recipe_is_refused(cpt, stopped, made):
    done = cpt(*training(made), "--learning_rate", "1e-3", "--output_dir", stopped, code=2)
    refused(done, "step-0000006: made with learning_rate = 0.003, now 0.001", "another run")


def test_the_model_a_run_began_with_may_lie_elsewhere_but_no_other_may_lie_there(
    cpt, base, stopped, made, tiny_model, tmp_path
):
    from safetensors.torch import save_file

    folder = shutil.copytree(stopped, tmp_path / "run")
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    trained = {name: weight * 1.001 for name, weight in weights(other).items()}
    save_file(trained, other / "model.safetensors", metadata={"format": "pt"})
    done = cpt(*training(made), "--output_dir", folder, model=other, code=2)
    refused(done, f"step-0000006: began with another model than {other}")
    cpt(*training(made), "--stop_at_step", 8, "--output_dir", folder, model=moved)
    assert metrics(folder, "loss") == metrics(base, "loss")[:8]


def test_going_on_for_longer_with_less_memory_is_the_same_run(cpt, stopped, made, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    changed = ("--max_steps", 8, "--per_device_train_batch_size", 2, "--save_steps", 1)
    cpt(*training(made), *changed, "--output_dir", folder)
    assert metrics(folder, "loss")[:6] == metrics(stopped, "loss")
    assert len(metrics(folder, "loss")) == 8
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-0000007", "step-0000008"]


def test_the_same_command_goes_on_and_the_losses_are_those_of_an_uninterrupted_run(cpt, base, stopped, made, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    done = cpt(*training(made), "--output_dir", folder)
    assert re.search(rf"resumed +{folder}/checkpoints/step-0000006", done.stdout)
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    assert metrics(folder, *names) == metrics(base, *names)
    assert equal(weights(folder / "model"), weights(base / "model"))
    assert not (folder / "REQUEUE").exists()


def test_a_run_begun_from_a_given_checkpoint_goes_on_from_its_own_after_a_requeue(cpt, base, made, stopped, tmp_path):
    given = ("--resume_from_checkpoint", stopped / "checkpoints" / "step-0000006", "--output_dir", tmp_path / "run")
    cpt(*training(made), *given, "--stop_at_step", 9)
    done = cpt(*training(made), *given, "--stop_at_step", 12)
    assert re.search(rf"resumed +{tmp_path}/run/checkpoints/step-0000009", done.stdout)
    done = cpt(*training(made), *given)
    assert re.search(rf"resumed +{tmp_path}/run/checkpoints/step-0000012", done.stdout)
    assert equal(weights(tmp_path / "run" / "model"), weights(base / "model"))


def test_without_the_optimizer_the_moments_begin_at_zero_once_and_not_after_every_requeue(
    cpt, base, made, stopped, tmp_path
):
    folder = shutil.copytree(stopped, tmp_path / "run")
    without = (*training(made), "--resume_without_optimizer", "true", "--output_dir", folder)
    cpt(*without, "--stop_at_step", 9)
    cpt(*without)
    begun_at_six = metrics(folder, "loss")
    assert begun_at_six[:6] == metrics(base, "loss")[:6]
    assert begun_at_six[7] != metrics(base, "loss")[7]
    (through := tmp_path / "through").mkdir()
    shutil.copytree(stopped, through / "run")
    cpt(*without[:-1], through / "run")  # the same without the stop at 9
    assert metrics(through / "run", "loss") == begun_at_six
    assert json.loads((folder / "checkpoints/step-0000030/trainer.json").read_text())["optimizer_steps"] == 24


def test_the_best_checkpoint_stays_and_can_become_the_model(cpt, made, tmp_path):
    # the rate climbs until it does harm: 8.2, 12.2, 7.1, 9.4, 10.1, 10.7
    flags = (*training(made), "--eval_steps", 2, "--save_steps", 2, "--max_grad_norm", "none", "--warmup_steps", 11)
    flags += ("--learning_rate", "1", "--load_best_model_at_end", "true", "--max_steps", 12)
    cpt(*flags, "--output_dir", tmp_path / "run")
    evaluated = {step: loss for step, (loss,) in enumerate(metrics(tmp_path / "run", "eval_loss"), 1) if loss}
    best = min(evaluated, key=evaluated.get)
    assert best < 10, "the test does not test"
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:07d}" for step in (best, 10, 12)]
    result = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]
    assert result["model_of_step"] == best
    flags += ("--mirror_to", tmp_path / "mirror", "--save_total_limit", 1)
    cpt(*flags, "--stop_at_step", 11, "--output_dir", tmp_path / "first")
    cpt(*flags, "--output_dir", tmp_path / "on another machine")
    result = json.loads((tmp_path / "on another machine" / "manifest.json").read_text())["result"]
    assert result["model_of_step"] == best


def test_an_evaluation_that_was_cut_short_is_done_when_the_run_goes_on(cpt, base, made, tmp_path):
    """A signal in the middle of the evaluation of step 10, or of the last one: here the checkpoints and lines it leaves."""
    for step in (10, STEPS):
        folder = tmp_path / str(step)
        cpt(*training(made), "--stop_at_step", step, "--output_dir", folder)
        if step == STEPS:
            shutil.rmtree(folder / "model")
            (folder / "manifest.json").unlink()
        checkpoint = folder / "checkpoints" / f"step-{step:07d}"
        unknown = {
            k: v for k, v in CheckpointReader(checkpoint).trainer.items() if k not in ("version", "step", "world_size")
        }
        publish(shutil.copytree(checkpoint, folder / "copy"), checkpoint, step, 1, {**unknown, "eval_loss": None})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[-1] = {k: v for k, v in lines[-1].items() if not k.startswith("eval")}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        cpt(*training(made), "--output_dir", folder)
        assert metrics(folder, "loss", "eval_loss") == metrics(base, "loss", "eval_loss")
        assert (
            json.loads((folder / "manifest.json").read_text())["result"]["eval_loss"]
            == metrics(base, "eval_loss")[-1][0]
        )


def test_a_checkpoint_without_its_metrics_goes_on_too_as_one_that_came_to_a_new_machine(cpt, base, made, tmp_path):
    for step in (20, STEPS):  # in the middle, after an evaluation, and at the end, when only model/ was missing
        folder = tmp_path / str(step)
        cpt(*training(made), "--stop_at_step", step, "--output_dir", folder)
        shutil.rmtree(folder / "model", ignore_errors=True)
        for name in ("metrics.jsonl", "manifest.json"):
            (folder / name).unlink(missing_ok=True)
        cpt(*training(made), "--output_dir", folder)
        assert equal(weights(folder / "model"), weights(base / "model"))


def test_a_new_machine_goes_on_from_the_mirror_and_one_with_an_older_checkpoint_too(cpt, base, made, tmp_path):
    mirror = ("--mirror_to", tmp_path / "mirror")
    cpt(*training(made), *mirror, "--stop_at_step", 9, "--output_dir", tmp_path / "first")
    there = sorted(p.name for p in (tmp_path / "mirror").iterdir())
    assert there == ["WRITER", "step-0000008", "step-0000009"]
    done = cpt(*training(made), *mirror, "--stop_at_step", 10, "--output_dir", tmp_path / "new")
    assert f"bringing the checkpoint of step 9 from {tmp_path}/mirror" in done.stdout
    shutil.move(tmp_path / "first", tmp_path / "back")  # the first machine again: it has 8 and 9, the mirror 9 and 10
    done = cpt(*training(made), *mirror, "--output_dir", tmp_path / "back")
    assert f"bringing the checkpoint of step 10 from {tmp_path}/mirror" in done.stdout
    assert equal(weights(tmp_path / "back" / "model"), weights(base / "model"))
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == ["WRITER", "step-0000028", "step-0000030"]


def test_a_mirror_that_is_the_runs_own_folder_is_refused(cpt, tmp_path):
    own = ("--output_dir", tmp_path / "run", "--mirror_to", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(cpt("--max_steps", 2, *own, code=2), "mirror_to: the run's own checkpoints are no copy")


def test_what_is_saved_by_the_clock_and_kept_for_good(cpt, made, tmp_path):
    flags = (*training(made), "--save_steps", 1000, "--save_minutes", "0.0001", "--save_keep_every", 5)
    cpt(*flags, "--output_dir", tmp_path / "run")
    names = [int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    # one is due after every step, but by the time it is asked for a step may have gone by; of those, 5, 10, … stay, and the last two
    assert max(names) == STEPS
    assert len(names) > 3
    assert all(step % 5 == 0 for step in sorted(names)[:-2])


def test_a_run_killed_while_it_wrote_its_result_writes_it_again(cpt, base, made, tmp_path):
    folder = shutil.copytree(base, tmp_path / "run")
    (folder / "manifest.json").unlink()
    (folder / "model" / "model.safetensors").unlink()
    cpt(*training(made), "--output_dir", folder)
    assert equal(weights(folder / "model"), weights(base / "model"))
    assert metrics(folder, "loss") == metrics(base, "loss")
    assert (folder / "manifest.json").exists()


def test_a_finished_run_says_so_and_another_recipe_is_no_reason_to_overwrite_it(cpt, base, made):
    done = cpt(*training(made), "--output_dir", base)
    assert "nothing to do" in done.stdout
    done = cpt(*training(made), "--learning_rate", "1e-3", "--output_dir", base, code=2)
    refused(done, "finished with learning_rate = 0.003, now 0.001", "--overwrite_output_dir")


def test_a_second_phase_goes_on_in_the_data_with_its_own_schedule(cpt, base, tmp_path):
    cpt("--continue_data", "true", "--max_steps", 2, "--output_dir", tmp_path / "run", model=base)
    data = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["data"]
    assert data["start_position"] == STEPS * BATCH
    assert data["end_position"] == (STEPS + 2) * BATCH
    ((loss, rate), _) = metrics(tmp_path / "run", "loss", "learning_rate")
    assert rate == 3e-3  # its own step 0, not the end of the last schedule
    assert loss == pytest.approx(metrics(base, "loss")[-1][0], abs=0.3)  # the first phase's weights, other samples


def test_steps_without_a_finite_loss_are_skipped_and_too_many_in_a_row_end_the_run_in_one_line(cpt, tmp_path):
    flags = ("--learning_rate", "1e30", "--max_steps", 9, "--save_steps", 1, "--max_skipped_steps", 3)
    done = cpt(*flags, "--output_dir", tmp_path / "run", code=2)
    refused(
        done,
        "3 steps in a row had no finite loss or gradient: the samples of positions 8 to 31; no checkpoint contains them, the "
        "last one is step-0000001. Look at the data there, or lower learning_rate",
    )
    assert metrics(tmp_path / "run", "grad_norm", "skipped_steps")[1:] == [(None, 1), (None, 2), (None, 3)]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000001"]


# -- refused before a GPU is touched ----------------------------------------------------------------------------------


def check(cpt, *flags, **more):
    return cpt("--max_steps", 5, "--output_dir", "never", *flags, "--check", "true", code=2, **more)


def test_shards_of_another_tokenizer_are_refused(cpt, english, tiny_model):
    done = check(cpt, shards=english / "shards")
    refused(done, f"{english}/shards was packed with another tokenizer than the one in {tiny_model}")


def test_token_ids_without_a_row_are_refused(cpt, tiny_model, tmp_path):
    small = shutil.copytree(tiny_model, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 1024}))
    refused(check(cpt, model=small), "token ids go up to 1279", "rows for 1024", "transplant_tokenizer.py")


@pytest.mark.parametrize("flags", [("--seed", 7), ("--max_length", 32)])
def test_continuing_in_other_data_is_refused(cpt, flags):
    refused(check(cpt, "--continue_data", "true", *flags), "continue_data", "other shards, max_length, packing or seed")


def test_continuing_where_nothing_was_trained_is_refused(cpt, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "plain" / "folder")
    refused(check(cpt, "--continue_data", "true", model=tmp_path / "plain" / "folder"), "manifest.json")


def test_a_batch_that_does_not_divide_is_refused_with_what_would(cpt):
    done = check(cpt, WORLD_SIZE="3")
    refused(done, "global_batch_size 8 does not divide by 3 processes: take 1, 2, 4, 8 processes", "of 9")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--num_train_epochs", 1), "max_steps or num_train_epochs"),
        (("--warmup_steps", 5), "leaves none of the 5 steps"),
        (("--max_length", 4096), "more than the 2048 positions of"),
        (("--model_config", "{vocab_size: 1280}"), "give model_name_or_path"),
        (("--model_name_or_path", "nobody/nothing"), "nobody/nothing"),
        (("--learning_rat", "1e-3"), "did you mean --learning_rate?"),
    ],
)
def test_other_mistakes_are_one_line_too(cpt, flags, says):
    refused(check(cpt, *flags), says)


def test_a_model_that_did_not_arrive_whole_is_refused(cpt, tiny_model, tmp_path):
    cut = shutil.copytree(tiny_model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-100])
    refused(check(cpt, model=cut), f"{cut}/model.safetensors", "again")


def test_a_new_model_trains_all_its_weights(cpt, made):
    new = ("--model_config", TINY_LLAMA, "--tokenizer", made / "tokenizer")
    refused(
        check(cpt, *new, "--unfrozen_parameters", "*embed*", model=None), "the rest of a new model would stay random"
    )


def test_a_check_that_finds_nothing_says_ok_and_writes_nothing(cpt, tmp_path):
    done = cpt("--max_steps", 5, "--output_dir", tmp_path / "run", "--check", "true")
    assert done.stdout.strip() == "cpt: ok"
    assert not (tmp_path / "run").exists()
