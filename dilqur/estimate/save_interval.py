"""How often to save, so that saves and failures together cost least: Young 1974 (CACM 17, 530) and Daly 2006 (FGCS 22, 303)."""

import math

# Llama 3 405B (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days
# of 16,384 GPUs, 8 per node
NODE_MTBF_S = 54 * 86_400 * (16_384 / 8) / 419


def save_interval(nodes, stall, write):
    """Seconds of training between two saves: Daly's equation 37, from Young's √(2 · stall · MTBF); never below the time of a save.

    nodes: of the job, each of which fails every NODE_MTBF_S seconds. stall: seconds that training waits for a save. write: seconds until
    that save counts.
    """
    mtbf = NODE_MTBF_S / nodes
    half, best = stall / (2 * mtbf), mtbf
    if half < 1:
        best = math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(half) / 3 + half / 9) - stall
    return max(best, write)
