"""Training only the embeddings costs no more than it must, under every strategy: no gradient and no optimizer state for the rest."""

import json

import pytest
from conftest import ROOT

from dilqur.estimate.cost_model import parameter_sizes

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LENGTH, BATCH, PROCESSES = 64, 8, 2


@pytest.fixture(scope="module")
def first_step(server, tmp_path_factory, made, tiny_model):
    """strategy, patterns of unfrozen_parameters → what each rank says of the first step (phase_evidence.py)."""
    folder = tmp_path_factory.mktemp("phases")
    data = ("--model_name_or_path", tiny_model, "--datasets", f"{{path: {made}/shards}}", "--learning_rate", "1e-3")
    shape = f"--max_length {LENGTH} --global_batch_size {BATCH} --max_steps 1".split()
    halves = ("--per_device_train_batch_size", BATCH // PROCESSES // 2)  # a step is of two micro-batches

    def run(strategy, patterns):
        name = f"{strategy}-{len(patterns)}"
        (folder / f"{name}-evidence").mkdir()
        unfrozen = ("--unfrozen_parameters", *patterns) if patterns else ()
        flags = (*data, *shape, *halves, *unfrozen, "--output_dir", folder / name)
        log, program = folder / f"{name}.log", ROOT / "tests" / "support" / "phase_evidence.py"
        where = {"processes": PROCESSES, "program": program, "EVIDENCE": str(folder / f"{name}-evidence")}
        with server.launch(strategy, flags, log, **where) as process:
            assert process.wait(300) == 0, log.read_text()
        return [json.loads((folder / f"{name}-evidence" / f"rank-{r}.json").read_text()) for r in range(PROCESSES)]

    return run


@pytest.fixture
def sizes(tiny_model):
    """(elements of the layers' matrices, of the tied embedding, of everything)."""
    elements = parameter_sizes(json.loads((tiny_model / "config.json").read_text()))
    layers = sum(size for name, size in elements.items() if "_proj" in name)
    return layers, elements["model.embed_tokens.weight"], sum(elements.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_with_embeddings_only_the_backbone_has_no_weight_gradient_and_no_optimizer_state(first_step, sizes, strategy):
    layers, embedding, whole = sizes
    ranks = first_step(strategy, ["*embed_tokens*"])
    for rank in ranks:
        assert (rank["trained"], rank["frozen"]) == (embedding, whole - embedding)
        assert rank["frozen_with_gradient"] == []
        # of three products a matrix takes part in, a frozen one is spared that which gives its gradient; the tied head none
        assert rank["tokens"] == BATCH * LENGTH // PROCESSES
        assert rank["matrix_flops"] == rank["tokens"] * (4 * layers + 6 * embedding)
    for held in held_by(strategy, ranks):
        assert held == embedding  # its rows divide by the ranks: there is no padding


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_the_same_look_at_a_step_of_all_weights_sees_gradients_and_optimizer_state_of_all(first_step, sizes, strategy):
    layers, embedding, whole = sizes
    ranks = first_step(strategy, [])
    assert {rank["matrix_flops"] for rank in ranks} == {ranks[0]["tokens"] * 6 * (layers + embedding)}
    for held in held_by(strategy, ranks):
        assert held == whole


def held_by(strategy, ranks):
    """Elements of gradients, of each moment and, under ZeRO, of master weights: of all ranks together, under ddp of each."""
    kinds = [[rank["gradients"], *rank["optimizer"]] for rank in ranks]
    if strategy.startswith("zero"):
        kinds = [[*kind, rank["master_weights"]] for kind, rank in zip(kinds, ranks, strict=True)]
    if strategy == "ddp":
        assert kinds[0] == kinds[1]
        return kinds[0]
    return [sum(kind) for kind in zip(*kinds, strict=True)]
