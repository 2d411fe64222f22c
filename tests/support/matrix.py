"""The checkpoint matrix: a state saved under every strategy and number of processes is the same whether or not the model was evaluated just
before, and goes on under every other.

    python tests/support/matrix.py --output benchmarks/results/checkpoint_matrix.json                        225 cells in fp32
    python tests/support/matrix.py --resume_cells false --bf16                                       only what is saved
    python tests/support/matrix.py --bf16 --output benchmarks/results/checkpoint_matrix_bf16.json            and in bf16
    python tests/support/matrix.py --program mlm --output benchmarks/results/checkpoint_matrix_mlm.json      of an encoder
    python tests/support/matrix.py --strategies ddp zero3 --worlds 1 2 --controls false              a part

A run of 30 steps under each of them is stopped by nothing. The saving cells: a second one is evaluated before every save, and leaves the
best of its checkpoints as model/; every weight and moment of all checkpoints, and of model/, has to be the first one's, to the bit. The
resume cells: the checkpoint of step 10 is loaded under each, and the 20 losses that follow are compared with those of the loading one's own
uninterrupted run. Controls show what the comparison would see: moments that
were not loaded, a step that was not, two parameters that changed places.
"""

import argparse
import json
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

import fork_launch
from fork_launch import ROOT, run
from same_state import differing_tensors, differing_weights

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ONLY_SAVING = ("fsdp2_offload", "hsdp")  # the same DTensors as fsdp2's: for the resume cells nothing new
SAVED, STEPS = 10, 30
# of each program: a model of 180,000 random weights, the control tokens its tokenizer has, and two of its weights of one shape
MODELS = {
    "cpt": (
        "{vocab_size: 1280, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4, "
        "num_key_value_heads: 2, tie_word_embeddings: true, bos_token_id: 1024, eos_token_id: 1025, pad_token_id: 1028}"
    ),
    "mlm": "{vocab_size: 1152, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 3, num_attention_heads: 4, max_length: 64}",
}
CONTROL_TOKENS = {"cpt": "llama3", "mlm": "encoder"}
ALIKE = {"cpt": "model.layers.{}.self_attn.q_proj.weight", "mlm": "model.transformer_encoder.{}.wo.weight"}


def make_data(folder, kind="cpt", program=None):
    """Tokenizer, shards and a tiny model, by the programs a user would use; program(name, *flags) runs one, or a fork of this process."""
    corpus = ROOT / "recipes" / "quickstart" / "corpus" / "az"
    program = program or (lambda name, *flags: run("single", 1, flags, folder / "made.log", program=ROOT / name))
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    control = ("--control_tokens", CONTROL_TOKENS[kind])
    program(
        "data_tools/train_tokenizer.py", "--input", corpus, "--vocab_size", 1024, *control, "--output_dir", tokenizer
    )
    program("data_tools/pack_mmap.py", "--input", corpus, "--tokenizer", tokenizer, "--output_dir", shards)
    new = ("--model_config", MODELS[kind], "--tokenizer", tokenizer, "--max_steps", 1, "--learning_rate", "1e-9")
    data = ("--datasets", f"{{path: {shards}}}", "--max_length", 64, "--global_batch_size", 8)
    program(f"scripts/{kind}.py", *new, *data, "--output_dir", folder / "made")
    return folder / "made" / "model", shards


class Matrix:
    def __init__(self, folder, kind, bf16):
        self.folder, self.kind, self.bf16 = folder, kind, bf16
        self.model, self.shards = make_data(folder, kind)

    def train(self, strategy, world, name, *flags):
        """{step: loss} of one run."""
        out = self.folder / "runs" / f"{strategy}-{world}" / name
        shape = f"--max_length 64 --global_batch_size 8 --per_device_train_batch_size 2 --max_steps {STEPS}".split()
        rest = f"--learning_rate 1e-3 --warmup_steps 5 --save_steps {SAVED} --save_total_limit none".split()
        data = ("--model_name_or_path", self.model, "--datasets", f"{{path: {self.shards}}}", "--bf16", self.bf16)
        log = self.folder / f"{strategy}-{world}-{name}.log"
        program = ROOT / "scripts" / f"{self.kind}.py"
        run(strategy, world, (*data, *shape, *rest, *flags, "--output_dir", out), log, program=program)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if name not in ("whole", "evaluated"):
            shutil.rmtree(out)
        return {record["step"]: record["loss"] for record in records}

    def evaluated_differs(self, strategy, world, losses):
        """What differs where the run of a place, whose losses are given, is evaluated before every save: [description of a tensor, …]."""
        from dilqur.checkpoint.writer import best_checkpoint

        evaluation = f"--eval_steps {SAVED} --max_eval_samples 16 --load_best_model_at_end true".split()
        held_out = ("--eval_datasets", f"{{path: {self.shards}}}")
        assert self.train(strategy, world, "evaluated", *evaluation, *held_out) == losses
        whole, evaluated = (self.folder / "runs" / f"{strategy}-{world}" / name for name in ("whole", "evaluated"))
        steps = [f"step-{step:07d}" for step in range(SAVED, STEPS + 1, SAVED)]
        pairs = [[run / "checkpoints" / step for run in (whole, evaluated)] for step in steps]
        found = [f"{one.name}: {tensor}" for one, other in pairs for tensor in differing_tensors(one, other)]
        best, folder = whole / "checkpoints" / best_checkpoint(evaluated / "checkpoints").name, evaluated / "expected"
        flags = ("--checkpoint", best, "--output_dir", folder)
        run("single", 1, flags, self.folder / "expected.log", program=ROOT / "scripts" / "convert_checkpoint.py")
        found += [f"model: {tensor}" for tensor in differing_weights(evaluated / "model", folder)]
        shutil.rmtree(evaluated)
        return found

    def checkpoint(self, strategy, world):
        return self.folder / "runs" / f"{strategy}-{world}" / "whole" / "checkpoints" / f"step-{SAVED:07d}"

    def resumed(self, target, checkpoint, whole, name, *flags):
        """Largest difference of the 20 losses after `checkpoint` to those of `whole`."""
        losses = self.train(*target, name, "--resume_from_checkpoint", checkpoint, *flags)
        assert list(losses) == list(range(SAVED + 1, STEPS + 1)), losses
        return max(abs(losses[step] - whole[step]) for step in losses)

    def without_step(self, checkpoint):
        """A copy that says the optimizer has made no step."""
        return self._rewritten(checkpoint, "no-step", {"optimizer_steps": 0}, lambda names: {})

    def swapped(self, checkpoint):
        """A copy in which two parameters of one shape have changed places, with checksums that fit."""
        names = [ALIKE[self.kind].format(layer) for layer in (0, 2)]
        return self._rewritten(checkpoint, "swapped", {}, lambda _: dict(zip(names, names[::-1], strict=True)))

    def _rewritten(self, checkpoint, name, trainer, renamed):
        from dilqur.checkpoint.format import KINDS, CheckpointReader, chunks_of, publish, write_rank
        from dilqur.models.safetensors_io import tensor_bytes

        reader = CheckpointReader(checkpoint)
        takes = renamed(reader.shapes)
        part, final = self.folder / f".tmp-{name}", self.folder / f"{name}-{checkpoint.parent.parent.parent.name}"
        part.mkdir()
        tensors = {(k, n): reader.tensor(k, takes.get(n, n)).view(-1) for n in reader.shapes for k in KINDS}
        chunks = [p for (k, n), t in tensors.items() for p in chunks_of(k, n, 0, t.numel(), t.dtype)]
        data = (tensor_bytes(tensors[p["kind"], p["name"]][p["start"] : p["start"] + p["length"]]) for p in chunks)
        write_rank(part, 0, chunks, reader.shapes, data)
        own = {k: v for k, v in reader.trainer.items() if k not in ("version", "step", "world_size")}
        publish(part, final, reader.trainer["step"], 1, {**own, **trainer})
        return final


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=list(MODELS), default="cpt")
    every = (*STRATEGIES, *ONLY_SAVING)
    parser.add_argument("--strategies", nargs="+", default=every, choices=every)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--saved_by", nargs="+", help="STRATEGY-WORLD: resume only what these saved")
    parser.add_argument("--saving_cells", choices=["true", "false"], default="true")
    parser.add_argument("--resume_cells", choices=["true", "false"], default="true")
    parser.add_argument("--controls", choices=["true", "false"], default="true")
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args()
    fork_launch.import_everything()
    from dilqur.pipeline.manifest import git_commit, hardware

    began, everywhere = time.monotonic(), [(s, w) for s in arguments.strategies for w in arguments.worlds]
    everywhere = [(s, w) for s, w in everywhere if s != "hsdp" or w >= 4]  # two replicas of two shards
    places = [(s, w) for s, w in everywhere if s in STRATEGIES and arguments.resume_cells == "true"]
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), arguments.program, arguments.bf16)
        whole = {place: matrix.train(*place, "whole") for place in everywhere}
        saving, cells, controls = [], [], []
        for place in everywhere if arguments.saving_cells == "true" else []:
            found = matrix.evaluated_differs(*place, whole[place])
            saving.append({"saved_by": place, "tensors_that_differ": found})
            print(f"saved by {place[0]} × {place[1]}, evaluated before or not: {len(found)} tensors differ", flush=True)
        for source in [p for p in places if not arguments.saved_by or "{}-{}".format(*p) in arguments.saved_by]:
            for target in places:
                name = f"from-{source[0]}-{source[1]}"
                difference = matrix.resumed(target, matrix.checkpoint(*source), whole[target], name)
                cells.append({"saved_by": source, "read_by": target, "largest_difference": difference})
            worst = max(c["largest_difference"] for c in cells if c["saved_by"] == source)
            print(f"saved by {source[0]} × {source[1]}: largest loss difference {worst:.2e}", flush=True)
        for place in [p for p in places if p[1] == max(arguments.worlds[:2]) and arguments.controls == "true"]:
            saved = matrix.checkpoint(*place)
            ways = {
                "moments not loaded": (saved, "--resume_without_optimizer", "true"),
                "step not loaded": (matrix.without_step(saved),),
                "two pieces swapped": (matrix.swapped(saved),),
            }
            for what, (checkpoint, *flags) in ways.items():
                difference = matrix.resumed(place, checkpoint, whole[place], "control", *flags)
                controls.append({"read_by": place, "control": what, "largest_difference": difference})
                print(f"control, {place[0]} × {place[1]}, {what}: {difference:.2e}", flush=True)
    same = [c["largest_difference"] for c in cells if c["saved_by"] == c["read_by"]]
    result = {
        "program": arguments.program,
        "dtype": "bf16" if arguments.bf16 else "fp32",
        "saving_cells": len(saving),
        "tensors_that_differ": sum(len(cell["tensors_that_differ"]) for cell in saving),
        "cells": len(cells),
        "largest_difference": max((c["largest_difference"] for c in cells), default=None),
        "largest_difference_same_place": max(same, default=None),
        "uninterrupted_runs_differ_by": max(
            abs(a[s] - b[s]) for a in whole.values() for b in whole.values() for s in a
        ),
        "smallest_control": min((c["largest_difference"] for c in controls), default=None),
        "seconds": round(time.monotonic() - began),
        "commit": git_commit(),
        "machine": hardware(),
        "versions": {name: metadata.version(name) for name in ("torch", "accelerate", "deepspeed", "transformers")},
    }
    print(json.dumps({k: v for k, v in result.items() if k not in ("machine", "versions", "commit")}))
    if arguments.output:
        Path(arguments.output).write_text(
            json.dumps({**result, "saving": saving, "matrix": cells, "controls": controls}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
