"""Every package that a requirements.txt pins is there in that version, and can be imported. For the image's %test.

python apptainer/check_imports.py requirements.txt
"""

import importlib
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Named otherwise than their distribution
MODULES = {"liger-kernel": "liger_kernel", "nvidia-ml-py": "pynvml", "PyYAML": "yaml", "zstandard": "zstandard"}


def main(path):
    lines = (line.split("#")[0].strip() for line in Path(path).read_text().splitlines())
    pinned = [Requirement(line) for line in lines if line and not line.startswith("-")]
    pinned = [r for r in pinned if r.marker is None or r.marker.evaluate()]
    wrong = 0
    for requirement in pinned:
        try:
            version = metadata.version(requirement.name)
            if version not in requirement.specifier:
                raise ImportError(f"version {version} is installed, pinned is {requirement.specifier}")
            importlib.import_module(MODULES.get(requirement.name, requirement.name))
        except Exception as error:
            print(f"{requirement.name}: {type(error).__name__}: {error}", file=sys.stderr)
            wrong += 1
    print(f"{len(pinned) - wrong} of {len(pinned)} pinned packages are there and can be imported")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
