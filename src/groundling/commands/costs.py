"""What `train` and `estimate` say of a run's cost, and of what would cost less.

Invariant: nothing is promised but arithmetic: matrix operations, at the speed of those that were measured.
"""

from __future__ import annotations

from dataclasses import replace

from groundling import runtime
from groundling.commands.arguments import load_preset
from groundling.commands.session import with_vocabulary
from groundling.config import RunConfig, preset_names
from groundling.corpus.load import load_corpus
from groundling.corpus.shards import Tokens, occurring_ids
from groundling.errors import CorpusError
from groundling.training.estimate import Estimate
from groundling.training.flops import step_flops
from groundling.training.progress import clock

LONG_RUN_S = 3 * 3600
"""Estimates above this say what would finish sooner."""
LONG_BEFORE = 0.95
"""Share of a schedule after which what a limit cuts off of it is not worth a word."""
WORTH_SAVING = 0.05
"""Share of a step's FLOP; a head over fewer ids is advised from here on."""


def estimate_lines(estimate: Estimate, config: RunConfig, tokens: Tokens) -> list[str]:
    """What this run over these tokens will cost, what its limits cut off, and, if it takes more than three hours, what
    would finish sooner."""
    lines = [estimate.sentence(), *_limit_lines(estimate, config)]
    if estimate.total_s > LONG_RUN_S:
        sooner = [*_presets_sooner(estimate, config), *_head_sooner(estimate, config, tokens)]
        advice = f"; sooner: {', '.join(sooner)}" if sooner else ""
        lines.append(f"warning: this is more than {clock(LONG_RUN_S)}{advice}; going on")
    return lines


def _limit_lines(estimate: Estimate, config: RunConfig) -> list[str]:
    """A warning if the run is over long before its schedule: its rate is high then, and blocks may not have joined."""
    n_steps, expected_steps, stopping = estimate.n_steps, estimate.expected_steps, config.stopping
    if n_steps > LONG_BEFORE * min(expected_steps, estimate.total_steps):
        return []
    by_steps = stopping.max_steps is not None and n_steps >= stopping.max_steps
    limit = f"--max-steps {stopping.max_steps:,}" if by_steps else f"--max-minutes {stopping.max_minutes:g}"
    return [
        f"warning: {limit} ends this run after about {n_steps:,} of its {expected_steps:,} steps; for a schedule that"
        f" is over by then, give --schedule.total_steps {max(1, estimate.schedule_steps)}"
    ]


def _presets_sooner(estimate: Estimate, config: RunConfig) -> list[str]:
    """Presets that would finish sooner, each on its own text: there is nothing to say of them where that is another."""
    if config.text != load_preset(config.preset).text:
        return []
    sooner = []
    for name in preset_names():
        preset = load_preset(name)
        try:
            corpus = load_corpus(preset.text, runtime.cache_dir())
        except (CorpusError, OSError):  # its text cannot be had here: the run that goes on does not need it
            continue
        preset = with_vocabulary(preset, corpus)
        seconds = run_flops(preset, corpus.train.n_tokens) / estimate.achieved_flops
        if name != config.preset and seconds < estimate.train_s:
            sooner.append(f"--preset {name} (about {clock(seconds)})")
    return sooner


def _head_sooner(estimate: Estimate, config: RunConfig, tokens: Tokens) -> list[str]:
    """A head over the seen ids, where that saves something of a run which no limit ends."""
    if config.head_vocabulary != "full" or config.init or estimate.n_steps < estimate.expected_steps:
        return []
    n_rows = len(occurring_ids(tokens, config.model.n_vocab)) + 1
    seen = replace(config, model=replace(config.model, n_vocab=n_rows))
    left = run_flops(seen, len(tokens)) / run_flops(config, len(tokens))
    return [f"--head-vocabulary seen (about {clock(left * estimate.train_s)})"] if 1 - left >= WORTH_SAVING else []


def run_flops(config: RunConfig, n_tokens: int) -> float:
    """Matrix FLOP that a run is expected to spend on a text of so many tokens."""
    total_steps = config.recipe.total_steps(n_tokens)
    growth = config.recipe.planned_growth(config.model, total_steps)
    of_step = step_flops(config.model, config.windows, config.optim, config.windows.mean_length)
    return growth.whole_steps(0, config.stopping.expected(total_steps)) * of_step
