r"""Bits per UTF-8 byte of documents under one or more models, whatever their tokenizers.

    python scripts/eval_bpb.py --model_name_or_path runs/quickstart/cpt-2-full \
        --input runs/quickstart/clean/validation --max_length 128 --json
    python scripts/eval_bpb.py --config recipes/quickstart/bpb.yaml --check

Every model gets the same cleaned text. The first token is predicted after BOS; the end-of-document token, which stands for
no byte, is reported apart. A document longer than `max_length` tokens is read in windows that overlap: past the first, a
token has at least max_length − stride tokens before it. The context is counted in the model's own tokens, so a
tokenizer with longer tokens sees more text. `interval` is a 95 % bootstrap interval over documents; the models share its draws, so
`differences`, each model's difference to the first with an interval of its own, is paired. With one model, --json prints its
figures; with several, {"models": {name: figures}, "differences": {name: {"difference", "interval"}}}.

OUTPUT_DIR/documents.npz: `nats` (documents, models), float64; `utf8_bytes` (documents,), int64, in the order of the input; and
`names` (models,), as in manifest.json.
"""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.common.startup import quiet_libraries
from dilqur.data.documents import read
from dilqur.evals.model_names import named_models
from dilqur.models.config import check_length, read_config
from dilqur.pipeline.inputs import Documents, ModelPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.text_tokenizer import TextTokenizer


@dataclass(kw_only=True)
class BpbSettings(StageSettings):
    model_name_or_path: list[ModelPath] = setting("model folders or stages")
    names: list[str] | None = setting("what to call them; none: their folders' names", default=None)
    input: list[Documents] = setting("held-out documents: files, folders or globs")
    text_field: str = setting("key or column that holds the text", default="text")
    sample_by: Literal["line", "paragraph", "document"] = setting("one document of a .txt", default="line")
    max_length: Annotated[int, Field(ge=2)] = setting("tokens a model sees at once", default=2048)
    stride: Annotated[int, Field(ge=1)] | None = setting("new tokens a window; none: max_length / 2", default=None)
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = setting("windows at a time", default=8)
    bf16: bool = setting("run the models in bfloat16", default=False)
    seed: Annotated[int, Field(ge=0)] = setting("of the draws for the intervals", default=42)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)


def load(path, bf16):
    """(model, TextTokenizer) of a folder, the model on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), TextTokenizer(path)


def check(settings):
    """InputError for what can be seen without torch."""
    named_models(settings)
    if settings.stride and settings.stride > settings.max_length:
        raise InputError(
            f"stride {settings.stride} is more than max_length {settings.max_length}: tokens would be left out"
        )
    for path in settings.model_name_or_path:
        tokenizer = TextTokenizer(path)
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise InputError(f"{path}: its tokenizer has no BOS or no EOS token")
        check_length(read_config(path), settings.max_length, path)


@program(BpbSettings, check, needs_folder=False)
def main(settings, stage):
    stage.open()
    quiet_libraries()

    from dilqur.evals.bits_per_byte import by_document, compare, score

    files = expand(settings.input)
    size = sum(len(d.text.encode("utf-8")) for d in read(files, settings.text_field, settings.sample_by))
    if not size:
        raise InputError(f"{' '.join(settings.input)}: no document in there: nothing to score")
    scores, results = {}, {}
    for name, path in named_models(settings).items():
        model, tokenizer = load(path, settings.bf16)
        texts = (d.text for d in read(files, settings.text_field, settings.sample_by))
        with tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=None) as bar:
            total = scores[name] = score(
                model,
                tokenizer,
                texts,
                settings.max_length,
                settings.stride or -(-settings.max_length // 2),
                settings.per_device_eval_batch_size,
                bar.update,
            )
        results[name] = {**total.result(), "max_length": settings.max_length, "model": path}
        print(
            f"{name}: {results[name]['bits_per_byte']:.4f} bits per byte ({total.tokens:,} tokens, {total.utf8_bytes:,} bytes)",
            file=sys.stderr,
        )
    nats, utf8_bytes = by_document(scores)
    intervals, differences = compare(nats, utf8_bytes, list(scores), settings.seed)
    for name, figures in results.items():
        figures["interval"] = intervals[name]
    result = {"models": results, **({"differences": differences} if differences else {})}
    if stage.folder:
        with atomic_file(stage.folder / "documents.npz") as file:
            np.savez(file, nats=nats, utf8_bytes=utf8_bytes, names=np.array(list(scores)))
    stage.finish(result)
    if settings.json:
        print(json.dumps(result if differences else next(iter(results.values())), ensure_ascii=False))


if __name__ == "__main__":
    main()
