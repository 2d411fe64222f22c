"""A finding: what one check of one subject came to, in one line."""

import json
from collections import Counter

from dilqur.common.errors import AlreadyFinished, InputError


class Skipped(Exception):
    """A check that does not apply here, and why."""


class Later(Exception):
    """A check that has to wait, and for what."""


class Findings:
    """lines: {"stage", "check", "status", "text"} each, in order; status: ok, FAIL, skipped or later."""

    def __init__(self):
        self.lines = []

    def run(self, subject, check, *arguments):
        """Note what `check` says of `subject`: a stage, a batch file, or "" for the machine. Returns whether to go on.

        A check is a function called check_NAME. It returns what it saw, or None where it does not concern the subject, and
        raises InputError for a mistake, Skipped and Later.
        """
        status, text = "ok", None
        try:
            text = check(*arguments)
        except AlreadyFinished as done:
            text = str(done).removeprefix(f"{subject}: ")
        except InputError as mistake:
            status, text = "FAIL", str(mistake)
        except PermissionError as problem:
            status, text = "FAIL", f"{problem.filename}: permission denied: look at the permissions of it and above it"
        except OSError as problem:
            status, text = "FAIL", f"{problem.filename}: {problem.strerror}: look at the file system it is on"
        except Skipped as reason:
            status, text = "skipped", str(reason)
        except Later as reason:
            status, text = "later", str(reason)
        if text is not None:
            self.add(subject, check.__name__.removeprefix("check_"), status, text)
        return status != "FAIL"

    def add(self, subject, check, status, text):
        self.lines.append({"stage": subject, "check": check, "status": status, "text": text})

    def report(self, as_json, **about):
        """Print them: a line each and how many of what, or one JSON object with `about` in it. Raises InputError if one is FAIL."""
        if as_json:
            print(json.dumps({**about, "checks": self.lines}, ensure_ascii=False))
        else:
            wide = max(len(line["stage"]) for line in self.lines)
            for line in self.lines:
                print(f"{line['status']:<7}  {line['stage']:<{wide}}  {line['check']:<13}  {line['text']}")
        count = Counter(line["status"] for line in self.lines)
        if count["FAIL"]:
            raise InputError(f"{count['FAIL']} of {len(self.lines)} checks FAIL: their lines say what to do")
        if not as_json:
            print(", ".join(f"{number} {status}" for status, number in count.items()))
