"""Conversations, as sft.py learns from them: {"messages": [{"role", "content"}, …]}, the last message the assistant's."""

import json
import sys

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.documents import is_validation, read_jsonl
from dilqur.tokenizer.llama3 import encode_chat

ROLES = ("system", "user", "assistant")


def problem_with(record):
    """What is wrong with one conversation, or None."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"no messages (keys: {', '.join(record) or 'none'})"
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or message.get("role") not in ROLES
        ):
            return f'a message is {{"role": {" | ".join(ROLES)}, "content": text}}, not {json.dumps(message, ensure_ascii=False)[:60]}'
    return None if messages[-1]["role"] == "assistant" else "the last message is not the assistant's: nothing to learn"


def conversations(settings, tokenizer):
    """({"train": rows, "validation": rows}, counts): rows are {"input_ids", "labels"}, lists of int of the same length."""
    rows, counts = {"train": [], "validation": []}, {"read": 0, "too_long": 0, "bad_record": 0, "trained_tokens": 0}

    def bad(message):
        if settings.on_error == "stop":
            raise InputError(message)
        counts["bad_record"] += 1
        print(f"skipped: {message}", file=sys.stderr)

    for file in expand(settings.input):
        for line, record in read_jsonl(file, bad):
            counts["read"] += 1
            if problem := problem_with(record):
                bad(f"{file}:{line}: {problem}; --on_error skip goes on without it and counts it")
                continue
            ids, mask = encode_chat(tokenizer, record["messages"])
            if len(ids) > settings.max_length:
                counts["too_long"] += 1
                continue
            labels = [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)]
            split = (
                "validation"
                if is_validation(record["messages"][0]["content"], settings.validation_fraction)
                else "train"
            )
            rows[split].append({"input_ids": ids, "labels": labels})
            counts["trained_tokens"] += sum(mask)
    if not rows["train"]:
        raise InputError(
            f"{' '.join(settings.input)}: no conversation to train on ({counts['read']} read, {counts['too_long']} longer "
            f"than max_length {settings.max_length})"
        )
    return rows, counts
