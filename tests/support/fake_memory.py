"""Most memory that a GPU holds in a training step of a recipe under FSDP2, found without the GPU and without the memory: a JSON object.

    python tests/support/fake_memory.py --recipe recipes/llama3.2-1b-az/cpt-2-full.yaml --world 8
    python tests/support/fake_memory.py --recipe … --world 16 --keys '{use_liger_kernel: false, loss_kernel: chunked}'

This process is rank 0 of `world` that are not there: its process group sends nothing, and its tensors are torch's fake ones, shapes without
numbers. All else is the project's own and the recipe's: scripts/cpt.py's main, which makes the model on the meta device and hands it to the
loop with its loss; kernels, `prepare`, `backward`, `clip_and_step`. Measured is one step, of one or two micro-batches, after a step on
zeros that makes the moments; it leaves nothing but them behind, which is made sure of, so that all later steps are like it.
torch's MemTracker sees every storage that is made, resized and dropped, in the order in which a GPU's allocator would.

The fake tensors are a CPU's: in a torch without CUDA those of a GPU have no backward pass. Where a GPU computes otherwise, a patch says so.
What cannot be seen so are the workspaces inside a kernel: flash attention's are added here, cuBLAS's and NCCL's are not.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]


def join_a_group_that_sends_nothing(world):
    import torch.distributed.fsdp._fully_shard._fully_shard as fully_shard
    import torch.distributed.tensor._sharding_prop
    from torch.distributed import init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    # DTensor finds the shapes of results on whole, fake tensors: in a mode of its own the tracker knows them as such
    torch.distributed.tensor._sharding_prop.detect_fake_mode = lambda: None
    mesh = init_device_mesh("cpu", (world,))  # beforehand: of fake tensors it could not read its ranks
    fully_shard._init_default_mesh = lambda *arguments, **named: mesh


def do_without_numbers():
    """Answer, for the rest of the process, whatever asks for a number of a tensor, or would compute one outside torch."""
    import torch
    import transformers.masking_utils
    from triton.runtime.interpreter import InterpretedFunction

    import dilqur.training.initial_weights

    # the model's folder has its config alone
    dilqur.training.initial_weights.StoredWeights.of = lambda model, folder: "of no folder"
    dilqur.training.initial_weights.fill = lambda model, optimizer, weights: None
    torch.Tensor.item = lambda self: 1  # the gradients' norm; how many labels there are
    torch.equal = lambda one, other: False  # Liger asks whether the gradient of its loss is 1, and it is scaled
    transformers.masking_utils.find_packed_sequence_indices = lambda positions: None  # they go up by 1: one document
    InterpretedFunction.run = lambda *arguments, **named: None  # Triton's kernels allocate nothing


def compute_as_on_a_gpu():
    """Lead, for the rest of the process, what a CPU does otherwise, and with other memory, the way a GPU takes."""
    import liger_kernel.ops.fused_linear_cross_entropy as liger
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None and is_causal and enable_gqa, "flash attention would not take this"
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, True, scale=scale)

        def workspaces(gradient):  # dQ and its sum in fp32; dK and dV of each query's head, before they are added up
            made = [torch.empty_like(gradient, dtype=torch.float32), *(torch.empty_like(gradient) for _ in range(3))]
            del made

        out.register_hook(workspaces)
        return out

    class Torch:
        """For Liger: a product in bfloat16 that a GPU adds to the fp32 sum as it comes, and of which a CPU makes two copies."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def mm(self, left, right):
            return left.new_empty((), dtype=torch.float32).expand(left.shape[0], right.shape[1])

    torch.nn.functional.scaled_dot_product_attention = flash
    liger.torch = Torch()
    FakeTensor.is_cuda = True  # dilqur/kernels/fused_cross_entropy.py then adds up that product as on a GPU


def peak_of(settings, model, loss, weights, world):
    """{kind: bytes, …, "total": bytes} of what is held when it is most."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from dilqur.checkpoint.local_shards import base_optimizer, trained_parameters
    from dilqur.data.batches import split_batch
    from dilqur.kernels.apply import apply_kernels
    from dilqur.kernels.choose import Machine, choose
    from dilqur.training.distributed import backward, clip_and_step, make_accelerator, prepare, strategy
    from dilqur.training.optimizer import freeze_all_but, make_optimizer

    class Tracker(MemTracker):
        def _update_peak_stats(self, state):
            """Of everything, and not of each module too, which took most of the time."""
            modules, self.memory_tracking = self.memory_tracking, {}
            super()._update_peak_stats(state)
            self.memory_tracking = modules

        def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
            """Without hooks on what is frozen: torch refuses them."""
            return super()._track_module_params_and_buffers(module, all(p.requires_grad for p in module.parameters()))

    # as dilqur/training/set_up.py has it
    batch, accumulation = split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)
    accumulation = min(2, accumulation)  # the second finds the gradients of the first, and so do all others
    fp32 = settings.dtype == "float32"
    accelerator = make_accelerator(
        settings.bf16 and fp32, batch, accumulation, settings.max_grad_norm, settings.reduce_dtype, fp32=fp32
    )
    freeze_all_but(model, settings.unfrozen_parameters)
    kernels, _ = choose(settings, Machine.here(settings, model.config, strategy(accelerator), batch))
    apply_kernels(model, settings, kernels)
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer = prepare(accelerator, model, lambda model: make_optimizer(model, settings, True), weights)
        plain, tracker = accelerator.unwrap_model(model), Tracker()
        for _, parameter in trained_parameters(plain):
            parameter.grad = torch.zeros_like(parameter)
        clip_and_step(accelerator, plain, optimizer, settings.max_grad_norm)
        tracker.track_external(plain, base_optimizer(optimizer))
        with tracker:
            for _ in range(accumulation):
                tracker.reset_mod_stats()
                ids = torch.zeros(2, batch, settings.max_length, dtype=torch.long)
                with accelerator.accumulate(model):
                    part = loss(model, dict(zip(("input_ids", "labels"), ids, strict=True)), 1)
                    backward(accelerator, part)
                    del part
            clip_and_step(accelerator, plain, optimizer, settings.max_grad_norm)
        (most,), (left,) = (tracker.get_tracker_snapshot(when).values() for when in ("peak", "current"))
    most, left = ({getattr(kind, "value", kind).lower(): held[kind] for kind in held} for held in (most, left))
    kept = left["parameter"] + left["buffer"] + left["optstate"]
    assert left["total"] < kept + 1e7, f"a step leaves more than weights and moments behind: {left}"
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--world", type=int, required=True, help="GPUs")
    parser.add_argument("--keys", type=yaml.safe_load, default={}, help="other keys than the recipe's, YAML")
    asked = parser.parse_args()
    from fork_launch import workers_environment

    os.environ |= {**workers_environment("fsdp2", asked.world), "RANK": "0", "LOCAL_RANK": "0", "TRITON_INTERPRET": "1"}
    from dilqur.preflight.recipe_stages import training_stages

    ((stage,), _) = training_stages(asked.recipe, os.devnull)  # no run folder: nothing is there yet
    import cpt

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **stage.job.config}))
        settings = replace(stage.settings, model_name_or_path=folder, **asked.keys)
        join_a_group_that_sends_nothing(asked.world)
        do_without_numbers()
        compute_as_on_a_gpu()

        task = cpt.make_task(settings)
        found = peak_of(settings, task.model, task.compute_loss, task.weights, asked.world)
    print(json.dumps({f"{kind}_gb": size / 1e9 for kind, size in found.items()}))


if __name__ == "__main__":
    main()
