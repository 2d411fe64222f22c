"""pipeline.txt: the stages of a recipe folder in order, a row each: name, program, batch file, flags.

python3 -m dilqur.pipeline.rows NAME      the rows as bash arrays, for slurm/lib/read_rows.sh; standard library only
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from dilqur.common.errors import InputError

STAGE_NAME = re.compile(r"\w[\w.-]*(@[\w.@-]+)?", re.ASCII)  # a folder's name, safe in a shell and in HTML


@dataclass(frozen=True)
class PipelineRow:
    name: str
    program: str
    batch: str
    flags: tuple

    @property
    def recipe(self):
        """The stem of the recipe it reads: `full` of the stage `full`, and of its variant `full@seed-1`."""
        return self.name.partition("@")[0]

    def arguments(self, folder):
        """What the program is started with for this row of the pipeline.txt in `folder`."""
        variant = [] if self.name == self.recipe else ["--stage", self.name]
        return ["--config", str(Path(folder) / f"{self.recipe}.yaml"), *variant, *self.flags]


def read_pipeline(folder):
    """The rows of pipeline.txt in `folder`, in order; [] where there is none. One line a stage: name, program, batch file, flags.

    STAGE reads STAGE.yaml, and RECIPE@VARIANT reads RECIPE.yaml; the row's flags win over it.
    """
    path, rows = Path(folder) / "pipeline.txt", []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            raise InputError(f"{path}:{number}: a quotation mark is not closed") from None
        if not words:
            continue
        if len(words) < 3:
            raise InputError(f"{path}:{number}: a line is: stage, program, batch file, flags")
        if not STAGE_NAME.fullmatch(words[0]):
            raise InputError(
                f"{path}:{number}: the stage {words[0]} gives a folder its name: take letters, digits and . _ -, "
                "and for a variant @ after its recipe's name"
            )
        if words[0] in [row.name for row in rows]:
            raise InputError(f"{path}:{number}: the stage {words[0]} is there twice")
        rows.append(PipelineRow(words[0], words[1], words[2], tuple(words[3:])))
    return rows


def as_bash(name):
    """Assignments of the arrays that slurm/lib/read_rows.sh describes, of recipes/NAME. Raises InputError."""
    name = name.removeprefix("recipes/").removesuffix("/")
    folder = Path("recipes", name)
    if not (folder / "pipeline.txt").is_file():
        known = " ".join(sorted(path.parent.name for path in Path("recipes").glob("*/pipeline.txt")))
        raise InputError(f"{folder}/pipeline.txt: no such file; recipes with one: {known}")
    rows = read_pipeline(folder)
    if not rows:
        raise InputError(f"{folder}/pipeline.txt: no stage in it")
    arrays = {
        "stages": [row.name for row in rows],
        "programs": [row.program for row in rows],
        "batches": [row.batch for row in rows],
        "flags": [shlex.join(row.flags) for row in rows],
        **{f"words_{number}": row.arguments(folder) for number, row in enumerate(rows)},
    }
    lines = [f"{key}=({' '.join(map(shlex.quote, words))})" for key, words in arrays.items()]
    return "\n".join([f"name={shlex.quote(name)}", *lines])


if __name__ == "__main__":
    try:
        print(as_bash(sys.argv[1]))
    except InputError as mistake:
        sys.exit(print(f"error: {mistake}", file=sys.stderr) or 2)
