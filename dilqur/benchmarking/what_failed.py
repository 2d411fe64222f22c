"""What failed of a benchmark's tests and rows, and what was left out for lack of time or of a package: a line each, for the end of
benchmarks/run_gpu.sh.

python -m dilqur.benchmarking.what_failed runs/benchmark/gpu-tests.xml runs/benchmark/llama-1b-1/benchmark.json
"""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

NO_FAILURE = (None, "out of memory")  # that one is a result
# as dilqur/kernels/choose.py, apply_kernels.py and transformers say that a row wants what this machine does not have
NOT_HERE = re.compile(r"pip install|not installed|there is no GPU here|cannot be used due to", re.I)


def failed_tests(report):
    """Of a JUnit report: ["failed: test FILE::NAME: the first line of why"]."""
    out = []
    for case in ElementTree.parse(report).iter("testcase"):
        for why in (part for part in case if part.tag in ("failure", "error")):
            name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
            out.append(f"failed: test {name}: {(why.get('message') or '').strip().partition(chr(10))[0][:200]}")
    return out


def rows_without_figures(result):
    """Of GRID/benchmark.json: ["failed: row GRID: VARIANT: why", "left out: row GRID: VARIANT: why"]."""
    grid, out = Path(result).parent.name, []
    for name, row in json.loads(Path(result).read_text(encoding="utf-8"))["variants"].items():
        if row["problem"] not in NO_FAILURE and NOT_HERE.search(row["problem"]):
            out.append(f"left out: row {grid}: {name}: {row['problem']}")
        elif row["problem"] not in NO_FAILURE:
            out.append(f"failed: row {grid}: {name}: {row['problem']}")
        elif row["left_out"] and not row["rounds"]:
            out.append(f"left out: row {grid}: {name}: {row['left_out'][0][1]}")
    return out


def main(paths):
    for path in paths:
        for line in (failed_tests if path.endswith(".xml") else rows_without_figures)(path):
            print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
