"""`groundling report` as a user meets it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundling.cli import main
from groundling.commands import evaluate
from groundling.commands import report as report_command
from groundling.commands.reciting import marked
from groundling.commands.tracing import Tracer
from groundling.evaluation.report import percent, verdict_words

from .bottles import TEXT, train

SCRIPT = "<script>alert(\"bottles\")</script> & <b title='x'>\n"
VOID = {"meta", "br", "hr", "img", "input", "link"}
SECTIONS = {"losses", "training", "extraction", "predictions", "samples", "configuration"}


class Page(HTMLParser):
    """A page's tags, ids, links and text; fails if tags do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = {name: value or "" for name, value in attrs}
        assert not [name for name in values if name.startswith("on")], values
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["aria-label"]] if tag == "svg" else []
        self.links += [value for name, value in values.items() if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def report(run: Path, *arguments: str) -> tuple[Page, dict[str, Any]]:
    out = run / "report.html"
    assert main(["report", str(run), *arguments]) == 0
    return Page(out), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(run: Path) -> tuple[Page, dict[str, Any]]:
    """Of a finished run with held-out text."""
    return report(run, "--positions", "20")


@pytest.fixture(scope="module")
def scripted(workplace: Path) -> Path:
    """A goldfish run whose text and prompts hold markup, without held-out text; a window holds a continuation."""
    (workplace / "scripts.txt").write_text(SCRIPT + TEXT + SCRIPT)
    arguments = train("--model.n_ctx", "64", "--windows.length", "64", "--loss", "goldfish", "--max-steps", "3")
    arguments[2] = "scripts.txt"
    assert main([*arguments, f"--prompts={json.dumps([SCRIPT, ''])}", "--out", "runs/scripted"]) == 0
    return workplace / "runs" / "scripted"


def test_the_page_is_whole_and_alone(whole: tuple[Page, dict[str, Any]]) -> None:
    page, _ = whole
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == len(page.labels) == 3
    assert all(label and "None" not in label for label in page.labels)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", page.source)
    assert 'name="viewport"' in page.source
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source


def test_the_page_says_what_the_figures_say(whole: tuple[Page, dict[str, Any]], run: Path) -> None:
    page, facts = whole
    record = json.loads((run / "record.json").read_text())
    losses = {loss["name"]: loss["value"] for loss in facts["losses"]}
    assert losses == {
        name: record[name.replace("/", "_")] for name in ("corpus/loss", "corpus/loss_offset", "heldout/loss")
    }
    assert all(f"{value:.4f}" in page.text for value in losses.values())
    assert "Not known on the grid (target 0.099999)" in page.text
    assert facts["predictions"][0]["loss"] == pytest.approx(record["corpus_loss"], rel=1e-4)
    assert len(facts["predictions"][0]["loss_by_position"]) == 32
    assert [found["offset"] for found in facts["predictions"]] == [0, 16]
    assert all(percent(found["exact_match"]) in page.text for found in facts["predictions"])
    extraction = facts["extraction"]
    assert extraction["on_grid"] == []  # 50 tokens and a prompt do not fit a window of 32
    assert {row["n"] for row in extraction["anywhere"]} == {20}
    assert "8, 16, 32, 64, 128 or 256 tokens do not fit one window" in page.text
    assert record["weights_sha256"] in page.text
    assert record["machine"]["system"] in page.text
    assert "stopping:" in page.text  # the configuration
    assert facts["missing"] == []


def test_markup_in_texts_and_prompts_is_text(scripted: Path) -> None:
    page, facts = report(scripted, "--quick")
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert page.text.count(SCRIPT.strip()) >= 3  # the text's beginning, and the prompt twice
    assert facts["samples"][0]["prompt"].startswith("<script>")
    assert "Goldfish loss" in page.text
    assert (
        facts["goldfish"]["never_trained"]["n"] + facts["goldfish"]["trained"]["n"]
        == (facts["predictions"][0]["n_predictions"])
    )
    assert facts["verdict"]["headline"] == "Not meant to be memorised"
    assert [row["n_prompt"] for row in facts["extraction"]["on_grid"]] == [8]
    assert "No text was held out" in page.text
    assert "heldout/loss" not in [loss["name"] for loss in facts["losses"]]


@pytest.mark.parametrize(
    ("lost", "sentence", "without"),
    [
        ("record.json", "The run has no record.json", set()),
        ("metrics.jsonl", "there is no training curve", {"training"}),
        ("config.yaml", "no config.yaml that can be read", set()),
        ("train.bin", "Nothing could be measured on the training text", {"extraction", "predictions"}),
        ("origin.json", "Nothing could be measured on the training text", {"extraction", "predictions"}),
        ("heldout.bin", "", set()),
    ],
)
def test_what_is_missing_is_said(run: Path, tmp_path: Path, lost: str, sentence: str, without: set[str]) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(lost, "report.*", ".lock"))
    page, facts = report(tmp_path / "run", "--quick")
    assert sentence in page.text
    assert SECTIONS - set(page.ids) == without
    assert "None" not in page.text
    assert facts["samples"]


def test_a_run_without_anything_but_its_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    page, facts = report(tmp_path / "run", "--quick")
    assert set(page.ids) & SECTIONS == {"losses", "samples", "configuration"}
    assert facts["verdict"]["headline"] == "Not measured yet"
    assert len(facts["missing"]) >= 4


def test_checkpoints_may_lie_on_another_disk(run: Path, tmp_path: Path) -> None:
    """A link to them, whatever their folder is called there, leaves them the run's."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    page, facts = report(tmp_path / "run", "--quick")
    assert set(page.ids) >= SECTIONS
    assert facts["run"] == "run"


def test_a_run_at_work_may_remove_the_checkpoint_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is measured of it is printed and kept all the same."""

    def remove(*_: object) -> list[Any]:
        shutil.rmtree(copy / "checkpoints")
        return []

    copy = tmp_path / "run"
    for name in ("check_gpu_memory", "samples_of"):
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".lock"), dirs_exist_ok=True)
        monkeypatch.setattr(evaluate if name == "check_gpu_memory" else report_command, name, remove)
        assert main(["evaluate" if name == "check_gpu_memory" else "report", str(copy)]) == 0
    assert "corpus/loss_offset" in capsys.readouterr().out
    assert (copy / "evaluated.json").exists()
    assert (copy / "report.json").exists()


def test_a_checkpoint_that_lies_alone_has_no_other_folder_for_its_run(run: Path, tmp_path: Path) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    alone = tmp_path / "deep" / "alone"
    shutil.copytree(checkpoint, alone)
    assert main(["report", str(alone), "--quick"]) == 0
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [
        "alone",
        "report-alone.html",
        "report-alone.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_share_is_none_or_all_only_if_it_is() -> None:
    space = "\N{NO-BREAK SPACE}"
    shown = {0: "0", 1e-6: f"<{space}0.01", 0.0005: "0.05", 0.5: "50.0", 0.99951: "99.95", 0.999999: "99.99", 1: "100"}
    assert {share: percent(share) for share in shown} == {share: f"{text}{space}%" for share, text in shown.items()}


def test_the_record_of_other_weights_is_not_used(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.*"))
    record = json.loads((run / "record.json").read_text()) | {"weights_sha256": "0" * 64, "corpus_loss": 123.0}
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    page, facts = report(tmp_path / "run", "--quick")
    assert "is of other weights" in page.text
    assert facts["record"] is None
    assert facts["losses"][0]["value"] < 100  # what metrics.jsonl has for these weights


def test_losses_that_evaluate_took_are_shown(run: Path, tmp_path: Path) -> None:
    """As for a checkpoint of an interrupted run, which has no losses over the whole text of its own."""
    folder = tmp_path / "run"
    shutil.copytree(
        run, folder, ignore=shutil.ignore_patterns("report.*", "record.json", "metrics.jsonl", "evaluated*")
    )
    assert main(["evaluate", str(folder)]) == 0
    _, facts = report(folder, "--quick")
    recorded = json.loads((run / "record.json").read_text())
    values = {loss["name"]: loss["value"] for loss in facts["losses"]}
    assert values["corpus/loss_offset"] == pytest.approx(recorded["corpus_loss_offset"], rel=1e-5)
    assert values["heldout/loss"] == pytest.approx(recorded["heldout_loss"], rel=1e-5)
    kept = json.loads((folder / "evaluated.json").read_text())
    (folder / "evaluated.json").write_text(json.dumps(kept | {"weights_sha256": "0" * 64}))
    page, _ = report(folder, "--quick")
    assert "corpus/loss_offset was not taken" in page.text  # those were of other weights


@pytest.mark.parametrize("cut", [0, 1])
def test_damaged_files_are_left_out(run: Path, tmp_path: Path, cut: int) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.*"))
    for name, content in (("record.json", "[]"), ("metrics.jsonl", "no JSON\n"), ("config.yaml", "- a list")):
        (tmp_path / "run" / name).write_text(content)
    damaged = bytearray((tmp_path / "run" / "train.bin").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "run" / "train.bin").write_bytes(damaged[: len(damaged) - cut])
    page, facts = report(tmp_path / "run", "--quick")
    assert "train.bin is damaged" in page.text
    assert "tokens" not in facts["summary"]
    assert "record.json cannot be read" in page.text
    assert set(page.ids) & SECTIONS == {"losses", "samples", "configuration"}
    assert facts["record"] is None


def test_a_checkpoint_has_a_page_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    before = sorted(checkpoint.iterdir())
    assert main(["report", str(checkpoint), "--quick"]) == 0
    assert (run / f"report-{checkpoint.name}.html").exists()
    assert sorted(checkpoint.iterdir()) == before
    assert f"report-{checkpoint.name}.html" in capsys.readouterr().err


def test_every_copied_token_is_marked_once(run: Path) -> None:
    tracer = Tracer.of_run(run)
    copied = "27 green bottles, hanging on the wall;\nand if one should fall, 26.\n"
    ids = tracer.tokenizer.encode("é?" + copied + "Ø" + copied)
    for minimum in (1, 5, 12):
        trace = tracer.trace(ids, n_prompt=1, minimum=minimum)
        pieces, sources = marked(trace)
        assert "".join(piece.text for piece in pieces) == tracer.tokenizer.decode(ids)
        assert [piece.number for piece in pieces if piece.number] == list(range(1, len(sources) + 1))
        assert all(piece.title == sources[piece.number - 1] for piece in pieces if piece.number)
        shown = sum(len(piece.text.encode()) for piece in pieces if piece.number)
        covered = [token for token, length in zip(ids[1:], trace.copies.covered, strict=True) if length >= minimum]
        assert shown == len(tracer.tokenizer.decode_bytes(covered))
    assert any("bottles.txt, line 27" in source for source in sources)


def test_where_spans_overlap_the_longest_is_marked(run: Path) -> None:
    tracer = Tracer.of_run(run)
    # Two passages of the text, of which the end of one is the beginning of the other.
    ids = tracer.tokenizer.encode("green bottles, hanging on the wall;\nand if one should fall, 26.\n31 green bottles")
    trace = tracer.trace(ids, minimum=1)
    starts = [span.start for span in trace.copies.spans]
    assert any(span.stop > start > span.start for span in trace.copies.spans for start in starts)
    pieces, _ = marked(trace)
    of_each_byte = [int(piece.title.split()[0]) if piece.number else 0 for piece in pieces for _ in piece.text]
    sizes = [len(tracer.tokenizer.decode_bytes([token])) for token in ids]
    assert of_each_byte == np.repeat(trace.copies.covered, sizes).tolist()


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.05, 0.06, 0.1), "Known by heart"),
        ((0.05, 4.0, 0.1), "Known on the grid, not by heart"),
        ((0.05, None, 0.1), "Known on the grid"),
        ((0.15, 4.0, 0.1), "Not known, not even on the grid"),
        ((0.15, 0.06, 0.1), "Known by heart, on average"),
        ((0.05, 0.06, 0.0), "No target was set"),
        ((None, 0.06, 0.1), "Known by heart"),  # a run that stops on it takes no other
        ((None, 4.0, 0.1), "Not known by heart"),
        ((None, 0.06, 0.0), "No target was set"),
        ((None, None, 0.1), "Not measured yet"),
    ],
)
def test_the_verdict_is_plain(losses: tuple[float | None, float | None, float], words: str) -> None:
    assert verdict_words(*losses, goldfish=False)[0] == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/nowhere"], "runs/nowhere"),
        (["runs/bottles", "--positions", "0"], "--positions"),
        (["runs/bottles", "--out", "report.pdf"], ".html"),
        (["runs/bottles", "--out", "folder.html"], "is a folder"),
        (["runs/bottles", "--out", "runs/bottles/record.html"], "runs/bottles/record.json"),
        (["runs/bottles", "--out", "bottles.txt/report.html"], "is a file"),
        (["runs/bottles", "--out", "mine.html"], "mine.html is there already"),
    ],
)
def test_wrong_input_gets_one_sentence(
    workplace: Path, run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.html").mkdir(exist_ok=True)
    Path("mine.html").write_text("a page of the user's own")
    assert main(["report", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("groundling: ")
    assert words in message
