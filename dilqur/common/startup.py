"""What a program sets before it imports torch: quieter libraries, deterministic operations."""

import os
import warnings
from pathlib import Path


def quiet_libraries():
    """No bars of transformers, no warnings about names that will change in versions we do not pin. Before heavy imports."""
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, once imported, warns that it found no GPU
    for module in ("torch", "transformers", "trl", "__main__"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def make_deterministic():
    """`deterministic: true`: the same losses to the bit on the same GPUs, too; on a CPU they are that without it.

    Before the first CUDA call. Operations without a deterministic version raise, naming themselves.

    cuBLAS gets a fixed workspace; cuDNN's attention is left out, whose backward has no deterministic form, so that
    scaled_dot_product_attention takes flash, whose has one, or the plain kernels; Inductor does not time kernels to choose.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._inductor.config.deterministic = True
