"""The planner beside what was published: the tables of docs/performance.md.

    python benchmarks/planner.py

Prints Markdown. What is compared is asserted in tests/unit/estimate/test_planning.py; nothing is measured here.
"""

from dilqur.estimate.failures import Failures
from dilqur.estimate.hardware import GPUS
from dilqur.estimate.job import Job
from dilqur.estimate.memory import memory_of, state_of
from dilqur.estimate.step_time import step_time
from dilqur.estimate.strategy import strategy_of
from dilqur.models.published_configs import PUBLISHED

GIB = 2**30
BASE = Job(PUBLISHED["llama-3.2-1b"], liger=True)
ADAPTED = BASE.but(config={**BASE.config, "vocab_size": 100_352}, global_batch=224, ceiling=14)
EMBEDDINGS = ADAPTED.but(patterns=("*embed_tokens*",))
NEOBERT = Job(
    {"model_type": "neobert", "vocab_size": 64_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 28,
     "num_attention_heads": 12},
    masked=0.2, max_length=1024, global_batch=2304, ceiling=48,
)  # fmt: skip


def rows(title, *lines):
    print(f"| {' | '.join(title)} |\n|{'---|' * len(title)}")
    print("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))


def against(published, planned):
    return f"{planned:.3g}", f"{100 * (planned / published - 1):+.1f} %"


node, a100s = strategy_of("fsdp2", 1, 8), strategy_of("fsdp2", 2, 8)
pure = BASE.but(weight=2)
memory = []
for what, strategy, published in (("state, whole", "ddp", 9.23), ("state, of 8", "fsdp2", 1.17)):
    state = sum(state_of(pure, strategy_of(strategy, 1, 8)).values())
    memory.append((what, published, *against(published, state / GIB), *against(published, state / 1e9)))
for liger, published in ((True, 27), (False, 64)):
    peak = memory_of(pure.but(liger=liger), node).allocated(10)
    what = f"peak at 10, {'Liger' if liger else 'plain'}"
    memory.append((what, published, *against(published, peak / GIB), *against(published, peak / 1e9)))
rows(("Llama 3.2 1B on 8 H100", "published", "planned, GiB", "", "planned, GB", ""), *memory)

batches = []
for what, strategy, liger, *published in (
    ("DDP", "ddp", False, 2, 4),
    ("FSDP", "fsdp2", False, 4, 10),
    ("FSDP, Liger", "fsdp2", True, 14, 18),
):
    held = memory_of(BASE.but(liger=liger), strategy_of(strategy, 1, 8))
    line, fixed = [what, f"{held.each_sample / 1e9:.2f}"], held.allocated(0)
    for gpu, most in zip(("A100-40GB", "H100-80GB"), published, strict=True):
        card = GPUS[gpu].memory
        line += [
            most,
            held.largest_batch(card),
            f"{(card - fixed) / (most + 1) / 1e9:.1f} to {(card - fixed) / most / 1e9:.1f}",
        ]
    batches.append(line)
title = ("largest batch", "GB a sequence, planned", "40 GB, published", "planned", "GB a sequence that implies")
rows((*title, "80 GB, published", "planned", "GB a sequence that implies"), *batches)

times = []
for what, job, strategy, gpu, accumulation, published in (
    ("all weights, 16 A100", ADAPTED, a100s, "A100-40GB", 1, 43_000 / 15_000),
    ("embeddings only, 16 A100", EMBEDDINGS, a100s, "A100-40GB", 1, 11_400 / 5_000),
    ("NeoBERT, ZeRO-2, 8 H200", NEOBERT, strategy_of("zero2", 1, 8), "H200", 6, 1.68),
    ("NeoBERT, by 1.24 M tokens/s", NEOBERT, strategy_of("zero2", 1, 8), "H200", 6, NEOBERT.tokens / 1.24e6),
    ("batch 10 with Liger, H100", BASE.but(global_batch=80), node, "H100-80GB", 1, 10 * 2048 / 78_319),
    ("batch 10 plain, H100", BASE.but(global_batch=80, liger=False), node, "H100-80GB", 1, 10 * 2048 / 63_771),
):
    share = job.flops_per_token() * job.tokens / strategy.gpus / published / GPUS[gpu].peak
    planned = step_time(job, strategy, GPUS[gpu], accumulation).step
    flops = f"{job.flops_per_token() / 1e9:.2f}"
    times.append((what, flops, f"{published:.3g}", f"{100 * share:.1f} %", *against(published, planned)))
rows(("step", "GFLOP a token", "published, s", "of the peak", "planned, s", ""), *times)

lost = []
for nodes in (2, 16, 128):
    checkpoint, gpus = 93.6e9, 8 * nodes  # Llama 3.1 8B's, written at 1 GB/s
    ours = Failures(nodes, checkpoint / gpus / 64e9, checkpoint / 1e9, 600)
    waits = Failures(nodes, checkpoint / 1e9, 0, 600)
    shares = [f"{100 * f.effective_share(f.best_interval()):.2f} %" for f in (ours, waits)]
    hourly = f"{100 * ours.effective_share(3600):.2f} %"
    intervals = [f"{f.best_interval() / 60:.0f} min" for f in (ours, waits)]
    lost.append(
        (
            nodes,
            f"{ours.mtbf / 86_400:.1f}",
            f"{ours.expected(30 * 86_400):.1f}",
            intervals[0],
            shares[0],
            hourly,
            intervals[1],
            shares[1],
        )
    )
title = (
    "nodes",
    "days between failures",
    "failures in 30 days",
    "best interval",
    "stays",
    "saved every hour",
    "if training waits: best interval",
    "stays",
)
rows(title, *lost)
