"""Where a packing that was killed goes on: which shards are finished, and where in the input each of them ends."""

import orjson

from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError
from dilqur.common.paths import identity_of


class Journal:
    """FOLDER/.resume.json: the shards that are finished, and after each of them where the next one begins.

    A `cut` is that place: number of the file, index of its block, documents of that block that are in earlier shards, and how
    many records and bad records came before the block. sources: {file: its identity as it was when it was opened, with its
    hash where it has been read to its end}. Shards made of files that have changed since are not gone on from.
    """

    def __init__(self, folder, spec, files):
        self.path, self.spec, self.files = folder / ".resume.json", spec, files
        self.shards, self.cuts, self.sources = [], [], {}
        if not self.path.exists():
            return
        try:
            earlier = orjson.loads(self.path.read_bytes())
        except orjson.JSONDecodeError:
            raise InputError(f"{self.path}: damaged; remove {folder}, to begin again") from None
        if changed := [key for key in {**earlier["spec"], **spec} if earlier["spec"].get(key) != spec.get(key)]:
            changed = changed[0]
            if changed == "files":
                raise InputError(f"{folder}: was packed from another list of files; remove {folder}, to begin again")
            raise InputError(
                f"{folder}: a part is packed already, with {changed} = {earlier['spec'].get(changed)!r}, now {spec.get(changed)!r}; "
                "put that back to go on, or give --overwrite_output_dir true to begin again"
            )
        same = 0
        for (then, was), now in zip(earlier["sources"].items(), files, strict=False):
            if then != now or not was.items() >= identity_of(now).items():
                break
            same += 1
        whole = same == len(earlier["sources"]) == len(files)
        kept = [cut for cut in earlier["cuts"] if cut["file"] < same or (whole and cut["file"] == same)]
        there = [all_there(folder, shard) for shard in earlier["shards"]]
        kept = kept[: there.index(False)] if False in there else kept
        self.shards, self.cuts = earlier["shards"][: len(kept)], kept
        self.sources = {file: earlier["sources"][file] for file in files[: self.next["file"]]}
        for shard in earlier["shards"][len(kept) :]:
            for name in shard["files"]:
                (folder / name).unlink(missing_ok=True)

    @property
    def next(self):
        """The cut to go on from."""
        return self.cuts[-1] if self.cuts else {"file": 0, "block": 0, "skip": 0, "records": 0, "bad": 0}

    def save(self, shards, cuts):
        """Note that `shards` are finished; `cuts`: where the next one begins after each of the new ones."""
        self.shards, self.cuts = list(shards), self.cuts + cuts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"spec": self.spec, "sources": self.sources, "shards": self.shards, "cuts": self.cuts}
        write_json(self.path, state)


def all_there(folder, shard):
    """Are the files of a finished shard in `folder`, each of its size?"""
    sizes = {name: about["bytes"] for name, about in shard["files"].items()}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
