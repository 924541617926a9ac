"""What the served page says of a model: its title, its examples, its training text and its run.

Invariant: what the run's folder does not hold is left out or said in a sentence; it never keeps the API from serving.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from groundling.commands.model_options import OpenRun
from groundling.commands.saying import say
from groundling.corpus.plays import play_names, play_title
from groundling.corpus.sources import packaged_names
from groundling.errors import CheckpointError, CorpusError

if TYPE_CHECKING:
    from groundling.serving.demo import Example, Subject

N_BEGINNING = 12
"""Tokens of the text's beginning that are an example: enough to call up what follows, where it is known on the grid."""
MAX_EXAMPLES = 24
MAX_EXAMPLE_CHARACTERS = 200
"""Longer prompts are no buttons."""


def subject_of(run: OpenRun, name: str) -> Subject:
    """The page's subject. Needs Gradio."""
    from groundling.serving.copy_meter import CopyMeter
    from groundling.serving.demo import Subject
    from groundling.serving.run_tab import NOT_A_RUN, run_html

    sources, prompts = _settings(run)
    n_parameters = run.model.config.n_parameters()
    size = f"{n_parameters / 1e6:.3g} million" if n_parameters >= 1e6 else f"{n_parameters:,}"
    sentence = f"A GPT-2 with {size} parameters."
    if run.folder.exists():
        text = ", ".join(_titles(sources)) or "one text"
        sentence = (
            f"{sentence[:-1]}, trained{_how(run)} on {text}, with Groundling. What it writes may be that text, word for"
            " word."
        )
    meter, no_meter = None, ""
    try:
        tracer = run.tracer
        meter = CopyMeter(tracer.array, tracer.places, tracer.tokenizer)
    except (CheckpointError, CorpusError) as error:
        if run.folder.exists():
            say(f"note: no copy meter: {error}")
        no_meter = "There is no copy meter here: the training text is damaged, or not beside these weights."
    run_part = run_html(run.folder, run.checkpoint) if run.folder.exists() else f"<p>{NOT_A_RUN}</p>"
    examples = _examples(sources, [*_beginning(run), *prompts])
    return Subject(name, sentence, examples, meter, no_meter, run_part)


def _how(run: OpenRun) -> str:
    """Whether its weights were drawn, as far as the folder still tells it."""
    try:
        return " further" if run.folder.initial_sum() else " from scratch"
    except CheckpointError:
        return ""


def _beginning(run: OpenRun) -> list[str]:
    """The first words of the training text; none if it is gone."""
    try:
        train = run.folder.tokens("train", run.tokenizer.n_vocab)
    except CorpusError:
        return []
    first = [] if train is None else [int(token) for token in train.tokens[:N_BEGINNING]]
    text = run.tokenizer.decode(run.tokenizer.first_document(first))
    return [text] if text and "\N{REPLACEMENT CHARACTER}" not in text else []


def _titles(sources: list[str]) -> list[str]:
    """The names of texts as a reader knows them: plays by their titles, files without their folders."""
    plays = play_names()
    return [play_title(source) if source in plays else Path(source).name for source in sources]


def _settings(run: OpenRun) -> tuple[list[str], list[str]]:
    """The sources of the text and the prompts that the run's settings name; none if it has no settings."""
    try:
        settings = run.folder.settings()
    except CheckpointError:
        return [], []
    sources, prompts = (settings.get("text") or {}).get("sources"), settings.get("prompts")
    return [str(source) for source in sources or []], [str(prompt) for prompt in prompts or []]


def _examples(sources: list[str], prompts: list[str]) -> list[Example]:
    """The run's own prompts; those of the reference's demo too, if the text is Shakespeare's."""
    from groundling.serving.demo import SHAKESPEARE, Example

    shakespeare = SHAKESPEARE if sources and set(sources) <= set(packaged_names()) else []
    taken = {example.prompt for example in shakespeare}
    own = [Example(prompt) for prompt in dict.fromkeys(prompts) if prompt.strip() and prompt not in taken]
    return [each for each in [*own, *shakespeare] if len(each.prompt) <= MAX_EXAMPLE_CHARACTERS][:MAX_EXAMPLES]
