"""The pyarrow schemas of every table that stages exchange; all of them join on image_id."""

import pyarrow as pa

LABELS = pa.list_(pa.int32())

MANIFEST = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("height_px", pa.int32()),
        pa.field("width_px", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("labels", LABELS),  # class_index, ascending; null or empty where the tags are not known
        pa.field("mask_uri", pa.string()),
        pa.field("parent_id", pa.string()),  # tiles only
        pa.field("x_px", pa.int32()),
        pa.field("y_px", pa.int32()),
    ]
)


def features(dimension: int, dtype: str) -> pa.Schema:
    """Rows of `extract_features`: feature is (D,) float16 or float32.

    One row an image; with features.pool = "region" one for each image and class, labels = [class_index].
    """
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return pa.schema([("image_id", pa.string()), ("labels", LABELS), ("feature", pa.list_(value, dimension))])


SUBCATEGORIES = pa.schema(  # rows as those of the features they were made from
    [
        ("image_id", pa.string()),
        ("labels", LABELS),
        ("cluster_ids", LABELS),  # same length as labels, 0..K-1
        ("distances", pa.list_(pa.float32())),  # Euclidean, to the own centroid
    ]
)

SOFT_TARGETS = pa.schema(
    [
        ("image_id", pa.string()),
        ("labels", LABELS),
        ("soft_targets", pa.list_(pa.list_(pa.float32()))),  # for each label K shares of 1
    ]
)


def centroids(dimension: int) -> pa.Schema:
    """Rows of centroids.parquet, one for each cluster that holds a row: centroid is (D,)."""
    value = pa.list_(pa.float32(), dimension)
    return pa.schema([("class_index", pa.int32()), ("cluster_id", pa.int32()), ("centroid", value)])


CAMS = pa.schema(
    [
        ("image_id", pa.string()),
        ("class_indices", LABELS),  # n present classes
        ("cam_height", pa.int32()),
        ("cam_width", pa.int32()),
        ("cam", pa.list_(pa.float16())),  # n * h * w values, row-major, normalised to 0..1 by class
    ]
)

MASKS = pa.schema(
    [
        ("image_id", pa.string()),
        ("mask_uri", pa.string()),
        ("class_ids", LABELS),  # class ids that occur in the mask, background and ignore not counted
        ("coverage_frac", pa.float32()),  # foreground pixels / all pixels
        ("ignore_frac", pa.float32()),
        ("confidence", pa.float32()),  # mean probability of the chosen class over pixels that are not IGNORE
    ]
)

AFFINITY_LABELS = pa.schema(
    [
        ("image_id", pa.string()),
        ("label_uri", pa.string()),  # indexed PNG: class ids, 0 background, 255 not known
        ("foreground_frac", pa.float32()),  # of the cells
        ("background_frac", pa.float32()),
    ]
)

QUARANTINE = pa.schema(
    [("image_id", pa.string()), ("uri", pa.string()), ("stage", pa.string()), ("reason", pa.string())]
)
