"""Keys together: every variant of the GPU grids, and every pair of keys that choose code, run by cpt.py and mlm.py, evaluated and saved.

Each runs with a GPU's kernels (Triton's interpreter) and learns as its plain twin does, or is refused in one line. `kernels: auto` is
what it chooses on a GPU. One process; tests/gpu_emulated/test_shipped_recipes.py has the strategies.
"""

import itertools
import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from fork_launch import Server
from test_shipped_recipes import CLOSE, SHRUNK, TINY_ENCODER, make_llama, numbers, small  # noqa: F401

from dilqur.kernels.choose import Machine, choose
from dilqur.kernels.settings import KernelSettings

pytestmark = pytest.mark.long
pytest.importorskip("triton", reason="Triton is not installed here")
GPU = Machine(gpu=True, triton=True, strategy="single", encoder=False, logits_bytes=8 << 30)
MEANING = {  # what makes it another training: compared with plain kernels under the same
    "documents": {"intra_document_masking": True},
    "whole documents": {"packing": "best_fit"},
    "bfloat16 alone": {"dtype": "bfloat16"},
    "embeddings": {"unfrozen_parameters": ["*embed_tokens*"]},
}
KERNELS = {  # what must not
    "eager": {"attn_implementation": "eager"},
    "flex": {"attn_implementation": "flex_attention"},
    "liger": {"use_liger_kernel": True},
    "loss of liger": {"loss_kernel": "liger"},
    "chunked": {"loss_kernel": "chunked"},
    "compiled": {"torch_compile": True},
    "one graph": {"torch_compile": True, "compile_unit": "model"},
    "recomputed": {"gradient_checkpointing": True},
    "half recomputed": {"activation_memory_budget": 0.5},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "deterministic": {"deterministic": True},
}
NOT_HERE = ("flash_attention_2", "flash_attention_3")  # other packages


def pairs():
    """[(names, keys)] of all singles and pairs of MEANING and KERNELS that do not give one key two values."""
    every = {**MEANING, **KERNELS}
    for names in [*itertools.combinations(every, 1), *itertools.combinations(every, 2)]:
        keys = {k: v for name in names for k, v in every[name].items()}
        if all(keys[k] == v for name in names for k, v in every[name].items()):
            yield pytest.param(names, keys, id=" + ".join(names))


def variants():
    """(kind, keys) of each variant of the grids for GPUs, without its sizes."""
    for grid in sorted((ROOT / "benchmarks" / "grids").glob("*.yaml")):
        settings = yaml.safe_load(grid.read_text())
        if grid.stem in ("toy", "kernels-cpu"):
            continue
        recipe = yaml.safe_load((ROOT / settings["recipe"]).read_text())
        for variant in settings["variants"]:
            (name, keys), kind = next(iter(variant.items())), "mlm" if "mlm" in settings["recipe"] else "cpt"
            keys = {**recipe, **(settings.get("keys") or {}), **keys}
            if keys.get("attn_implementation") in NOT_HERE or keys.get("fp8") or keys.get("trainer"):
                continue  # fp8: test_kernel_parity.py; trainer: test_benchmark.py
            own = (
                "use_liger_kernel",
                "kernels",
                "torch_compile",
                "loss_kernel",
                "compile_unit",
                "gradient_checkpointing",
            )
            own += ("activation_memory_budget", "unfrozen_parameters", "mask_count", "intra_document_masking")
            yield pytest.param(kind, {k: keys[k] for k in own if k in keys}, id=f"{grid.stem}: {name}")


class Runs:
    """Runs by their keys, each done once."""

    def __init__(self, folder, server, small, made_encoder):  # noqa: F811
        self.folder, self.server, self.made = folder, server, {"cpt": small, "mlm": made_encoder}
        make_llama(folder / "model", small / "tokenizer", tied=True)

    def __call__(self, kind, keys):
        """(exit code, folder, log) of a run."""
        name = "-".join([kind, *(f"{k}={v}" for k, v in sorted(keys.items()))]).replace("/", "") or "plain"
        folder, log = self.folder / name, self.folder / f"{name}.log"
        if log.exists():
            return int(folder.with_suffix(".code").read_text()), folder, log.read_text()
        made = self.made[kind]
        data = {"datasets": [{"path": str(made / "shards")}], "eval_datasets": [{"path": str(made / "shards")}]}
        model = {"model_name_or_path": str(self.folder / "model")}
        if kind == "mlm":
            model = {"model_config": yaml.safe_load(TINY_ENCODER), "tokenizer": str(made / "tokenizer")}
        recipe = self.folder / f"{name}.yaml"
        rest = {"learning_rate": 1e-3, "dataloader_num_workers": 0, "bf16": "dtype" not in keys}
        recipe.write_text(yaml.safe_dump({**SHRUNK, **data, **model, **rest, **auto(keys, kind), "report_to": []}))
        words = ("--config", recipe, "--output_dir", folder)
        with self.server.launch("single", words, log, 1, program=ROOT / "scripts" / f"{kind}.py") as process:
            code = process.wait(300)
        folder.with_suffix(".code").write_text(str(code))
        return code, folder, log.read_text()


def auto(keys, kind):
    """The keys with `kernels: auto` made what it is on a GPU."""
    if keys.get("kernels") != "auto":
        return keys
    plain = {f.name: f.default for f in fields(KernelSettings)}
    run = SimpleNamespace(**{**plain, "intra_document_masking": False, **keys})
    machine = Machine(
        **{**GPU.__dict__, "encoder": kind == "mlm", "model_type": "neobert" if kind == "mlm" else "llama"}
    )
    chosen, _ = choose(run, machine)
    chosen = {k: v for k, v in chosen.items() if k != "compile_unit" or chosen["torch_compile"]}
    return {**{k: v for k, v in keys.items() if k != "kernels"}, **chosen}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small, made_encoder):  # noqa: F811
    folder = tmp_path_factory.mktemp("combinations")
    with Server(TRITON_INTERPRET="1", TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor")) as server:
        yield Runs(folder, server, small, made_encoder)


def assert_runs_as_plain_or_is_refused(runs, kind, keys, same):
    code, folder, log = runs(kind, keys)
    if code == 2:
        (said,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert any(key in said for key in keys) and "Traceback" not in log
        return
    assert code == 0, log
    code, plain, log = runs(kind, {k: v for k, v in keys.items() if k in same})
    assert code == 0, log
    for name in ("loss", "eval_loss"):
        found, expected = numbers(folder, name), numbers(plain, name)
        assert list(found) == [1, 2]
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=CLOSE), name
    assert json.loads((folder / "manifest.json").read_text())["result"]


@pytest.mark.parametrize(("names", "keys"), pairs())
def test_a_pair_of_keys_runs_as_plain_kernels_do_or_is_refused_in_one_line(runs, names, keys):
    assert_runs_as_plain_or_is_refused(runs, "cpt", keys, {k for keys in MEANING.values() for k in keys})


@pytest.mark.parametrize(("kind", "keys"), variants())
def test_a_variant_of_a_grid_runs_as_plain_kernels_do(runs, kind, keys):
    same = {"unfrozen_parameters", "mask_count", "intra_document_masking"}
    assert_runs_as_plain_or_is_refused(runs, kind, keys, same)
    assert runs(kind, keys)[0] == 0, "no grid has a row that is refused"
