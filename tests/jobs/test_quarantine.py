"""Bad rows: all in the table, a thousand in the marker, and every reader of them sees all."""

from pathlib import Path

from cluster.image_reading import BadRow
from cluster.storage import Storage
from jobs.quarantine import keep_bad, read_bad, told
from jobs.report_numbers import BadImage, StageRecord, _bad_images


def _bad(num_rows: int) -> list[BadRow]:
    return [BadRow(f"image-{index}", f"/{index}.png", "truncated") for index in range(num_rows)]


def test_the_marker_holds_the_first_thousand_and_the_table_all(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    stats = keep_bad(folder, "predict", {"num_images": 3, "num_bad": 1002, "bad": _bad(1002)})
    assert (stats["num_images"], stats["num_bad"], len(stats["bad"])) == (3, 1002, 1000)
    assert stats["bad"][999] == {"image_id": "image-999", "uri": "/999.png", "reason": "truncated"}
    table = read_bad(folder, stats)
    assert table.num_rows == 1002
    row = {"image_id": "image-1001", "uri": "/1001.png", "stage": "predict", "reason": "truncated"}
    assert table.slice(1001).to_pylist() == [row]
    lines = list(told(folder, stats))
    assert lines[0] == "  /0.png: truncated"
    assert lines[1000:] == [f"  and 2 more; {folder.uri('quarantine.parquet')} lists all"]


def test_no_bad_rows_and_stages_that_count_none(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    assert keep_bad(folder, "train", {"loss": 1.0}) == {"loss": 1.0}
    assert not folder.exists("quarantine.parquet")
    stats = keep_bad(folder, "predict", {"num_bad": 0, "bad": []})
    assert (read_bad(folder, stats).num_rows, list(told(folder, stats))) == (0, [])


def test_the_report_counts_the_whole_table_each_image_once_a_stage(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    records = []
    for round_index, num_bad in enumerate((1002, 1004)):
        folder = f"rounds/{round_index:02d}/features"
        stats = keep_bad(storage.child(folder), "extract_features", {"num_bad": num_bad, "bad": _bad(num_bad)})
        records.append(StageRecord("extract_features", round_index, folder, stats, "", ""))
    of_old = {"bad": [{"image_id": "image-0", "uri": "/0.png", "reason": "no CAM"}]}  # a marker without a table
    records.append(StageRecord("predict", None, "predictions", of_old, "", ""))
    shown, num_bad = _bad_images(storage, records, 2000)
    assert num_bad == len(shown) == 1005
    assert shown[1003:] == [
        BadImage("extract_features", "image-1003", "/1003.png", "truncated"),
        BadImage("predict", "image-0", "/0.png", "no CAM"),
    ]
    assert _bad_images(storage, records, 3) == (shown[:3], 1005)
