"""`deterministic: true`: the same losses to the bit on the same GPUs, too. On a CPU they are that without it."""

import os


def make_deterministic():
    """Before the first CUDA call. Operations without a deterministic version raise, naming themselves.

    cuBLAS gets a fixed workspace; cuDNN's attention is left out, whose backward has no deterministic form, so that
    scaled_dot_product_attention takes flash, whose has one, or the plain kernels; Inductor does not time kernels to choose.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._inductor.config.deterministic = True
