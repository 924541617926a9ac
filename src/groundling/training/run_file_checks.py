"""What a run's own JSON and YAML may say: a folder may come from elsewhere, and its readers quote these values.

Invariant: what passes here has the kinds that a run writes, so that no reader asks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from groundling.generation.sampling import SamplingConfig

Kinds = Mapping[str, tuple[type, ...]]

NONE = type(None)
WHOLE, NUMBER, TEXT = (int,), (int, float), (str,)
MAX_NUMBER = 2**63
"""What no number in these files reaches, bytes of memory and operations a second among them."""

LOSSES = ("corpus_loss", "corpus_loss_offset", "heldout_loss")
"""None where they were not taken, and no number where the network gave none: readers ask `report.finite`."""

RECORD: Kinds = {
    **dict.fromkeys(("steps", "tokens_seen", "seed", "parameters", "window"), WHOLE),
    **dict.fromkeys(("passes", "wall_s", "evaluation_s"), NUMBER),
    **dict.fromkeys((*LOSSES, "tokens_per_s", "mfu", "goldfish_dropped"), (*NUMBER, NONE)),
    "n_seen": (int, NONE),
    **dict.fromkeys(("command", "device", "dtype", "stop_reason", "loss"), TEXT),
    **dict.fromkeys(("weights_sha256", "corpus_sha256", "tokenizer_sha256"), TEXT),
    **dict.fromkeys(("config", "machine", "versions"), (dict,)),
    "first_batch_below_target": (dict, NONE),
    "compiled": (bool,),
}
"""What a record holds, of all that is read again."""
SINCE: Kinds = {"looks_s": (*NUMBER, NONE)}
"""And what records of older versions do not."""
GROWN: Kinds = dict.fromkeys(("blocks", "growing_blocks", "growing_steps"), WHOLE)
"""And of a run that did not begin with all blocks."""
MACHINE: Kinds = {
    **dict.fromkeys(("cpu", "system"), TEXT),
    "gpu": (str, NONE),
    "threads": WHOLE,
    "memory_bytes": (int, NONE),
    "flags": (list,),
}

SETTINGS: Kinds = {"preset": TEXT, "text": (dict,)}
SETTINGS_MAY: Kinds = {
    **dict.fromkeys(("model", "windows", "objective", "optim", "schedule", "growth", "stopping", "sampling"), (dict,)),
    **dict.fromkeys(("checkpoint", "evaluation", "runtime", "logging"), (dict,)),
    "prompts": (list,),
}
"""Settings that an older version may not have had."""
SECTIONS: Mapping[str, Kinds] = {
    "text": {"sources": (list,)},
    "windows": {"order": TEXT},
    "objective": {"loss": TEXT},
    "stopping": {"target": (*NUMBER, NONE), "measure": TEXT},
    "sampling": {
        field.name: NUMBER if isinstance(field.default, float) else (list,) if field.name == "stop" else WHOLE
        for field in fields(SamplingConfig)
    },
}


def check_record(record: Mapping[str, Any]) -> None:
    """Raises ValueError if this is no whole record of a run (see `record.make_record`)."""
    _check(record, RECORD)
    _check(record, {name: kinds for name, kinds in SINCE.items() if name in record})
    if record.get("growing_steps"):
        _check(record, GROWN)
    _check(record["machine"], MACHINE, "machine.")
    _check_texts(record["machine"]["flags"], "flags")
    _check_texts(record["versions"].values(), "versions")
    if first := record["first_batch_below_target"]:
        _check(first, {"step": WHOLE, "loss": NUMBER}, "first_batch_below_target.")
    check_settings(record["config"])


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting that is read of a run again is not of the kind that it has in `RunConfig`."""
    _check(settings, SETTINGS)
    _check(settings, _present(SETTINGS_MAY, settings))
    for name, kinds in SECTIONS.items():
        section = settings.get(name, {})
        _check(section, _present(kinds, section), f"{name}.")
    if settings.get("stopping", {}).get("target"):
        _check(settings["stopping"], {"measure": TEXT}, "stopping.")
    _check_texts(settings["text"].get("sources", []), "sources")
    _check_texts(settings.get("sampling", {}).get("stop", []), "stop")
    _check_texts(settings.get("prompts", []), "prompts")


def check_losses(losses: Mapping[str, Any]) -> None:
    """Raises ValueError if these are not losses by name, in nats per token, None where one was not taken."""
    if not all(type(loss) in (float, NONE) for loss in losses.values()):
        raise ValueError("its losses are no numbers")


def _present(kinds: Kinds, values: Mapping[str, Any]) -> Kinds:
    return {name: kind for name, kind in kinds.items() if name in values}


def _check(values: Mapping[str, Any], kinds: Kinds, prefix: str = "") -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"it lacks {prefix}{name}")
        value = values[name]
        beyond = name not in LOSSES and type(value) in NUMBER and not 0 <= value < MAX_NUMBER
        if type(value) not in kind or beyond:
            raise ValueError(f"its {prefix}{name} is none that a run has")


def _check_texts(values: Any, name: str) -> None:
    if not all(type(value) is str for value in values):
        raise ValueError(f"its {name} are no texts")
