"""What is said of a run before it begins or goes on: what its settings do, what does nothing, what would do better.

Invariant: nothing here changes a run; functions named `_lines` give sentences, none where there is nothing to say.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from groundling.commands.arguments import LISTS, SHORTCUTS, load_preset
from groundling.commands.initial import FROM_INIT
from groundling.config import RunConfig
from groundling.corpus.goldfish import PLAIN, dropped_share
from groundling.corpus.load import Corpus, is_token_file
from groundling.model.compact import CompactGPT2
from groundling.model.gpt2 import GPTConfig
from groundling.optim.schedule import warmup
from groundling.runtime import Runtime
from groundling.training.flops import flops_per_token
from groundling.training.run_folder import RunFolder

FEW_STEPS = 30
"""Of a schedule; a page was learned in 38 (docs/training.md), and no text in fewer than these."""
SHORT_PASSES, SHORT_STEPS = 60, 100
"""Schedule advised for short texts: so many passes, and so many steps at least. Texts of 320 and 560 tokens were known
on the grid after 57 and 38 steps of preset penny with such schedules (LOG.md)."""
TUNING_PEAK = 1e-4
"""A twentieth of what presets have for random weights: a choice (docs/import.md)."""
SHORT_TOKENIZER = "train:320"
"""257 ids are bytes and `<|endoftext|>`, so this asks for 63 merges, which a paragraph gives."""


def short_text_lines(config: RunConfig, n_tokens: int) -> list[str]:
    """A warning if the schedule has fewer steps than any run on record needed: it was made for a longer text."""
    n_steps = config.recipe.total_steps(n_tokens)
    if n_steps >= FEW_STEPS:
        return []
    windows = load_preset("penny").windows
    passes = max(SHORT_PASSES, math.ceil(SHORT_STEPS * windows.batch_size * windows.length / n_tokens))
    # The tokens of a token file are those of its tokenizer.
    tokenizer = config.text.tokenizer if any(map(is_token_file, config.text.sources)) else SHORT_TOKENIZER
    advice = (
        f"a small model with more passes would: groundling train --preset penny --corpus"
        f" {shlex.join(config.text.sources)} --tokenizer {shlex.quote(tokenizer)} --schedule.passes {passes}"
    )
    if tokenizer == FROM_INIT:  # which no other model has
        advice = "give more passes (--schedule.passes)"
    return [
        f"warning: for a text of {n_tokens:,} tokens this schedule has {n_steps:,} steps, and in fewer than {FEW_STEPS}"
        f" it will hardly be learned; {advice}"
    ]


def initial_lines(config: RunConfig) -> list[str]:
    """A warning if trained weights are to go on at a rate that is for random ones."""
    if not config.init or config.schedule.peak != load_preset(config.preset).schedule.peak:
        return []
    return [
        f"warning: schedule.peak {config.schedule.peak:g} is preset {config.preset}'s, for random weights, and what"
        f" {config.init} knows may be lost at it: give a lower one, such as --schedule.peak {TUNING_PEAK:g}"
    ]


def objective_lines(config: RunConfig, corpus: Corpus) -> list[str]:
    """What goldfish loss leaves out of this text, and which settings do nothing with the loss that was chosen."""
    objective, stopping = config.objective, config.stopping
    if objective.loss == "plain":
        if objective == PLAIN:
            return []
        return ["warning: objective.drop_every and objective.context are not used: give --loss goldfish"]
    share = dropped_share(corpus.train.tokens, objective)
    target = f"; stopping.target {stopping.target} is not used" if stopping.target else ""
    return [f"loss: {objective}: {100 * share:.1f} % dropped; the run ends with its schedule, at any loss{target}"]


def unused_lines(config: RunConfig, typed: Sequence[str], n_tokens: int) -> list[str]:
    """A warning for each setting that was typed and that another setting leaves without effect."""
    schedule, stopping = config.schedule, config.stopping
    n_steps = config.recipe.total_steps(n_tokens)
    endless = not stopping.target and "without a target a run ends with its schedule"
    level = schedule.decay == "constant" and "schedule.decay is constant, so the rate stays at its peak"
    growth, whole = config.growth, config.init and f"{config.init} begins with all its blocks"
    idle = {
        "schedule.passes": schedule.total_steps is not None
        and f"schedule.total_steps is {schedule.total_steps:,} (null counts passes)",
        "optim.momentum": config.optim.kind == "adamw" and "optim.kind is adamw, which has beta1 and beta2",
        "optim.last_block_share": config.optim.kind == "adamw" and "optim.kind is adamw, of one rate for all blocks",
        "optim.turns": config.optim.kind == "adamw" and "optim.kind is adamw, which moves all blocks in each step",
        "schedule.hold_fraction": level,
        "schedule.floor_fraction": level,
        "stopping.measure": endless,
        "stopping.overtime": endless or (schedule.ends_at_zero and "the rate is zero at the end of the schedule"),
        "stopping.expected_steps": endless,
        "stopping.heldout_every": not stopping.patience and "heldout/loss is taken during a run for stopping.patience",
        "initial_positions": config.init and f"the position table is that of {config.init}",
        "growth.every": whole or (not growth.fraction and "growth.fraction is 0, so all blocks take part at once"),
        "growth.fraction": whole or (growth.every == 1 and "growth.every is 1, so all blocks take part at once"),
    }
    flags = [word.partition("=")[0].removeprefix("--") for word in typed if word.startswith("--")]
    settings = [SHORTCUTS.get(flag, flag) for flag in flags]
    lines = [f"warning: {name} is not used: {why}" for name, why in idle.items() if why and name in settings]
    lines += [
        f"warning: {name} was given {n} times, and the last counts: name all texts after one flag"
        for name in LISTS
        if (n := settings.count(name)) > 1
    ]
    if "schedule.warmup_steps" in settings and (n_warmup := warmup(schedule, n_steps)) < schedule.warmup_steps:
        lines.append(
            f"warning: schedule.warmup_steps {schedule.warmup_steps:,} is cut to {n_warmup:,}, a quarter of the"
            f" schedule's {n_steps:,} steps"
        )
    return lines


def head_line(model: CompactGPT2, config: RunConfig) -> str:
    """What a head over the seen ids is over, and what it saves, in a sentence."""
    return (
        f"head: {model.n_seen:,} ids occur in the text, the other {model.n_unseen:,} share one row:"
        f" {100 * _saved_share(model.config, config):.0f} % fewer FLOP a token in matrix products, losses over all ids"
    )


def _saved_share(computed: GPTConfig, config: RunConfig) -> float:
    """The share of a token's FLOP that a network of another size saves."""
    window = config.windows.mean_length
    return 1 - flops_per_token(computed, window) / flops_per_token(config.model, window)


def changes_lines(folder: RunFolder, config: RunConfig, runtime: Runtime) -> list[str]:
    """A warning for each setting with which the losses of a resumed run can leave those of an uninterrupted one."""
    before, now = folder.settings(), config.as_dict()
    defaults = RunConfig().as_dict()  # which an older version had for settings that it did not know
    lines = [
        f"warning: {section}.{name} was {was} and is {value} now"
        for section in ("windows", "optim", "schedule", "growth")
        for name, value in now[section].items()
        if (was := before.get(section, {}).get(name, defaults[section][name])) != value
    ]
    if any(" growth." in line for line in lines):
        lines.append("warning: blocks that have joined stay, and no others wait than did so at first")
    if (was := before.get("seed", defaults["seed"])) != now["seed"]:
        lines.append(f"warning: seed was {was} and is {now['seed']} now")
    facts = runtime.facts()
    for what, choice in folder.runtime().items():
        if facts.get(what, choice) != choice:
            lines.append(f"warning: {what} was {choice} and is {facts[what]} now")
    return lines
