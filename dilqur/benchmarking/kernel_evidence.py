"""Did the kernels run that a variant asks for? Read from what the profiler saw (profile/operations.json)."""

import re

# (key, value) of a recipe, or of what kernels: auto chose: (pattern among a GPU's kernels, pattern among a CPU's operations; None:
# nothing of it is to be seen there)
EXPECTED = {
    ("use_liger_kernel", True): (r"liger", None),
    ("torch_compile", True): (r"^triton_", r"Torch-Compiled Region"),
    ("loss_kernel", "liger"): (r"liger_cross_entropy", None),
    ("loss_kernel", "chunked"): (None, r"^Chunked$"),
    ("fp8", True): (r"e4m3|float8|fp8", None),
    ("optim", "adamw_torch_fused"): (r"multi_tensor_apply.*adam|fused_adam", r"fused_adam"),
    ("attn_implementation", "sdpa"): (r"flash|sdpa|fmha|cudnn.*attn", r"scaled_dot_product"),
    ("attn_implementation", "flash_attention_2"): (r"flash_(fwd|bwd)", None),
    ("attn_implementation", "flash_attention_3"): (r"flash", None),
    ("attn_implementation", "flex_attention"): (r"flex_attention|triton_tem", r"flex_attention"),
}
SHOWN = 12


def evidence(operations, keys, more=()):
    """{"on": "cuda" or "cpu", "top": [{"name", "share" of the time, "calls"}], "expected": {pattern: names that match}}.

    operations: of operations.json. keys: all of the variant's settings, over them what was chosen. more: patterns besides those of
    EXPECTED. Case does not matter.
    """
    kernels = [o for o in operations if o["device"] == "cuda"]
    seen = kernels or [o for o in operations if o["device"] == "cpu"]
    whole = sum(o["seconds"] for o in seen) or 1.0
    top = [{"name": o["name"], "share": round(o["seconds"] / whole, 4), "calls": o["calls"]} for o in seen[:SHOWN]]
    patterns = [pair[not kernels] for (key, value), pair in EXPECTED.items() if keys.get(key) == value]
    expected = {}
    for pattern in dict.fromkeys([*filter(None, patterns), *more]):
        expected[pattern] = [o["name"] for o in seen if re.search(pattern, o["name"], re.IGNORECASE)][:5]
    return {"on": "cuda" if kernels else "cpu", "top": top, "expected": expected}
