r"""One set of prompts, several models, side by side, with a figure for how much each repeats itself.

    python scripts/compare_generations.py --model_name_or_path runs/quickstart/base runs/quickstart/cpt-2-full \
        --input recipes/quickstart/prompts.txt --output_dir runs/try/c
    python scripts/compare_generations.py --config recipes/quickstart/compare.yaml --check

`input` holds a prompt a line (.txt) or a record (.jsonl, `text_field`). Models named in `chat_models` get the prompt as the
user's message in the Llama-3 chat format, the others as the beginning of a text. Repetition is rep-4 (Welleck et al. 2020,
arXiv:1908.04319): 1 − distinct 4-grams / 4-grams, over words, so that tokenizers compare. Writes generations.md and .jsonl.
"""

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from tqdm import tqdm

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.common.startup import quiet_libraries
from dilqur.data.documents import read
from dilqur.evals.model_names import display_names
from dilqur.pipeline.inputs import Documents, ModelPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.llama3 import EOT, encode_chat
from dilqur.tokenizer.text_tokenizer import TextTokenizer


@dataclass(kw_only=True)
class CompareSettings(StageSettings):
    model_name_or_path: list[ModelPath] = setting("model folders or stages, in the order of the columns")
    chat_models: list[str] = setting("names among them that are assistants", default_factory=list)
    input: list[Documents] = setting("prompts, one a line or record")
    text_field: str = setting("key that holds a prompt in .jsonl", default="text")
    max_new_tokens: Annotated[int, Field(ge=1)] = setting("longest answer in tokens", default=128)
    temperature: Annotated[float, Field(ge=0)] = setting("0: always the likeliest token", default=0.0)
    top_p: Annotated[float, Field(gt=0, le=1)] = setting("with a temperature: nucleus sampling", default=1.0)
    bf16: bool = setting("run the models in bfloat16", default=False)
    seed: Annotated[int, Field(ge=0)] = setting("for sampling", default=42)


def repetition(text, n=4):
    """rep-n of a text: 1 − distinct word n-grams / word n-grams; 0 where there are fewer than n words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer(model, tokenizer, prompt, settings, chat):
    """(text, number of tokens, ended by itself) of what `model` says to `prompt`."""
    import torch

    if chat:
        ids, _ = encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ends = [i for i in (tokenizer.eos_id, tokenizer.backend.token_to_id(EOT)) if i is not None]
    sampling = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        if settings.temperature
        else {"do_sample": False}
    )
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **sampling,
        )[0, len(ids) :].tolist()
    ended = bool(out) and out[-1] in ends
    return tokenizer.decode(out[:-1] if ended else out, skip_special_tokens=True), len(out), ended


def markdown(rows, names, summary):
    """The answers side by side: a table of figures, then a section for each prompt."""
    lines = ["| model | repetition (rep-4) | ends by itself | words per answer |", "|---|---:|---:|---:|"]
    lines += [f"| {n} | {s['repetition']:.3f} | {s['ended']:.0%} | {s['words']:.1f} |" for n, s in summary.items()]
    for row in rows:
        lines += ["", f"## {row['prompt']}", ""]
        lines += [f"- **{name}**: {' '.join(row['answers'][name]['text'].split())}" for name in names]
    return "\n".join(lines) + "\n"


def check(settings):
    """({name: model folder}, the prompts). Raises InputError."""
    models = display_names(settings.model_name_or_path)
    if unknown := set(settings.chat_models) - set(models):
        raise InputError(f"chat_models: {sorted(unknown)[0]} is not among the models ({', '.join(models)})")
    prompts = [d.text for d in read(expand(settings.input), settings.text_field)]
    if not prompts:
        raise InputError(f"{' '.join(settings.input)}: no prompt in there")
    return models, prompts


@program(CompareSettings, check)
def main(settings, stage, checked):
    models, prompts = checked
    stage.open()
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    rows, summary = [{"prompt": prompt, "answers": {}} for prompt in prompts], {}
    for name, path in models.items():
        set_seed(settings.seed)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16 if settings.bf16 else torch.float32
        ).eval()
        model, tokenizer = model.to("cuda" if torch.cuda.is_available() else "cpu"), TextTokenizer(path)
        for row in tqdm(rows, desc=name, disable=None):
            text, tokens, ended = answer(model, tokenizer, row["prompt"], settings, name in settings.chat_models)
            row["answers"][name] = {"text": text, "tokens": tokens, "ended": ended, "repetition": repetition(text)}
        found = [row["answers"][name] for row in rows]
        summary[name] = {
            "repetition": sum(a["repetition"] for a in found) / len(found),
            "ended": sum(a["ended"] for a in found) / len(found),
            "words": sum(len(a["text"].split()) for a in found) / len(found),
        }

    with atomic_file(stage.folder / "generations.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_file(stage.folder / "generations.md", "w", encoding="utf-8") as file:
        file.write(markdown(rows, models, summary))
    stage.finish({"models": summary, "prompts": len(prompts)})
    print(
        "\n".join(
            f"{name}: repetition {s['repetition']:.3f}, ends by itself {s['ended']:.0%}" for name, s in summary.items()
        )
    )


if __name__ == "__main__":
    main()
