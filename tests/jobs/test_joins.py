"""The join keeps the order of the rows, carries lists, and leaves out what the other table lacks."""

import numpy as np
import pyarrow as pa

from jobs.joins import one_row_an_image, with_column


def test_join_by_hand() -> None:
    rows = pa.table({"image_id": ["c", "a", "x", "b"], "uri": ["3", "1", "9", "2"]})
    other = pa.table({"image_id": ["a", "b", "c", "d"], "cluster_ids": [[0], [1, 2], [], [3]]})
    joined = with_column(rows, other, "cluster_ids")
    assert joined.to_pydict() == {"image_id": ["c", "a", "b"], "uri": ["3", "1", "2"], "cluster_ids": [[], [0], [1, 2]]}


def test_nothing_in_common_is_an_empty_table() -> None:
    rows = pa.table({"image_id": ["a"]})
    other = pa.table({"image_id": pa.array([], pa.string()), "value": pa.array([], pa.int32())})
    assert with_column(rows, other, "value").num_rows == 0


def test_rows_of_an_image_become_one_by_hand() -> None:
    rows = pa.table(
        {
            "image_id": ["b", "a", "b", "c", "b"],
            "labels": [[7], [0], [2], [], [5]],
            "cluster_ids": [[1], [3], [0], [], [2]],
            "shares": [[[0.1, 0.9]], [[1.0, 0.0]], [[0.5, 0.5]], [], [[0.2, 0.8]]],
            "more": [1, 2, 3, 4, 5],
        }
    )
    joined = one_row_an_image(rows, ["cluster_ids", "shares"])
    assert joined.to_pydict() == {
        "image_id": ["b", "a", "c"],
        "labels": [[2, 5, 7], [0], []],
        "cluster_ids": [[0, 2, 1], [3], []],
        "shares": [[[0.5, 0.5], [0.2, 0.8], [0.1, 0.9]], [[1.0, 0.0]], []],
    }


def test_rows_that_are_one_an_image_stay() -> None:
    rows = pa.table({"image_id": ["b", "a"], "labels": [[7, 2], [0]], "cluster_ids": [[1, 0], [3]]})
    assert one_row_an_image(rows, ["cluster_ids"]).equals(rows)


def test_joining_agrees_with_the_plain_loop(rng: np.random.Generator) -> None:
    pairs = sorted({(f"i{image}", int(label)) for image, label in rng.integers(0, 40, (300, 2))})
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    columns = {
        "image_id": [image for image, _ in pairs],
        "labels": [[label] for _, label in pairs],
        "cluster_ids": [[label % 3] for _, label in pairs],
    }
    table = pa.table(columns)
    joined = one_row_an_image(pa.concat_tables([table.slice(0, 50), table.slice(50)]), ["cluster_ids"]).to_pylist()
    plain: dict[str, list[int]] = {}
    for image, label in pairs:
        plain.setdefault(image, []).append(label)
    expected = [
        {"image_id": image, "labels": sorted(own), "cluster_ids": [label % 3 for label in sorted(own)]}
        for image, own in plain.items()
    ]
    assert joined == expected
