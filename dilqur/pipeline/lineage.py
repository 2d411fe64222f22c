"""Where a model comes from: up the `model_name_or_path` of stages, to random weights or a model from elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from dilqur.pipeline.manifest import read_manifest

EQUAL = 0.05  # a difference in text seen, or in compute, that counts as none


@dataclass
class Lineage:
    """origin: path of the model it began as, where counting begins. utf8_bytes: of text seen since. stages: [(folder, manifest)] that it
    went through, the first one first."""

    origin: str
    utf8_bytes: int = 0
    stages: tuple = ()

    @property
    def programs(self):
        return [manifest["program"] for _, manifest in self.stages]


def lineage(model, run_dir):
    """The Lineage of the model at this path. Stages of a run folder that was moved are looked for where it is now."""
    folder = Path(model).parent if Path(model).name == "model" else Path(model)
    folder = folder if folder.exists() else run_dir / folder.name
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
    source = manifest.get("arguments", {}).get("model_name_or_path")
    if not isinstance(source, str):
        return Lineage(str(folder))
    before = lineage(source, run_dir)
    seen = before.utf8_bytes + manifest["result"].get("utf8_bytes_seen", 0)
    return Lineage(before.origin, seen, (*before.stages, (folder, manifest)))


def equal_bytes_seen(one, other):
    """Have two of them seen as much text, but for EQUAL?"""
    return abs(one - other) <= EQUAL * max(one, other)
