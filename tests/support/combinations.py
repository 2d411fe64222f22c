"""Which code a recipe's keys choose, and which combinations there are of them: sizes, paths, rates and intervals choose none."""

import yaml
from conftest import ROOT

from dilqur.pipeline.rows import read_pipeline

TRAINED = {"scripts/cpt.py": "cpt", "scripts/mlm.py": "mlm", "scripts/sft.py": "sft"}
# one of these values, or of any other key, is one code path; of `unfrozen_parameters` and the like that they are given
CHOOSES = (
    "attn_implementation", "use_liger_kernel", "bf16", "dtype", "reduce_dtype", "gradient_checkpointing", "activation_memory_budget",
    "torch_compile", "compile_unit", "kernels", "loss_kernel", "optim", "fp8", "intra_document_masking", "packing", "deterministic",
    "mask_rule", "mask_count", "load_best_model_at_end", "on_error", "trainer",
)  # fmt: skip
GIVEN = (
    "unfrozen_parameters",
    "continue_data",
    "report_to",
    "eval_datasets",
    "dataset_changes",
    "validation_fraction",
    "mirror_to",
)
DEFAULTS = {
    "attn_implementation": "sdpa",
    "dtype": "float32",
    "packing": "concat",
    "mask_rule": "mask",
    "kernels": "plain",
}


def combination(kind, keys):
    """(program, its keys that choose code, with their values), as a frozenset; values that are defaults left out."""
    chosen = {(k, v) for k in CHOOSES if (v := keys.get(k)) not in (None, False, DEFAULTS.get(k))}
    return kind, frozenset(chosen | {(k, True) for k in GIVEN if keys.get(k)})


def training_stages(recipe):
    """{stage: combination} of the rows of a recipe folder that train a model."""
    found = {}
    for row in read_pipeline(recipe):
        if row.program in TRAINED:
            keys = yaml.safe_load((recipe / f"{row.recipe}.yaml").read_text())
            for name, value in zip(row.flags, row.flags[1:], strict=False):
                if name.startswith("--"):
                    keys[name.removeprefix("--")] = yaml.safe_load(value)
            found[row.name] = combination(TRAINED[row.program], keys)
    return found


def all_recipes():
    return sorted(path.parent for path in (ROOT / "recipes").glob("*/pipeline.txt"))
