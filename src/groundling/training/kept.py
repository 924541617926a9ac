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

RECORD: Kinds = {
    **dict.fromkeys(("steps", "tokens_seen", "seed", "parameters", "window"), WHOLE),
    **dict.fromkeys(("passes", "wall_s"), NUMBER),
    **dict.fromkeys(("command", "device", "dtype", "stop_reason"), TEXT),
    **dict.fromkeys(("weights_sha256", "corpus_sha256", "tokenizer_sha256"), TEXT),
    **dict.fromkeys(("config", "machine", "versions"), (dict,)),
    "compiled": (bool,),
}
"""Values of a record that each has."""
RECORD_MAY: Kinds = {
    **dict.fromkeys(("corpus_loss", "corpus_loss_offset", "heldout_loss", "mfu", "goldfish_dropped"), (*NUMBER, NONE)),
    **dict.fromkeys(("tokens_per_s", "evaluation_s"), (*NUMBER, NONE)),
    "n_seen": (int, NONE),
    "loss": TEXT,
    "first_batch_below_target": (dict, NONE),
}
MACHINE: Kinds = {"cpu": TEXT, "threads": WHOLE}
MACHINE_MAY: Kinds = {"gpu": (str, NONE), "memory_bytes": (int, NONE), "flags": (list,), "system": TEXT}

SETTINGS: Kinds = {
    **dict.fromkeys(("text", "windows", "objective", "stopping", "sampling"), (dict,)),
    "prompts": (list,),
}
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
    _check(record, RECORD, RECORD_MAY)
    _check(record["machine"], MACHINE, MACHINE_MAY)
    _check_texts(record["machine"].get("flags", []), "flags")
    _check_texts(record["versions"].values(), "versions")
    if first := record.get("first_batch_below_target"):
        _check(first, {"step": WHOLE, "loss": NUMBER})
    check_settings(record["config"])


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting that is read of a run again is not of the kind that it has in `RunConfig`."""
    _check(settings, {}, SETTINGS)
    for name, kinds in SECTIONS.items():
        _check(settings.get(name, {}), {}, kinds)
    stopping = settings.get("stopping", {})
    if stopping.get("target"):
        _check(stopping, {"measure": TEXT})
    _check_texts(settings.get("text", {}).get("sources", []), "sources")
    _check_texts(settings.get("sampling", {}).get("stop", []), "stop")
    _check_texts(settings.get("prompts", []), "prompts")


def check_losses(losses: Mapping[str, Any]) -> None:
    """Raises ValueError if these are not losses by name, in nats per token, None where one was not taken."""
    _check(losses, dict.fromkeys(losses, (*NUMBER, NONE)))


def _check(values: Mapping[str, Any], needed: Kinds, optional: Kinds | None = None) -> None:
    for name in needed:
        if name not in values:
            raise ValueError(f"it lacks {name}")
    for name, kinds in {**needed, **(optional or {})}.items():
        if name in values:
            value = values[name]
            numeric = type(value) in NUMBER and not 0 <= value < float("inf")
            if type(value) not in kinds or numeric:
                raise ValueError(f"its {name} is none that a run has")


def _check_texts(values: Any, name: str) -> None:
    if not all(type(value) is str for value in values):
        raise ValueError(f"its {name} are no texts")
