"""Small token shards whose tokens say where they stand: token i of the stream is i."""

import numpy as np

from dilqur.common.atomic import write_json
from dilqur.data.shard_writer import ShardWriter


def make_shards(folder, lengths, shard_tokens=1 << 28, first=0, **manifest):
    """Write documents of these lengths to `folder`, numbered on from `first`; returns the folder."""
    ids = np.arange(first, first + sum(lengths), dtype=np.int32)
    with ShardWriter(folder, shard_tokens) as writer:
        writer.add(ids, np.array(lengths))
        fields = writer.close()
    fields |= {"tokenizer_sha256": "0" * 64, "vocab_size": first + len(ids), "utf8_bytes": 3 * len(ids), "eos_id": None}
    write_json(folder / "manifest.json", {**fields, **manifest})
    return folder
