r"""How good encoders are: fine-tuned on a task with labels, or asked to guess masked words; several side by side, with intervals.

    python scripts/eval_encoder.py --config recipes/quickstart-encoder/kinds.yaml --check
    python scripts/eval_encoder.py --model_name_or_path runs/quickstart-encoder/mlm-2 --task masked_words --max_length 128 \
        --train runs/quickstart-encoder/clean/train --test runs/quickstart-encoder/clean/validation --output_dir runs/try/words

task                      what is measured
sequence_classification   accuracy or macro_f1 of texts with a label
token_classification      accuracy, macro_f1 or entity_f1 of words with a tag each
masked_words              how many words of held-out documents are guessed: by how often `train` has them, by ending

Every encoder is fine-tuned with each of `learning_rates` and each of `seeds`. The rate with the best mean on `validation` is taken, and the
mean of its seeds on `test` is the score. Without `test` the seeds are folds: each tests on a part of its own, validates on the next one and
trains on the rest. Without `validation` a tenth of `train` is taken. Intervals are of 95 %, over test documents, and over seeds where these
are no folds; differences to the first encoder are paired. `random_control` adds the first encoder's shape with random weights, as
transformers begins it: what pre-training gave is the difference.

Each fine-tuning is kept in OUTPUT_DIR/runs when it ends; the same command again goes on with those that are missing, and so does one with
more encoders, learning rates or (with `test`) seeds, once OUTPUT_DIR/manifest.json is removed.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import quote

import numpy as np
from pydantic import Field
from tqdm import tqdm

from dilqur.common.atomic import atomic_file, write_json
from dilqur.common.errors import InputError
from dilqur.common.markdown import between, markdown, number
from dilqur.common.paths import expand
from dilqur.common.startup import quiet_libraries
from dilqur.data.documents import read
from dilqur.evals.labelled_examples import draw
from dilqur.evals.model_names import named_models
from dilqur.evals.scores import METRICS, RANDOM_WEIGHTS, compare, counts, score
from dilqur.evals.splits import read_splits
from dilqur.models.config import read_config
from dilqur.pipeline.inputs import FilePath, ModelPath
from dilqur.pipeline.interrupt import Interrupt
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting, to_dict
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.encoder_tokens import MASK

LEARNING_RATES, SEEDS = [1e-5, 2e-5, 3e-5, 5e-5], [1, 2, 3, 4, 5]
DEFAULT_METRIC = "accuracy"
# what kept fine-tunings do not depend on, or is looked at one by one
HARMLESS = ("model_name_or_path", "names", "random_control", "learning_rates", "seeds")


@dataclass(kw_only=True)
class EncoderSettings(StageSettings):
    model_name_or_path: list[ModelPath] = setting("encoders: Hugging Face folders or stages")
    names: list[str] | None = setting("what to call them; none: their folders' names", default=None)
    random_control: bool = setting("also the first one's shape with random weights", default=False)
    task: Literal["sequence_classification", "token_classification", "masked_words"] = setting("what is asked of them")
    train: list[FilePath] = setting("files or folders: .tsv, .csv, .jsonl, .parquet, .conllu, .conll, .bio")
    validation: list[FilePath] | None = setting("what chooses the learning rate", default=None)
    test: list[FilePath] | None = setting("what is measured; none: folds of `train`", default=None)
    text_field: str = setting("column or key of the text, or of the list of words", default="text")
    label_field: str = setting("of the label, or of the list of tags; @file: the file's name", default="label")
    label_names: list[str] | None = setting("names of labels that are numbers from 0", default=None)
    paragraphs: bool = setting("each paragraph of a text is an example of its own", default=False)
    dotted_i: bool = setting("as in clean_corpus: of texts and words with labels", default=False)
    replace: dict | None = setting("the same, e.g. {ǝ: ə}; as pre-training had it", default=None)
    metric: Literal[METRICS] | None = setting("what is reported; none: accuracy", default=None)
    max_train_samples: Annotated[int, Field(ge=1)] | None = setting("examples drawn of train", default=None)
    max_eval_samples: Annotated[int, Field(ge=1)] | None = setting(
        "examples drawn of validation and of test; documents for masked_words", default=None
    )
    max_length: Annotated[int, Field(ge=8)] = setting("tokens read of an example", default=512)
    learning_rates: list[Annotated[float, Field(gt=0)]] = setting(
        "those that are tried", default_factory=LEARNING_RATES.copy
    )
    seeds: list[Annotated[int, Field(ge=0)]] = setting(
        "of the new head and the order; fine-tunings for each learning rate. Of masked_words the first, for the masks",
        default_factory=SEEDS.copy,
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = setting("times `train` is seen", default=10)
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = setting("examples per step", default=32)
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = setting(
        "share of the steps in which the learning rate rises; then it falls to 0", default=0.1
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting("AdamW's", default=0.01)
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = setting(
        "masked_words: share of the words that are masked", default=0.15
    )
    suffixes: list[str] | None = setting(
        "masked_words: endings; none: the 15 most frequent ones of three letters", default=None
    )
    fill_mask: list[str] | None = setting(
        "masked_words: sentences with one [MASK] each; what is found likeliest there", default=None
    )
    bf16: bool = setting("bfloat16 matmuls", default=False)


def check(settings):
    """The Splits of the examples, None for masked words. Raises InputError."""
    named_models(settings)
    if settings.random_control and RANDOM_WEIGHTS in named_models(settings):
        raise InputError(f"names: {RANDOM_WEIGHTS} is what random_control is called")
    for path in settings.model_name_or_path:
        config = read_config(path)
        positions = config.get("max_position_embeddings") or settings.max_length
        if "roberta" in config.get("model_type", ""):  # they count from the padding's id on
            positions -= config.get("pad_token_id", 1) + 1
        if settings.max_length > positions:
            raise InputError(f"max_length {settings.max_length} is more than the {positions} positions of {path}")
    for key in ("learning_rates", "seeds"):
        if len(set(getattr(settings, key))) != len(getattr(settings, key)) or not getattr(settings, key):
            raise InputError(f"{key}: give one at least, and none twice")
    if settings.task == "masked_words":
        if settings.metric or not settings.test:
            raise InputError("masked_words: give --test, the documents whose words are masked, and no metric")
        if wrong := [sentence for sentence in settings.fill_mask or [] if sentence.count(MASK) != 1]:
            raise InputError(f"fill_mask: {wrong[0]!r} does not have one {MASK}")
    elif settings.test is None and settings.validation:
        raise InputError("validation: without test each fold validates on the next: leave it out, or give test")
    elif settings.test is None and len(settings.seeds) < 3:
        raise InputError("test: without it the seeds are folds, and there must be three at least")
    if settings.metric == "entity_f1" and settings.task != "token_classification":
        raise InputError("metric entity_f1: of token_classification alone")
    return None if settings.task == "masked_words" else read_splits(settings)


# -- fine-tuning on labels --------------------------------------------------------------------------------------------


def fine_tune_all(settings, stage, splits, models):
    """{name: {learning rate: [(validation score, numerators, denominators) of each seed]}}; each fine-tuning is read where it was
    kept. None where the run was asked to stop before all were done."""
    from dilqur.evals.fine_tuning import Encoder, TuningSettings

    tuning = TuningSettings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(TuningSettings)})
    interrupt = Interrupt(stage.folder, margin_s=60)
    interrupt.clear_stale()
    interrupt.listen()
    todo = [
        (n, p, rate, seed) for n, p in models.items() for rate in settings.learning_rates for seed in settings.seeds
    ]
    runs, encoder, metric = {}, None, settings.metric or DEFAULT_METRIC
    with tqdm(desc=stage.name, total=len(todo), unit="run", disable=None) as bar:
        for done, (name, path, rate, seed) in enumerate(todo):
            kept, began = stage.folder / "runs" / f"{quote(name, safe='')}-{rate:g}-{seed}.npz", time.monotonic()
            if not kept.exists():
                if reason := interrupt.urgent_reason():
                    interrupt.request_requeue()
                    print(f"{stage.name}: stopped, {reason}: {done} of {len(todo)} done; start it again to go on")
                    return None
                if encoder is None or encoder.name != name:
                    words, random = settings.task == "token_classification", name == RANDOM_WEIGHTS
                    encoder = Encoder(name, path, splits.labels, words, random)
                train, validation, test = map(splits.of, splits.parts[seed])
                predicted = encoder.fine_tune(train, [validation, test], tuning, rate, seed)
                counted = [
                    counts(metric, [e.label for e in examples], labels, splits.labels)
                    for examples, labels in zip((validation, test), predicted, strict=True)
                ]
                chooses = score(*(sums.sum(0) for sums in counted[0]))
                with atomic_file(kept) as file:
                    np.savez(file, validation=chooses, numerators=counted[1][0], denominators=counted[1][1])
                interrupt.observe_duration("a fine-tuning", time.monotonic() - began)
            with np.load(kept) as run:
                figures = float(run["validation"]), run["numerators"], run["denominators"]
            runs.setdefault(name, {}).setdefault(rate, []).append(figures)
            bar.update()
            if bar.disable:
                said = f"{name}, learning rate {rate:g}, seed {seed}: validation {figures[0]:.4f}"
                print(f"{stage.name} {done + 1}/{len(todo)} | {said}", file=sys.stderr)
    return runs


def classification(settings, stage, models, splits):
    """The result of a task with labels; None where the run was asked to stop."""
    if splits.test_in_train:
        print(f"warning: {splits.test_in_train:,} of the test examples are in train, too", file=sys.stderr)
    keep_identity(settings, stage, models)
    if (runs := fine_tune_all(settings, stage, splits, models)) is None:
        return None
    validation = {
        n: {rate: float(np.mean([v for v, _, _ in each])) for rate, each in r.items()} for n, r in runs.items()
    }
    best = {name: max(rates, key=rates.get) for name, rates in validation.items()}
    tested = {seed: np.array([e.source for e in splits.of(parts.test)]) for seed, parts in splits.parts.items()}
    chosen = {
        name: [(tested[seed], *sums) for seed, (_, *sums) in zip(settings.seeds, runs[name][rate], strict=True)]
        for name, rate in best.items()
    }
    result = compare(chosen)
    for name, figures in result.items():
        grid = {f"{rate:g}": value for rate, value in validation[name].items()}
        figures |= {"learning_rate": best[name], "validation": grid}
    first = splits.parts[settings.seeds[0]]
    return {
        "metric": settings.metric or DEFAULT_METRIC,
        "folds": settings.test is None,
        "examples": {name: len(numbers) for name, numbers in first._asdict().items()},
        "test_in_train": splits.test_in_train,
        "labels": splits.labels,
        "models": result,
    }


# -- masked words -----------------------------------------------------------------------------------------------------


def masked_words(settings, models):
    """The result of masked_words."""
    from dilqur.evals.masked_words import SEEN, Guesser, classes, count_words, passages

    texts = draw([d.text for d in read(expand(settings.test), settings.text_field)], settings.max_eval_samples)
    cut = passages(texts, max(1, settings.max_length // 4), settings.mlm_probability, settings.seeds[0])
    if not cut:
        raise InputError(f"{' '.join(settings.test)}: no word was drawn to be masked: give more documents")
    words = [passage.text[begin:end] for passage in cut for begin, end in passage.words]
    documents = np.array([passage.document for passage in cut for _ in passage.words])
    seen = count_words((d.text for d in read(expand(settings.train), settings.text_field)), set(words))
    often, ending, endings = classes(set(words), seen, settings.suffixes)
    groups = {
        "by_frequency": {name: np.array([often[word] == name for word in words]) for name in SEEN},
        "by_suffix": {e: np.array([ending[word] == e for word in words]) for e in endings},
    }
    guessed, cut_off, filled = {}, {}, {sentence: {} for sentence in settings.fill_mask or []}
    for name, path in models.items():
        guesser = Guesser(path, settings.bf16, random=name == RANDOM_WEIGHTS)
        with tqdm(desc=name, total=len(cut), unit=" passages", disable=None) as bar:
            how = (settings.max_length, settings.per_device_train_batch_size, bar.update)
            guessed[name], cut_off[name] = guesser.guess(cut, *how)
        for sentence, by_model in filled.items():
            by_model[name] = guesser.fill(sentence)
    ones = np.ones((len(words), 1))
    result = compare({name: [(documents, right[:, None], ones)] for name, right in guessed.items()})
    for name, figures in result.items():
        del figures["scores"]  # of seeds: here is one measurement
        right, figures["cut_off"] = guessed[name], int(cut_off[name].sum())
        for kind, members in groups.items():
            figures[kind] = {key: float(right[of].mean()) if of.any() else None for key, of in members.items()}
    many = {kind: {key: int(of.sum()) for key, of in members.items()} for kind, members in groups.items()}
    about = {"metric": "words guessed", "words": len(words), "documents": len(texts), "in_group": many}
    return {**about, "models": result, "fill_mask": filled}


# -- around them ------------------------------------------------------------------------------------------------------


def keep_identity(settings, stage, models):
    """Fine-tunings that were kept go on only with what they were begun with; another encoder, rate or seed is added to them."""
    path = stage.folder / "runs" / "identity.json"
    now = {key: value for key, value in to_dict(settings).items() if key not in HARMLESS}
    if settings.test is None:  # they are the folds
        now["seeds"] = settings.seeds
    now |= {f"encoder {name}": model for name, model in models.items()}
    for path_of, record in stage.input_identities().items():
        now[path_of] = {file: [was["bytes"], was["xxh3"]] for file, was in record["files"].items()}
    now = json.loads(json.dumps(now))
    then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if changed := [key for key in now if key in then and now[key] != then[key]]:
        raise InputError(
            f"{stage.folder}: begun with another {changed[0]}; remove {path.parent}, or choose another --output_dir"
        )
    write_json(path, {**then, **now})


def table(result):
    """Markdown, a line an encoder."""
    heads = ["encoder", result["metric"], "95 % interval", "less the first", "its interval", "learning rate"]
    rows = []
    for name, f in result["models"].items():
        differs = number(f.get("difference"), "+.3f"), between(f.get("difference_interval"), "+.3f")
        rows.append([name, number(f["score"]), between(f["interval"]), *differs, number(f.get("learning_rate"), "g")])
    parts = [markdown(heads, rows)]
    for kind, title in (("by_frequency", "seen in train"), ("by_suffix", "ending")):
        if groups := result.get("in_group", {}).get(kind):
            models = result["models"].values()
            rows = [[key, f"{many:,}", *(number(m[kind][key]) for m in models)] for key, many in groups.items()]
            parts.append(markdown([title, "words", *result["models"]], rows))
    for sentence, by_model in result.get("fill_mask", {}).items():
        lines = (f"- {n}: " + ", ".join(f"{token} {share:.3f}" for token, share in g) for n, g in by_model.items())
        parts.append("\n".join([sentence, *lines]))
    return "\n\n".join(parts) + "\n"


@program(EncoderSettings, check)
def main(settings, stage, splits=None):
    stage.open()
    quiet_libraries()
    from dilqur.evals.plots import plot_scores

    models = named_models(settings)
    if settings.random_control:
        models[RANDOM_WEIGHTS] = next(iter(models.values()))
    result = (
        masked_words(settings, models)
        if settings.task == "masked_words"
        else classification(settings, stage, models, splits)
    )
    if result is None:
        return
    text = table(result)
    with atomic_file(stage.folder / "results.md", "w", encoding="utf-8") as file:
        file.write(text)
    plot_scores(result, stage.folder / "scores.png")
    stage.finish(result)
    print(text, end="")


if __name__ == "__main__":
    main()
