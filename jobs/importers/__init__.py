"""Importers: ways of turning what people have (folders, CSV, VOC layout, COCO JSON) into manifest rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jobs.importers.coco import CocoSource, open_coco
from jobs.importers.folders import FolderSource, open_folders
from jobs.importers.glas import GlasSource, open_glas
from jobs.importers.image_list import list_images
from jobs.importers.rows import ImportSource
from jobs.importers.table import TableSource, open_table
from jobs.importers.voc import VocSource, open_voc

__all__ = [
    "CocoSource",
    "FolderSource",
    "GlasSource",
    "ImportSource",
    "Source",
    "TableSource",
    "VocSource",
    "list_images",
    "open_source",
]

Source = Annotated[VocSource | CocoSource | FolderSource | TableSource | GlasSource, Field(discriminator="kind")]


def open_source(settings: VocSource | CocoSource | FolderSource | TableSource | GlasSource) -> ImportSource:
    """Open a layout for reading. Raises BadSource (a ValueError) where it cannot be opened at all."""
    if isinstance(settings, CocoSource):
        return open_coco(settings)
    if isinstance(settings, VocSource):
        return open_voc(settings)
    if isinstance(settings, GlasSource):
        return open_glas(settings)
    if isinstance(settings, FolderSource):
        return open_folders(settings)
    return open_table(settings)
