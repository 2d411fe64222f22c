"""How the work of a program that handles many files is spread: worker processes, and parts for the tasks of a job array."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dilqur.common.errors import InputError
from dilqur.pipeline.settings_parser import setting


@dataclass(kw_only=True)
class ParallelSettings:
    """How a program's work is spread; the result does not depend on it."""

    num_proc: Annotated[int, Field(ge=1)] | None = setting(
        "worker processes; none: one a core", default=None, on_resume="free"
    )
    shard: Annotated[int, Field(ge=0)] | None = setting(
        "do only this part of the files, counted from 0 …", default=None, on_resume="free"
    )
    of: Annotated[int, Field(ge=1)] | None = setting("… of so many parts", default=None, on_resume="free")
    finish: bool = setting("all parts are done: put them together", default=False, on_resume="free")

    def check_parts(self):
        """InputError for --shard, --of and --finish that do not fit together."""
        if (self.shard is not None or self.finish) and not self.of:
            raise InputError("--of missing: the number of parts")
        if self.of and (self.shard is None) == (not self.finish):
            raise InputError("--of wants either --shard (do that part) or --finish true (put the parts together)")
        if self.shard is not None and self.shard >= self.of:
            raise InputError(f"--shard {self.shard}: parts are counted from 0 to {self.of - 1}")
        if self.shard is not None and self.overwrite_output_dir:  # a key of StageSettings
            raise InputError(
                "--overwrite_output_dir with --shard: one part would remove the others; remove the folder by hand"
            )
        if self.finish and self.overwrite_output_dir:
            raise InputError(
                "--overwrite_output_dir with --finish: it would remove what is to be put together; leave it out"
            )
