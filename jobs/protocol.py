"""Protocol, how a number was taken: every stage that scores fills in the same fields, and tables print them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from subcat_core.crf import CrfSettings

TAGS = "image tags"
"""supervision of everything but the yardstick that full masks train."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What must be known before two numbers may be compared; the split and its images stand with each number.

    supervision: what the numbers' maker was trained on. masks: which masks it is scored on. tags: whether the images'
    tags helped at test time. threshold: how a class wins a pixel. crf: the settings, or None. scales, flip, base_px:
    the views that were looked at. weights: what training started from. details: further keys of this kind of number.
    """

    supervision: str
    masks: str
    tags: str
    threshold: str
    crf: CrfSettings | None
    scales: tuple[float, ...]
    flip: bool
    base_px: int | None
    weights: str
    rng_seed: int
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values in the order of the fields; the details come last."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["details"]
        values["crf"] = "no" if self.crf is None else self.crf.model_dump(mode="json")
        values["scales"] = list(self.scales)
        return {**values, **self.details}


def protocol_markdown(protocols: Mapping[str, Mapping[str, Any]]) -> str:
    """Stored protocols as a Markdown table: one column a number, one row a field; rng_seed has its own columns."""
    keys = list(dict.fromkeys(key for protocol in protocols.values() for key in protocol if key != "rng_seed"))
    rows = [f"| protocol | {' | '.join(protocols)} |", "|---" * (len(protocols) + 1) + "|"]
    for key in keys:
        cells = (field_text(protocol[key]) if key in protocol else "" for protocol in protocols.values())
        rows.append(f"| {key.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(rows)


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """A stored protocol as one line without its rng_seed: the same line where numbers may be compared."""
    kept = {key.replace("_", " "): field_text(value) for key, value in protocol.items() if key != "rng_seed"}
    return "; ".join(f"{key}: {text}" for key, text in kept.items())


def field_text(value: Any) -> str:
    """A value of a stored protocol as text for a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {field_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(field_text(inner) for inner in value)
    return "its own size" if value is None else str(value).replace("|", "\\|")
