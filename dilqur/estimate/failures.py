"""What failures cost a long run, and how often to save: Young 1974 (CACM 17, 530) and Daly 2006 (FGCS 22, 303)."""

import math
from dataclasses import dataclass

# Llama 3 405B (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 GPUs, 8 a node
NODE_MTBF_S = 54 * 86_400 * (16_384 / 8) / 419


@dataclass(frozen=True)
class Failures:
    """mtbf: seconds between two failures of a job on so many nodes. stall: that training waits for a save. write: until that save counts.
    restart: from a failure to the next step: found out, requeued, started, loaded."""

    nodes: int
    stall: float
    write: float
    restart: float
    node_mtbf: float = NODE_MTBF_S

    @property
    def mtbf(self):
        return self.node_mtbf / self.nodes

    def effective_share(self, interval):
        """Share of the time that is training that need not be done again, with a save every `interval` seconds of training.

        Daly's equation 13, exact for failures that come at a constant rate: between two saves (interval + stall) / MTBF failures are met,
        each of which costs what was done since the save, and a restart. A save that is still being written when a failure comes does
        not count: what was done meanwhile is lost as well.
        """
        m, lost = self.mtbf, self.restart + self.write
        return interval / (m * math.exp(lost / m) * math.expm1((interval + self.stall) / m))

    def best_interval(self):
        """Seconds of training between two saves: Daly's equation 37, from Young's √(2 · stall · MTBF); never below the time of a save."""
        half = self.stall / (2 * self.mtbf)
        best = self.mtbf
        if half < 1:
            root = math.sqrt(half)
            best = math.sqrt(2 * self.stall * self.mtbf) * (1 + root / 3 + half / 9) - self.stall
        return max(best, self.write)

    def expected(self, seconds):
        """Failures in so long."""
        return seconds / self.mtbf
