"""Memory of a GPU in a training step, term by term: what each strategy of dilqur/training/distributed.py leaves on it, and the
activations."""

from dataclasses import dataclass

from dilqur.estimate.lora import CHUNK_OF_LOGITS
from dilqur.kernels.choose import CHUNK_BYTES

# What a process holds outside torch's allocator: the CUDA context, kernels and NCCL's buffers. torch's out-of-memory messages give it as
# memory in use - reserved: 0.5 GiB alone on an A100, 1.4 GiB with NCCL on four
CONTEXT = 1.5e9
# Allowance for what the allocator reserves and cannot use. Ours: plain training allocates the same sizes every step; Guo et al. 2024
# (GMLake, arXiv 2401.08156) find 15 % on average where recomputation, offloading and sharding are combined
FRAGMENTATION = 0.05
# DeepSpeed's defaults, elements: reduce_bucket_size; stage3_max_live_parameters
BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class Memory:
    """terms: {what: bytes} however large the micro-batch is; state: the first of them, weights, gradients and moments alone.
    each_sample: bytes of activations for each sequence."""

    terms: dict
    each_sample: float

    @property
    def state(self):
        return sum(self.terms.get(name, 0.0) for name in ("weights", "gradients", "moments"))

    def total(self, batch):
        """Bytes of the card that a micro-batch of so many sequences takes, allowances included."""
        return CONTEXT + (1 + FRAGMENTATION) * self.allocated(batch)

    def allocated(self, batch):
        """Bytes of it in tensors: what torch.cuda.max_memory_allocated() would say."""
        return sum(self.terms.values()) + batch * self.each_sample

    def largest_batch(self, card):
        """Most sequences of a micro-batch on a card of so many bytes, 0 if the rest alone is too much."""
        room = (card - CONTEXT) / (1 + FRAGMENTATION) - sum(self.terms.values())
        return max(0, int(room // self.each_sample))


def memory_of(job, strategy, accumulation=1):
    """Memory of a GPU under `strategy`. accumulation: micro-batches of a step."""
    state = state_of(job, strategy)
    terms = {**({} if strategy.offload else state), **_working(job, strategy, accumulation)}
    activations = job.activations(residual_bytes(job, strategy))
    if activations.whole:
        terms["gradient of the head"] = activations.whole
    # compiled, bfloat16 logits and their gradients; else those in fp32 between them, too
    if job.fused_loss:
        terms["a chunk of logits"] = CHUNK_BYTES * (1 if job.compiled else 2)
    if job.lora:
        terms["a chunk of logits"] = job.product * CHUNK_OF_LOGITS
    each = job.max_length * activations.peak(job.recomputed)
    return Memory(terms, each)


def residual_bytes(job, strategy):
    """Of a number between the layers: under autocast, which is what bf16 is without sharded weights, fp32."""
    return job.frozen_weight if strategy.kind in ("single", "ddp") else job.product


def state_of(job, strategy):
    """{"weights", "gradients", "moments": bytes} of AdamW's training state that a GPU holds.

    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) has its weights in the products' dtype, whole but in stage 3, and fp32 master
    weights besides, divided as the moments are; gradients are added up in fp32, in stage 1 whole and beside
    those of the products' dtype.
    """
    trained, total, n = job.trained, job.total, strategy.shards
    if strategy.kind.startswith("zero"):
        whole = n if strategy.kind == "zero3" else 1
        return {
            "weights": job.product * total / whole + 4 * trained / n,
            "gradients": (4 + 2 * job.mixed) * trained if strategy.kind == "zero1" else 4 * trained / n,
            "moments": 8 * trained / n,
        }
    each = job.weight / n
    weights = each * trained + job.frozen_weight / n * (total - trained)
    return {"weights": weights, "gradients": each * trained, "moments": 2 * each * trained}


def _working(job, strategy, accumulation):
    """{what: bytes} that the strategy needs beside the state when the backward pass begins."""
    tail, layer = job.units()
    if job.lora:  # the Trainer leaves gradient_as_bucket_view false: DDP holds the gradients a second time
        copies = {"bf16 copies": job.product * job.trained} if job.mixed else {}
        return copies | ({"DDP's buckets": job.weight * job.trained} if strategy.kind == "ddp" else {})
    if strategy.kind in ("single", "ddp"):
        # autocast keeps a copy of each matrix it has cast until the backward pass; an embedding that is no head is none
        embedding = next(size for name, size in job.sizes.items() if "embed" in name or name == "model.encoder.weight")
        untied = any(name.startswith(("lm_head", "decoder")) for name in job.sizes)
        return {"bf16 copies": job.product * (job.total - untied * embedding)} if job.mixed else {}
    if strategy.kind == "fsdp2":
        # the layer that is used, the next one, and the buffer that one arrives in
        gathered = tail + 3 * layer if strategy.reshards else job.total
        terms = {"gathered weights": job.product * gathered}
        if (
            job.weight == 2 and accumulation > 1
        ):  # dilqur/training/distributed.py: micro-batches are added up in fp32 before they are reduced
            terms["unsharded gradients"] = 4 * job.trained
        return terms
    if strategy.kind == "zero1" and job.mixed:
        return {}  # DeepSpeed's BF16_Optimizer has no buckets
    terms = {"buckets": job.product * BUCKET + (4 * min(BUCKET, job.trained) if job.mixed else 0)}
    if strategy.kind == "zero3":
        terms["gathered weights"] = job.product * min(LIVE, job.total)
    return terms
