"""pipeline.txt: the stages of a recipe folder in order, a row each: name, program, batch file, flags."""

import re
import shlex
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
