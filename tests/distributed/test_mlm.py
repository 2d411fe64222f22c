"""mlm.py stands on the loop of cpt.py: the same run under every strategy and number of processes, stopped or not; then exported."""

import json
import math

import pytest
import torch
from conftest import ROOT, TINY_NEOBERT
from same_state import differing_tensors, differing_weights
from test_strategies import ROUNDING, STRATEGIES, evaluated_before_saving, flat, metrics

LENGTH, BATCH, STEPS, VOCABULARY = 64, 8, 12, 1152
MLM = ROOT / "scripts" / "mlm.py"


@pytest.fixture(scope="module")
def flags(made_encoder):
    shape = f"--max_length {LENGTH} --global_batch_size {BATCH} --per_device_train_batch_size 2 --max_steps {STEPS}"
    return (
        *shape.split(),
        "--datasets",
        f"{{path: {made_encoder}/shards}}",
        "--learning_rate",
        "4e-3",
        "--save_steps",
        4,
    )


@pytest.fixture(scope="module")
def new(flags, made_encoder):
    return (*flags, "--model_config", TINY_NEOBERT, "--tokenizer", made_encoder / "tokenizer")


@pytest.fixture(scope="module")
def base(run, new, made_encoder, tmp_path_factory):
    """The uninterrupted run of one process, with evaluation."""
    folder = tmp_path_factory.mktemp("base") / "run"
    held_out = ("--eval_datasets", f"{{path: {made_encoder}/shards}}", "--eval_steps", 6, "--max_eval_samples", 32)
    run("scripts/mlm.py", *new, *held_out, "--output_dir", folder)
    return folder


def test_it_begins_at_the_loss_of_knowing_nothing_and_learns(base):
    losses = [loss for (loss,) in metrics(base, "loss").values()]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert losses[-1] < losses[0] - 0.3
    last = json.loads((base / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] < losses[0] - 0.3 and 0 < last["eval_accuracy"] < 1
    manifest = json.loads((base / "manifest.json").read_text())["result"]
    assert manifest["eval_bits_per_byte"] == last["eval_bits_per_byte"]


FUSED = ("--loss_kernel", "chunked")


@pytest.mark.parametrize(
    ("strategy", "processes", "kernels"),
    [*((s, 2, ()) for s in STRATEGIES), ("ddp", 4, ()), ("fsdp2", 2, FUSED), ("zero3", 2, FUSED)],
)
def test_every_strategy_masks_the_same_and_learns_the_same(server, new, base, tmp_path, strategy, processes, kernels):
    out = (*new, *kernels, "--output_dir", tmp_path / "run")
    with server.launch(strategy, out, tmp_path / "log", processes, program=MLM) as process:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    expected, found = metrics(base, "loss", "grad_norm"), metrics(tmp_path / "run", "loss", "grad_norm")
    assert flat(found) == pytest.approx(flat(expected), rel=ROUNDING)


def test_stopped_and_gone_on_with_under_another_strategy_it_masks_as_if_nothing_had_been(
    server, run, new, base, tmp_path
):
    out = (*new, "--output_dir", tmp_path / "run")
    run("scripts/mlm.py", *out, "--stop_at_step", 5)
    with server.launch("fsdp2", (*out, "--stop_at_step", 9), tmp_path / "log", program=MLM) as process:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    run("scripts/mlm.py", *out)
    expected, found = metrics(base, "loss", "grad_norm"), metrics(tmp_path / "run", "loss", "grad_norm")
    assert flat(found) == pytest.approx(flat(expected), rel=ROUNDING)
    assert [found[step] for step in range(1, 6)] == [expected[step] for step in range(1, 6)]


def test_what_is_saved_right_after_an_evaluation_is_what_is_saved_without_one(server, new, made_encoder, tmp_path):
    for name, held_out in (("plain", ()), ("evaluated", evaluated_before_saving(made_encoder / "shards"))):
        out = (*new, *held_out, "--bf16", "true", "--max_steps", 8, "--output_dir", tmp_path / name)
        with server.launch("fsdp2", out, tmp_path / "log", program=MLM) as process:
            assert process.wait(300) == 0, (tmp_path / "log").read_text()
    for step in ("step-0000004", "step-0000008"):
        assert differing_tensors(*(tmp_path / name / "checkpoints" / step for name in ("plain", "evaluated"))) == []
    assert differing_weights(tmp_path / "plain" / "model", tmp_path / "evaluated" / "model") == []


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_its_model_is_transformers_own_and_gives_the_logits_of_the_checkpoint(base):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.models.modeling_neobert import NeoBERTConfig, NeoBERTLMHead

    theirs = AutoModelForMaskedLM.from_pretrained(base / "model").eval()
    assert type(theirs).__name__ == "EuroBertForMaskedLM"
    reader = CheckpointReader(base / "checkpoints" / f"step-{STEPS:07d}")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    ours = NeoBERTLMHead(NeoBERTConfig(vocab_size=VOCABULARY, pad_token_id=1024, max_length=LENGTH, **shape)).eval()
    ours.load_state_dict({name: reader.tensor("weight", name) for name in reader.shapes})
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    batch = tokenizer(["Bakı [MASK] şəhərdir.", "Salam!"], padding=True, return_tensors="pt")
    with torch.no_grad():
        difference = (theirs(**batch).logits - ours(**batch).logits)[batch["attention_mask"].bool()]
    assert difference.abs().max() < 1e-5
    found = pipeline("fill-mask", model=str(base / "model"))("Bakı [MASK] şəhərdir.")
    assert len(found) == 5 and found[0]["score"] >= found[1]["score"]


@pytest.fixture(scope="module")
def encoders(run, base, tmp_path_factory):
    """{name: folder} of the trained model as transformers loads it, with the published names, and made from the checkpoint."""
    folder = tmp_path_factory.mktemp("encoders")
    convert = ("scripts/convert_checkpoint.py", "--output_dir")
    run(*convert, folder / "published", "--model_name_or_path", base, "--encoder_layout", "neobert")
    run(*convert, folder / "back", "--model_name_or_path", folder / "published", "--encoder_layout", "eurobert")
    run(*convert, folder / "checkpoint", "--checkpoint", base / "checkpoints")
    run(*convert, folder / "named", "--checkpoint", base / "checkpoints", "--encoder_layout", "neobert")
    return {"trained": base / "model", **{p.name: p for p in folder.iterdir()}}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_layout_is_the_same_function_of_trained_weights(encoders, packed):
    """Ours, EuroBERT in transformers, and the published names read again: 1e-5 in fp32."""
    from transformers import AutoModelForMaskedLM

    from dilqur.data.varlen import document_kwargs
    from dilqur.kernels.varlen_attention import attention_for, register_document_attention
    from dilqur.models.neobert_folder import read_encoder

    register_document_attention()
    ids = torch.randint(256, 1000, (2, 48), generator=torch.Generator().manual_seed(0))
    attention = attention_for("sdpa", packed)
    if packed:
        inputs = document_kwargs(torch.stack((torch.arange(48), torch.cat((torch.arange(20), torch.arange(28))))))
        inputs["position_ids"] = torch.as_tensor(inputs["position_ids"])
        seen = torch.ones_like(ids).bool()
    else:
        inputs = {"attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][1, 30:] = 0
        seen = inputs["attention_mask"].bool()
    models = {name: read_encoder(folder, _attn_implementation=attention) for name, folder in encoders.items()}
    with torch.no_grad():
        found = {name: model.eval()(ids, **inputs).logits[seen] for name, model in models.items()}
        for name in ("trained", "back", "checkpoint"):
            model = AutoModelForMaskedLM.from_pretrained(encoders[name]).eval()
            if packed:  # a document does not see the one before it: as each alone
                logits = torch.cat([model(part[None]).logits[0] for part in (ids[0], ids[1, :20], ids[1, 20:])])
            else:
                logits = model(ids, **inputs).logits[seen]
            found[f"{name} in transformers"] = logits
    for name, logits in found.items():
        assert (logits - found["trained"]).abs().max() <= 1e-5, name


def test_sentence_transformers_takes_means_of_it_by_itself(base):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    texts = ["Bakı gözəl şəhərdir.", "Salam!"]
    found = SentenceTransformer(str(base / "model"), device="cpu").encode(texts, convert_to_tensor=True)
    batch = AutoTokenizer.from_pretrained(base / "model")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(base / "model").eval()(**batch).last_hidden_state
    seen = batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose(found, (states * seen).sum(1) / seen.sum(1), atol=1e-6)


def test_a_second_phase_reads_longer_samples_with_documents_apart(run, base, flags, tmp_path):
    longer = ("--max_length", 2 * LENGTH, "--max_position_embeddings", 2 * LENGTH, "--global_batch_size", 4)
    apart = ("--intra_document_masking", "true", "--mask_count", "fixed", "--mask_rule", "80-10-10")
    run("scripts/mlm.py", "--model_name_or_path", base, *flags, *longer, *apart, "--output_dir", tmp_path / "run")
    first, last = metrics(base, "loss")[STEPS][0], metrics(tmp_path / "run", "loss")[1][0]
    assert abs(last - first) < 0.5, "it goes on where the first phase ended"
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["intermediate_size"]) == (2 * LENGTH, 128)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check(run, flags):
    def refusal(*more):
        done = run("scripts/mlm.py", *flags, *more, "--output_dir", "never", "--check", "true", code=2)
        (line,) = done.stderr.splitlines()
        return line

    return refusal


def test_a_tokenizer_without_a_mask_is_refused(check, made):
    said = check("--model_config", TINY_NEOBERT, "--tokenizer", made / "tokenizer")
    assert "no [MASK] in it: train one with data_tools/train_tokenizer.py --control_tokens encoder" in said


def test_shards_of_another_tokenizer_are_refused(check, made_encoder, made):
    new = ("--model_config", TINY_NEOBERT, "--tokenizer", made_encoder / "tokenizer")
    said = check(*new, "--datasets", f"{{path: {made}/shards}}")
    assert f"{made}/shards was packed with another tokenizer" in said


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"max_length": 32},
            "max_length 64 is more than the 32 positions of model_config: give max_length in model_config",
        ),
        ({"vocab_size": 1000}, "the model has rows for 1000"),
        ({"hidden_sizes": 64}, "model_config: hidden_sizes: not a key of a NeoBERT"),
        ({"num_attention_heads": 5}, "hidden_size 64 does not divide into 5 heads"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(check, made_encoder, config, says):
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "max_length": LENGTH, **config}
    assert says in check("--model_config", json.dumps(shape), "--tokenizer", made_encoder / "tokenizer")


def test_a_longer_context_has_to_be_asked_for_and_is_another_order_of_the_data(check, base):
    going_on = ("--model_name_or_path", base, "--max_length", 2 * LENGTH)
    assert f"give --max_position_embeddings {2 * LENGTH}" in check(*going_on)
    said = check(*going_on, "--max_position_embeddings", 2 * LENGTH, "--continue_data", "true")
    assert "was trained on other shards, max_length, packing or seed" in said


@pytest.mark.parametrize("which", ["missing", "extra", "another model"])
def test_a_published_checkpoint_that_is_not_one_is_refused(run, base, flags, tmp_path, which):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    if which == "missing":
        del weights["model.layers.1.self_attn.k_proj.weight"]
        says = "model.layers.1.self_attn.k_proj.weight is missing"
    elif which == "extra":
        weights["model.layers.0.mlp.up_proj.bias"][0] = 1
        says = "model.layers.0.mlp.up_proj.bias: not zero: this is no NeoBERT"
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        says = "a bert: only NeoBERT, and EuroBERT made of it, are trained here"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = ("--output_dir", tmp_path / "run")
    (line,) = run("scripts/mlm.py", "--model_name_or_path", folder, *flags, *out, code=2).stderr.splitlines()
    assert says in line and line.startswith(f"error: {folder}: ")
