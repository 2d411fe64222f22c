"""Every Triton kernel that the shipped Llama recipes launch with Liger compiles for an A100 (sm_80) and an H100 (sm_90), without either.

A step and an evaluation of each recipe are taken at its real widths, batch and length, but with one layer, on tensors that have a shape and
no contents. Triton is told which GPU it is for, and a launch ends where ptxas, which comes with Triton, has made the machine code. What is
promised: ptxas takes each kernel, the shared memory that it asks for is there, and the kernels are those named here, no more and no fewer.
Nothing is promised of what they compute. And how the rows are spread over a GPU's multiprocessors, an argument of the norms' backward
kernel, is not a GPU's: elsewhere Liger counts one.

Triton stays told, and transformers patched, for as long as a process lives. So this file is also a program: run with an architecture and a
recipe, it prints {case: {kernel: [[warps, bytes of shared memory, bytes of machine code] of each variant]}}.
"""

import json
import os
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

triton = pytest.importorskip("triton", reason="Triton compiles the kernels")
pytest.importorskip("liger_kernel", reason="they are Liger's")
import triton.language as tl

ROOT = Path(__file__).parents[2]
# recipe: (its model, dtypes of the weights that the kernels see: bfloat16 as FSDP2 gathers them, float32 under DDP's autocast)
RECIPES = {
    "llama3.2-1b-az": ("llama-3.2-1b", ("bfloat16", "float32")),
    "llama3.1-8b-az": ("llama-3.1-8b", ("bfloat16",)),
}
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes, the most that a block may ask for
LOSS = {"liger_cross_entropy_kernel", "element_mul_kernel"}
FORWARD = {"_rms_norm_forward_kernel", "_triton_rope", "_swiglu_forward_kernel", "liger_cross_entropy_kernel"}
STEP = FORWARD | LOSS | {"_rms_norm_backward_kernel", "_swiglu_backward_kernel"}
EXPECTED = {"loss_kernel: liger": LOSS, "cpt-1-embeddings": STEP, "cpt-2-full": STEP, "evaluation": FORWARD}


@triton.jit
def control(left, right, out, SIDE: tl.constexpr):
    """With SIDE 64 and 13 stages: 192 KiB of shared memory on an A100, which has less, 208 on an H100, which has more."""
    rows = tl.arange(0, SIDE)
    tile, total = rows[:, None] * SIDE + rows, tl.zeros((SIDE, SIDE), tl.float32)
    for k in range(0, 8):
        total += tl.dot(tl.load(left + k * SIDE * SIDE + tile), tl.load(right + k * SIDE * SIDE + tile))
    tl.store(out + tile, total)


# -- the program ------------------------------------------------------------------------------------------------------


def compile_for(architecture, recipe):
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    cases, launched, launch = {}, {}, JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **more):
        made = launch(kernel, *arguments, grid=grid, warmup=True, **more)
        size = (made.metadata.num_warps, made.metadata.shared, len(made.asm["cubin"]))
        launched.setdefault(kernel.__name__, {})[made.hash] = size
        return made

    def end(case):
        cases[case] = {kernel: list(variants.values()) for kernel, variants in launched.items()}
        launched.clear()

    target = GPUTarget("cuda", architecture, 32)
    asked = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    driver.set_active(types.SimpleNamespace(**asked))
    JITFunction.run = compile_only
    FakeTensor.data_ptr = lambda tensor: 0  # a multiple of 16, as are the addresses that a GPU gives
    with FakeTensorMode():
        control[(1,)](*torch.zeros(3, 8, dtype=torch.bfloat16), SIDE=64, num_stages=13)
    end("control")

    from transformers import AutoModelForCausalLM, LlamaConfig

    from dilqur.kernels import apply as apply_kernels
    from dilqur.kernels.choose import PLAIN
    from dilqur.models.published_configs import PUBLISHED
    from dilqur.training.optimizer import freeze_all_but
    from dilqur.training.settings import TrainingSettings

    apply_kernels.triton_runs = lambda: True
    torch.Tensor.item = lambda tensor: 1  # how many labels count: all else that is asked of a tensor's contents
    torch.equal = lambda one, other: False  # is the gradient of the loss 1? It was divided by the tokens of a batch
    sys.path.insert(0, str(ROOT / "scripts"))
    from cpt import causal_loss

    model_name, dtypes = RECIPES[recipe]
    config = LlamaConfig(**{**PUBLISHED[model_name], "vocab_size": 100_352, "num_hidden_layers": 1})

    def take(case, dtype, stage, training=True, **changes):
        keys = {**yaml.safe_load((ROOT / "recipes" / recipe / f"{stage}.yaml").read_text()), **changes}
        settings = types.SimpleNamespace(**{**{key.name: key.default for key in fields(TrainingSettings)}, **keys})
        chosen = {**PLAIN, "loss_kernel": settings.loss_kernel or "logits"}
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).train(training)
        freeze_all_but(model, settings.unfrozen_parameters)
        apply_kernels.apply_kernels(model, settings, chosen)
        ids = torch.zeros(settings.per_device_train_batch_size, settings.max_length, dtype=torch.long)
        # as cpt.py has them
        more = {"skip_logits": True, "accum_dtype": torch.float32} if settings.use_liger_kernel else {}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32")
        with torch.set_grad_enabled(training), autocast:
            loss = causal_loss(model, {"input_ids": ids, "labels": ids}, 100, **more)
        if training:
            loss.backward()
        end(f"{case}, {dtype}")

    with FakeTensorMode():
        for dtype in dtypes:  # first of all, for Liger's patch lasts: models made after it have its layers
            take("loss_kernel: liger", dtype, "cpt-2-full", use_liger_kernel=False, loss_kernel="liger")
        for dtype in dtypes:
            for stage in ("cpt-1-embeddings", "cpt-2-full"):
                take(stage, dtype, stage)
            take("evaluation", dtype, "cpt-2-full", training=False)
    print(json.dumps(cases))


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path):
    """f(architecture, recipe, **more of the environment): the CompletedProcess of this file run so."""
    from triton import knobs

    try:
        assert knobs.nvidia.ptxas.path and knobs.nvidia.ptxas_blackwell.path  # for Hopper, too
    except RuntimeError as problem:
        pytest.skip(f"this Triton has no ptxas: {problem}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}  # compiled anew, the same with a GPU

    def run(architecture, recipe, **more):
        command = [sys.executable, __file__, str(architecture), recipe]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=300)

    return run


def unfit(cases, architecture):
    """What the GPU would not load: [(case, kernel)]."""
    return [
        (case, kernel)
        for case, kernels in cases.items()
        for kernel, variants in kernels.items()
        for warps, shared, size in variants
        if warps > 32 or shared > SHARED_MEMORY[architecture] or not size
    ]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_every_kernel_of_a_recipe_compiles_and_fits_and_one_too_large_for_an_a100_is_found(
    compiled, architecture, recipe
):
    done = compiled(architecture, recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    expected = {f"{case}, {dtype}": kernels for case, kernels in EXPECTED.items() for dtype in RECIPES[recipe][1]}
    assert {case: set(kernels) for case, kernels in cases.items()} == {**expected, "control": {"control"}}
    assert unfit(cases, architecture) == ([("control", "control")] if architecture == 80 else [])


def test_what_ptxas_refuses_is_an_error(compiled):
    done = compiled(80, "llama3.2-1b-az", PTXAS_OPTIONS="--gpu-name=sm_81")  # there is no such architecture
    assert done.returncode == 1 and "Value 'sm_81' is not defined" in done.stderr, done.stderr[-3000:]


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), sys.argv[2])
