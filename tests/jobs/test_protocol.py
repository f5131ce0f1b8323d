"""How a number was taken: the same fields for every number, and the table by hand."""

import dataclasses

from cluster.storage import Storage
from jobs.protocol import Protocol, protocol_markdown
from jobs.results import results_tables
from subcat_core.crf import CrfSettings


def _protocol(**changes: object) -> Protocol:
    values = {
        "supervision": "image tags",
        "masks": "VOC's own",
        "tags": "not used",
        "threshold": "none",
        "crf": None,
        "scales": (1.0, 0.5),
        "flip": True,
        "base_px": None,
        "weights": "none",
        "rng_seed": 3,
    }
    return Protocol(**{**values, **changes})  # type: ignore[arg-type]


def test_json_by_hand() -> None:
    values = _protocol(details={"min_confidence": 0.7}).to_json()
    assert list(values)[-1] == "min_confidence"
    assert (values["crf"], values["scales"], values["rng_seed"]) == ("no", [1.0, 0.5], 3)
    assert _protocol(crf=CrfSettings()).to_json()["crf"]["iterations"] == CrfSettings().iterations


def test_table_by_hand() -> None:
    table = protocol_markdown({"CAM": {"flip": True, "base_px": None, "rng_seed": 1}, "segmenter": {"crf": "a|b"}})
    assert table.splitlines() == [
        "| protocol | CAM | segmenter |",
        "|---|---|---|",
        "| flip | yes |  |",
        "| base px | its own size |  |",
        "| crf |  | a\\|b |",
    ]


def test_every_number_of_a_run_carries_every_field(finished_run: str) -> None:
    storage = Storage(finished_run)
    fields = {field.name for field in dataclasses.fields(Protocol)} - {"details"}
    for folder in ("rounds/00/cams", "rounds/01/cams", "pseudo_masks", "evaluation"):
        protocol = storage.read_json(f"{folder}/scores.json")["protocol"]
        assert fields <= set(protocol), folder
    table = results_tables([finished_run])
    assert "| protocol | CAM | pseudo masks | segmenter |" in table
    assert "| supervision | image tags | image tags | image tags |" in table
