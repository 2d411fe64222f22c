"""report.py: one file with what was measured, and no claim that the figures do not bear out."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import CORPUS

EMPTY = {"meta", "line"}  # elements without an end tag: HTML's, and SVG's as it is written here


@pytest.fixture(scope="module")
def finished(run, made, tiny_model, tmp_path_factory):
    """A run folder: two tokenizers and their fertility, a model from random weights, the same continued, bits per byte."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    shutil.copytree(made / "clean", folder / "clean")
    shutil.copytree(made / "tokenizer", folder / "tokenizer")
    shutil.copytree(made / "tiny", folder / "base")
    tokenizer = ["--input", CORPUS / "en", "--vocab_size", 300, "--output_dir", folder / "small"]
    run("data_tools/train_tokenizer.py", *tokenizer)
    held_out = ["--input", made / "clean" / "validation"]
    both = ["--tokenizer", folder / "tokenizer", folder / "small"]
    pair = f"{{name: az-en, input: {CORPUS}/parallel.az.txt, reference: {CORPUS}/parallel.en.txt}}"
    more = ["--parallel", pair, "--sample_words", "kitablardan", "--output_dir", folder / "fertility"]
    run("data_tools/eval_tokenizer.py", *both, *held_out, *more)
    data = ["--datasets", f"{{path: {made}/shards}}", "--eval_datasets", f"{{path: {made}/held_out}}"]
    steps = ["--max_length", 64, "--global_batch_size", 4, "--max_steps", 3, "--learning_rate", "1e-3"]
    run("scripts/cpt.py", "--model_name_or_path", folder / "base", *data, *steps, "--output_dir", folder / "longer")
    models = ["--model_name_or_path", folder / "base", folder / "longer", "--max_length", 64]
    run("scripts/eval_bpb.py", *models, *held_out, "--output_dir", folder / "bpb")
    return folder


def report(run, folder, out, *more, code=0):
    """(what was printed, the page, the manifest's result)"""
    done = run("scripts/report.py", "--run_dir", folder, "--output_dir", out, *more, code=code)
    return done.stdout, (out / "report.html").read_text(), result(out)


def result(stage):
    return json.loads((stage / "manifest.json").read_text())["result"]


def test_the_page_says_what_bounded_a_training_run(run, finished, tmp_path):
    bounded = result(finished / "longer")["bounded_by"]
    assert bounded["bound"] in bounded["shares"] and sum(bounded["shares"].values()) == pytest.approx(1, abs=0.001)
    _, page, _ = report(run, finished, tmp_path / "report")
    assert "bounded by" in page and f"{bounded['bound']}, {bounded['shares'][bounded['bound']]:.0%}" in page


class Reader(HTMLParser):
    """Checks that elements are closed in order; collects headings, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_is_one_file_that_loads_nothing(run, finished, tmp_path):
    _, page, _ = report(run, finished, tmp_path / "report")
    reader = Reader(page)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [".lock", "manifest.json", "report.html"]
    assert {tag for tag, key, _ in reader.attributes if key in ("src", "href", "srcset", "data")} == {"a"}
    assert all(value.startswith("#") for _, key, value in reader.attributes if key == "href")
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)


def test_it_has_the_figures_of_the_manifests(run, finished, tmp_path):
    printed, page, _ = report(run, finished, tmp_path / "report", "--title", "A <b>title</b>")
    reader = Reader(page)
    assert reader.headings == ["Summary", "Tokenizers", "Training", "Bits per byte", "Manifests"], (
        "what is not there is left out"
    )
    assert "A <b>title</b>" in reader.text, "as text, not as markup"
    fertility = result(finished / "fertility")
    for name, figures in fertility["tokenizers"].items():
        assert f"{figures['fertility']:.3f}" in reader.text and f"{figures['words_kept_whole']:.1%}" in reader.text
        low, high = figures["intervals"]["fertility"]
        assert f"{low:.3f} to {high:.3f}" in reader.text
        assert f"{fertility['parallel']['az-en']['tokenizers'][name]['premium']:.2f}" in reader.text
        pieces = [f'<b class="c{n}">{piece}</b>' for n, piece in enumerate(fertility["splits"]["kitablardan"][name])]
        assert "".join(pieces) in page, "a box for every token"
    for stage in ("base", "longer"):
        figures = result(finished / stage)
        assert f"{figures['loss']:.4f}" in reader.text and f"{figures['tokens_per_second']:,.0f} {stage}" in printed
    assert f"longer: {result(finished / 'longer')['eval_loss']:.4f}" in reader.text, (
        "the dot in the chart says what it is"
    )
    for figures in result(finished / "bpb")["models"].values():
        assert f"{figures['bits_per_byte']:.3f}" in reader.text
        low, high = figures["interval"]
        assert f"{low:.3f} to {high:.3f}" in reader.text
    assert len(printed.splitlines()) <= 8 and f"{tmp_path}/report/report.html" in printed.splitlines()[-1]


def test_a_tokenizer_that_needs_more_tokens_does_not_hold(run, finished, tmp_path):
    printed, page, claims = report(run, finished, tmp_path / "report")
    assert claims["fertility"]["base"] == "tokenizer" and claims["fertility"]["custom"] == "small", (
        "the last one measured"
    )
    assert claims["fertility"]["holds"] is False
    assert "does not hold at this size" in Reader(page).text and "does not hold at this size" in printed
    assert claims["bits_per_byte"] is None and "has a control that saw as much text" in Reader(page).text


def test_a_report_of_what_has_changed_since_says_so(run, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "mini")
    report(run, folder, tmp_path / "report")
    again = ["scripts/report.py", "--run_dir", folder, "--output_dir", tmp_path / "report"]
    assert "nothing to do" in run(*again).stdout
    manifest = json.loads((folder / "bpb" / "manifest.json").read_text())
    (folder / "bpb" / "manifest.json").write_text(json.dumps({**manifest, "seconds": 1.0}))
    assert "mini/bpb/manifest.json has changed since" in run(*again, code=2).stderr
    run(*again, "--overwrite_output_dir", "true")
    shutil.copytree(folder / "bpb", folder / "another")
    assert "finished with stages" in run(*again, code=2).stderr, "a stage more than there was"


def test_a_run_folder_without_a_finished_stage_is_one_line(run, tmp_path):
    done = run("scripts/report.py", "--run_dir", tmp_path, "--output_dir", tmp_path / "report", code=2)
    assert done.stderr.startswith("error: ") and "nothing to report" in done.stderr and done.stderr.count("\n") == 1


# -- the control: manifests written here, in the shape of real ones ---------------------------------------------------


@pytest.fixture
def stage(finished, tmp_path):
    """stage(name, program, source, **result) writes a finished stage into tmp_path/run, and returns its folder."""
    like = json.loads((finished / "longer" / "manifest.json").read_text())

    def write(name, program, source=None, **figures):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        shutil.copy(finished / "longer" / "metrics.jsonl", folder)
        arguments = {**like["arguments"], "model_name_or_path": source and str(source)}
        stage = {"stage": name, "program": program, "arguments": arguments, "inputs": {}}
        figures = {**(like["result"] if program == "cpt.py" else {}), **figures}
        (folder / "manifest.json").write_text(json.dumps({**like, **stage, "result": figures}))
        return folder

    return write


def chain(stage, seen, control_seen, bits, control_bits):
    """base → transplant → two phases of training, and base → control; seen: bytes of each phase."""
    base = stage("base", "cpt.py", utf8_bytes_seen=777_000)
    transplant = stage("transplant", "transplant_tokenizer.py", base / "model", tokenizer_sha256="new")
    first = stage("first", "cpt.py", transplant, utf8_bytes_seen=seen[0])
    second = stage("second", "cpt.py", first / "model", utf8_bytes_seen=seen[1])
    control = stage("control", "cpt.py", base / "model", utf8_bytes_seen=control_seen)
    tuned = stage("tuned", "sft.py", second / "model", conversations={"train": 1, "validation": 0}, loss_first=1.0)
    models = {"base": (base, 9.0), "first": (first, 3.0), "second": (second, bits), "control": (control, control_bits)}
    models["tuned"] = (tuned, 0.5)
    rest = {"bits_per_token": 1.0, "bits_per_word": 1.0, "tokens": 9, "documents": 1, "utf8_bytes": 9, "max_length": 64}
    figures = {name: {**rest, "model": f"{folder}/model", "bits_per_byte": b} for name, (folder, b) in models.items()}
    stage("bpb", "eval_bpb.py", models=figures)
    return base.parent


@pytest.mark.parametrize(
    ("bits", "control_bits", "said"), [(2.0, 2.1, "fewer: holds"), (2.1, 2.0, "fewer: does not hold at this size")]
)
def test_the_control_saw_as_much_text_since_the_common_base(run, stage, tmp_path, bits, control_bits, said):
    """30 + 70 kB in two phases against 104 kB: within 5 %. The base's own 777 kB are common to both, and fine-tuning is left out."""
    folder = chain(stage, (30_000, 70_000), 104_000, bits, control_bits)
    printed, page, claims = report(run, folder, tmp_path / "report")
    assert (claims["bits_per_byte"]["model"], claims["bits_per_byte"]["control"]) == ("second", "control")
    assert claims["bits_per_byte"]["utf8_bytes_seen"] == 100_000
    assert said in printed and said.removeprefix("fewer: ") in Reader(page).text
    assert (
        "second 2" in Reader(page).text and "(100 kB)" in Reader(page).text and "base 9.000 (0 B)" in Reader(page).text
    )


def test_without_a_control_that_saw_as_much_there_is_no_claim(run, stage, tmp_path):
    folder = chain(stage, (30_000, 70_000), 110_000, 2.0, 2.1)
    printed, _, claims = report(run, folder, tmp_path / "report")
    assert claims["bits_per_byte"] is None and "bits per byte" not in printed


def test_what_a_model_says_cannot_break_the_page(run, stage, tmp_path):
    folder = stage("compare", "compare_generations.py", models={"m": {"repetition": 0.5, "ended": 1.0, "words": 2.0}})
    answer = {"text": "</div><script>alert(1)</script>", "tokens": 3, "ended": False, "repetition": 0.25}
    (folder / "generations.jsonl").write_text(json.dumps({"prompt": "<h2>Salam</h2>", "answers": {"m": answer}}) + "\n")
    _, page, _ = report(run, folder.parent, tmp_path / "report")
    reader = Reader(page)
    assert "<script" not in page and answer["text"] in reader.text and "<h2>Salam</h2>" in reader.text
    assert "repetition 0.25, 3 tokens, cut off" in reader.text
    assert reader.headings == ["Generations", "Manifests"]
