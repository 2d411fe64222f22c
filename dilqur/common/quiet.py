"""Keeps the libraries' own chatter out of a log whose lines are meant to be read."""

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
