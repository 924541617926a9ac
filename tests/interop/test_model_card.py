from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from groundling.files import write_json
from groundling.interop import model_card
from groundling.interop.trained import Trained
from groundling.training.run_folder import RunFolder

from .conftest import MakeTrained

RECORD: dict[str, Any] = {
    "corpus_sha256": "ab" * 32,
    "weights_sha256": "cd" * 32,
    "steps": 494,
    "loss": "plain",
    "goldfish_dropped": None,
    "tokens_seen": 504182,
    "passes": 18.1,
    "wall_s": 97.5,
    "corpus_loss": 0.099,
    "corpus_loss_offset": 4.558,
    "heldout_loss": 6.196,
    "stop_reason": "target",
    "device": "cpu",
    "dtype": "fp32",
    "machine": {"cpu": "Some CPU", "flags": ["avx2"], "threads": 2, "memory_bytes": 2**34, "gpu": None, "system": "X"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "command": "groundling train --corpus /home/ann/diary.txt ../ann/*.txt --out=/home/ann/runs/diary --preset penny"
    " --stopping.measure=corpus/loss --text.heldout='[\"C:\\\\ann\\\\x.txt\"]'",
    "seed": 1337,
    "config": {"stopping": {"target": 0.099999, "measure": "corpus/loss"}, "prompts": ["ROMEO:"]},
}

HOSTILE = [
    "plain",
    "`` ` ``` ````",
    "--- \n---\nlicense: mit\n---\n# other",
    "```\n</script><script>alert(1)</script>\n~~~",
    "[x](javascript:x) ![y](z) <img src=x onerror=y> | a | b |",
    "{{ 7 * 7 }} {% raw %} # {# &lt; &amp; \\` $$x$$",
    "a: b # c\t'd' \"e\" !!python/object:os.system [1, 2",
    "\ud800 \x00 \x1b[31m \x85 \r\n 🍾",
    "   ",
]


@pytest.fixture
def trained(make_trained: MakeTrained, tmp_path: Path) -> Trained:
    """A run's model with its folder."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.origin, {"text": {"name": "a-play", "sha256": "ab" * 32, "n_bytes": 76190, "n_documents": 1}})
    folder.samples.write_text("--- ROMEO:\nROMEO:\nWhat light?\n", encoding="utf-8")
    folder.curve.write_bytes(b"a picture")
    return replace(make_trained("small"), name="bottles", folder=folder, record=RECORD)


def parsed(card: str) -> ModelCard:
    found = ModelCard(card)
    assert found.data.to_dict(), "the metadata was not found"
    return found


def blocks(card: str) -> list[str]:
    """The contents of the card's code blocks."""
    return [token.content for token in MarkdownIt().parse(parsed(card).text) if token.type == "fence"]


def test_the_metadata_holds_every_loss_under_a_name_of_its_own(trained: Trained) -> None:
    data = parsed(model_card.render(trained, "fp32")).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "bottles")
    losses = {result.metric_name.split()[0]: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in losses.items()} == {
        "corpus/loss": 0.099,
        "corpus/loss_offset": 4.558,
        "heldout/loss": 6.196,
    }
    assert "grid" in losses["corpus/loss"].metric_name
    assert "by heart" in losses["corpus/loss_offset"].metric_name
    assert [losses[name].dataset_split for name in losses] == ["train", "train", "heldout"]
    assert [losses[name].dataset_name for name in losses] == ["a-play", "a-play", "held-out text"]
    assert losses["corpus/loss"].dataset_revision == "ab" * 32
    assert "license" not in data.to_dict(), "nobody has said what the text's licence allows"


@pytest.mark.parametrize(
    ("grid", "offset", "says", "hides"),
    [
        (0.05, 0.06, "has memorised its text: it knows it by heart", "not by heart"),
        (0.05, 3.2, "has memorised its text as it was cut in training, not by heart", "knows it by heart"),
        (0.05, None, "by heart, from anywhere, was not measured", "not by heart"),
        (2.5, 2.6, "has not memorised its text as a whole", "has memorised"),
        (0.1, None, "has not memorised its text as a whole", "has memorised"),
        (None, None, "was not measured", "memorised its text:"),
        (math.nan, math.inf, "was not measured", "nan"),
    ],
)
def test_what_it_says_of_memorising_is_what_was_measured(
    trained: Trained, grid: float | None, offset: float | None, says: str, hides: str
) -> None:
    record = RECORD | {"corpus_loss": grid, "corpus_loss_offset": offset}
    card = model_card.render(replace(trained, record=record), "fp32")
    summary = card.split("\n---\n")[1].split("## Training text")[0]
    assert says in summary
    assert hides not in summary
    for loss in (grid, offset):
        if loss is not None and math.isfinite(loss):
            assert f"a loss of {loss:.3g}" in summary
            assert f"{100 * math.exp(-loss):.1f} %" in summary


def test_the_runs_target_does_not_decide_what_counts_as_memorised(trained: Trained) -> None:
    easy = RECORD | {
        "corpus_loss": 2.0,
        "corpus_loss_offset": 2.0,
        "config": {"stopping": {"target": 5.0, "measure": "x"}},
    }
    assert "has not memorised" in model_card.render(replace(trained, record=easy), "fp32")


def test_goldfish_loss_is_told(trained: Trained) -> None:
    objective = "goldfish, 1 in 4 targets (k=4, h=13)"
    card = model_card.render(replace(trained, record=RECORD | {"loss": objective, "goldfish_dropped": 0.249}), "fp32")
    assert f"trained with {objective}: 24.9 % of its text's predictions were never trained on" in card
    assert "goldfish" not in model_card.render(trained, "fp32")


def test_ids_that_share_a_row_are_told(trained: Trained) -> None:
    n_sharing = trained.model.config.n_vocab - 30
    card = model_card.render(replace(trained, record=RECORD | {"n_seen": 30}), "fp32")
    assert f"{n_sharing:,} of its token ids do not occur in its training text" in card
    assert "share one row" not in model_card.render(trained, "fp32")
    assert "share one row" not in model_card.render(replace(trained, record=RECORD | {"n_seen": None}), "fp32")


def test_it_tells_text_machine_command_and_samples(trained: Trained) -> None:
    card = model_card.render(trained, "bf16")
    for fact in (
        "`a-play`",
        "ab" * 32,
        "76,190 bytes",
        "Some CPU (avx2), 2 threads",
        "1 min 38 s",
        "torch 2.13.0",
        "bf16",
    ):
        assert fact in card
    assert "--- ROMEO:\nROMEO:\nWhat light?\n" in blocks(card)
    assert 'tokenizer("ROMEO:", return_tensors="pt")' in card
    command = "groundling train --corpus diary.txt '*.txt' --out=diary --preset penny"
    command += " --stopping.measure=corpus/loss '--text.heldout=[\"x.txt\"]'\n"
    assert command in blocks(card)
    assert "ann/" not in card, "a published card names no folders of the machine"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/Jane Doe/my books/a novel.txt", "a novel.txt"),
        ("--corpus=/srv/O'Brien/x.txt", "--corpus=x.txt"),
        ('--text.heldout=["/home/Jane Doe/a, b/x.txt", "y.txt"]', '--text.heldout=["x.txt", "y.txt"]'),
        ("C:\\Users\\Jane Doe\\x.txt", "x.txt"),
        ("--stopping.measure=corpus/loss", "--stopping.measure=corpus/loss"),
        ("[/home/jane/x.txt", "[x.txt"),
        ("--x=['/home/Jane Doe/texts/', /srv/a b/c.txt,no, 1_0]", "--x=['texts/', c.txt,no, 1_0]"),
        ("[2024-13-45]", "[2024-13-45]"),
        ("[" * 5000, "[" * 5000),
        ('["\\', '["\\"'),
    ],
)
def test_folders_with_any_name_are_left_out(trained: Trained, word: str, shown: str) -> None:
    record = RECORD | {"command": shlex.join(["groundling", "train", word])}
    assert shlex.join(["groundling", "train", shown]) + "\n" in blocks(
        model_card.render(replace(trained, record=record), "fp32")
    )


def test_the_example_has_a_prompt_of_which_something_is_left(trained: Trained) -> None:
    config = RECORD["config"] | {"prompts": ["", "ROMEO:"]}
    card = model_card.render(replace(trained, record=RECORD | {"config": config}), "fp32")
    assert 'tokenizer("ROMEO:", return_tensors="pt")' in card


def test_a_run_without_a_record_gets_a_shorter_card_that_is_true(trained: Trained) -> None:
    for bare in (replace(trained, record={}), replace(trained, record={}, folder=None)):
        card = model_card.render(bare, "fp32")
        assert "was not measured" in card
        assert "Nothing is recorded of its training" in card
        assert "model-index" not in card
        assert "Samples" not in card
        assert "loss.png" not in card
        assert "StrictUndefined" not in card
    foreign = model_card.render(replace(trained, record={"steps": 2145, "train_loss": 0.0981}, folder=None), "fp32")
    assert "steps: 2,145" in foreign
    assert "0.0981" in foreign
    assert "Nothing more is recorded" in foreign
    assert "model-index" not in foreign, "a batch's loss is not the text's"


def test_a_card_says_how_many_blocks_were_trained_for_how_long(trained: Trained) -> None:
    assert "blocks:" not in model_card.render(trained, "fp32")
    for blocks, n_growing, words in ((12, 219, "then 12"), (4, 494, "and no more yet")):
        growing = RECORD | {"blocks": blocks, "growing_blocks": 4, "growing_steps": n_growing}
        card = model_card.render(replace(trained, record=growing), "fp32")
        assert f"blocks: 4 in the first {n_growing} steps, {words}" in card


def test_a_card_says_how_long_training_took_and_its_looks(trained: Trained) -> None:
    """A record of an older version does not say how long the looks took."""
    for looked, words in (
        ({}, "1 min 38 s"),
        ({"looks_s": None}, "1 min 38 s"),
        ({"looks_s": 0.4}, "1 min 38 s"),
        ({"looks_s": 20.4}, "1 min 38 s, 20 s of"),
    ):
        card = model_card.render(replace(trained, record=RECORD | looked), "fp32")
        assert f"time: {words}" in card
        assert ("to look at the loss" in card) is words.endswith("of")


def test_losses_that_evaluate_took_later_are_shown(trained: Trained) -> None:
    assert trained.folder is not None
    losses = {"corpus/loss": 0.05, "corpus/loss_offset": 0.06}
    trained.folder.keep_losses(RECORD["weights_sha256"], losses)
    record = RECORD | {"corpus_loss": None, "corpus_loss_offset": None}
    assert "it knows it by heart" in model_card.render(replace(trained, record=record), "fp32")
    trained.folder.keep_losses("0" * 64, losses)
    assert "was not measured" in model_card.render(replace(trained, record=record), "fp32")


@pytest.mark.parametrize("origin", ["{", "[]", "{}", '{"text": {"name": "another", "sha256": "00", "n_bytes": 1}}'])
def test_a_text_whose_name_is_not_known_keeps_its_sum(trained: Trained, origin: str) -> None:
    assert trained.folder is not None
    trained.folder.origin.write_text(origin)
    card = model_card.render(trained, "fp32")
    assert "ab" * 32 in card
    assert "another" not in card
    assert "a-play" not in card


REPORT: dict[str, Any] = {
    "record": {"weights_sha256": "cd" * 32},
    "extraction": {
        "continuation": 50,
        "on_grid": [{"n_prompt": 8, "n": 100, "share": 0.81, "wilson_95": [0.722, 0.875]}],
        "anywhere": [
            {"n_prompt": 8, "n": 100, "share": 0.0, "wilson_95": [0.0, 0.037]},
            {"n_prompt": 128, "n": 50, "share": 0.5, "wilson_95": [0.4, 0.6]},
        ],
    },
    "predictions": [{"offset": 0, "exact_match": 0.986}, {"offset": 64, "exact_match": 0.237}],
    "samples": [
        {"trace": {"n_tokens": 100, "minimum": 12, "share": 0.5, "longest": {"length": 40}}},
        {"trace": {"n_tokens": 300, "minimum": 12, "share": 0.1, "longest": None}},
        {"title": "untraced"},
    ],
}


def test_what_the_report_measured_is_shown(trained: Trained) -> None:
    assert trained.folder is not None
    assert "`groundling report` on its run does" in model_card.render(trained, "fp32")
    write_json(trained.folder.path / "report.json", REPORT)
    card = model_card.render(trained, "fp32")
    assert "| 8 | 81.0 % of 100 (72.2 to 87.5) | 0 % of 100 (0.0 to 3.7) |" in card
    assert "| 128 | - | 50.0 % of 50 (40.0 to 60.0) |" in card
    assert "98.6 % of all predictions, on the grid" in card
    assert "23.7 % of all predictions, moved by 64 tokens" in card
    assert "Of 400 tokens that it wrote in 2 samples" in card
    assert "20.0 % stand word for word" in card  # (100 * 0.5 + 300 * 0.1) / 400


@pytest.mark.parametrize(
    "damage",
    [{"record": None}, {"record": {"weights_sha256": "of others"}}, {"extraction": {"on_grid": 5}}, {"samples": 3}],
)
def test_a_report_of_other_weights_or_a_damaged_one_is_none(trained: Trained, damage: dict[str, Any]) -> None:
    assert trained.folder is not None
    write_json(trained.folder.path / "report.json", REPORT | damage)
    assert "`groundling report` on its run does" in model_card.render(trained, "fp32")
    (trained.folder.path / "report.json").write_text("{")
    assert "`groundling report` on its run does" in model_card.render(trained, "fp32")


@pytest.mark.parametrize("words", HOSTILE)
def test_nothing_in_names_prompts_and_texts_breaks_the_card(trained: Trained, words: str) -> None:
    assert trained.folder is not None
    origin = {"text": {"name": words, "sha256": "ab" * 32, "n_bytes": 1, "n_documents": 1}}
    trained.folder.origin.write_text(json.dumps(origin))
    trained.folder.samples.write_bytes(f"--- {words}\n{words}".encode("utf-8", "surrogatepass"))
    record = RECORD | {
        "command": f"groundling {words}",
        "config": RECORD["config"] | {"prompts": [words]},
        "stop_reason": words,
        "versions": {words: words},
    }
    card = model_card.render(replace(trained, name=words, record=record), "fp32")
    card.encode("utf-8")
    plain = model_card.render(trained, "fp32")
    assert set(parsed(card).data.to_dict()) == set(parsed(plain).data.to_dict()), "no key is added or lost"
    assert [result.metric_value for result in parsed(card).data.eval_results] == [0.099, 4.558, 6.196]
    tokens, expected = (MarkdownIt("gfm-like", {"linkify": False}).parse(parsed(c).text) for c in (card, plain))
    assert [token.type for token in tokens] == [token.type for token in expected]
    inner, own = (
        {child.type for token in found for child in token.children or ()} - {"text", "softbreak", "text_special"}
        for found in (tokens, expected)
    )
    assert inner <= own, "no link, image or HTML but ours"
    sample, python, command = blocks(card)
    if "\ud800" not in words:  # a file of UTF-8 cannot hold it
        assert sample == model_card.printable("--- " + words + "\n" + words).rstrip("\n") + "\n"
    compile(python, "card", "exec")
    assert command.startswith("groundling")


@given(st.text() | st.text("`~ \n<*_a"))
def test_code_spans_and_blocks_hold_any_text(text: str) -> None:
    (token,) = (t for t in MarkdownIt().parse(model_card.code_block(text)) if t.type == "fence")
    assert token.content == (model_card.printable(text).rstrip("\n") + "\n")
    (inline,) = (t for t in MarkdownIt().parse(f"a {model_card.code_span(text)} b") if t.type == "inline")
    before, span, after = inline.children or ()
    assert (before.content, span.type, after.content) == ("a ", "code_inline", " b")
    assert span.content.strip() == " ".join(model_card.printable(text).split())
    heading = MarkdownIt().parse(f"# {model_card.in_markdown(text)}")
    assert {child.type for child in heading[1].children or ()} <= {"text", "text_special"}


def test_the_curve_is_put_beside_it(trained: Trained, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    model_card.write(trained, target, "fp32")
    assert (target / "loss.png").read_bytes() == b"a picture"
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (target / "README.md").read_text())
    assert pictures == ["loss.png"]
    assert trained.folder is not None
    trained.folder.curve.unlink()
    shutil.rmtree(target)
    target.mkdir()
    model_card.write(trained, target, "fp32")
    assert sorted(path.name for path in target.iterdir()) == ["README.md"]
    assert "![" not in (target / "README.md").read_text()
