"""The segmenter as MLflow loads it anywhere: encoded images in, indexed PNG masks out.

MLflow executes this file (models from code): no object of ours is pickled, and subcat_core travels beside it as source.
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import torch

from subcat_core.classes import ClassTable
from subcat_core.images import decode_image, encode_mask
from subcat_core.segmenter import SegmenterSettings, build_segmenter, predict_mask

# MLflow advises type hints as it sees the class; it would read them as the signature, and these inputs have several
# types. Recorded, not filtered: it puts a filter of its own before ours.
with warnings.catch_warnings(record=True):

    class SegmenterModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        """Holds the network on the GPU where there is one, else on the CPU."""

        def load_context(self, context: Any) -> None:
            """Rebuild the network from segmenter.json and model.pt (weights only)."""
            described = json.loads(Path(context.artifacts["segmenter.json"]).read_text())
            settings = SegmenterSettings.model_validate_json(json.dumps(described["model"]))
            settings = settings.model_copy(
                update={"backbone": settings.backbone.model_copy(update={"weights": "none"})}
            )
            background = described.get("has_background", True)
            self.classes = ClassTable(tuple(described["classes"]), has_background=background)
            self.options = {
                "scales": tuple(described["scales"]),
                "flip": described["flip"],
                "merge": described["merge"],
                "base_px": described["base_px"],
                "background": background,
            }
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.model, _ = build_segmenter(settings, self.classes.num_classes)
            state = torch.load(context.artifacts["model.pt"], map_location="cpu", weights_only=True)
            self.model.load_state_dict(state)
            self.model.eval().to(self.device)

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            """One indexed PNG (0 background, class_id 1..C) for each image.

            model_input: encoded images as a list, an array or the only column of a DataFrame; bytes, or base64 text as
            JSON requests carry it. Raises ImageError naming what is wrong with an image.
            """
            values = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
            return [self._mask(_image_bytes(value)) for value in values]

        def _mask(self, data: bytes) -> bytes:
            mask, _ = predict_mask(self.model, decode_image(data), device=self.device, **self.options)
            return encode_mask(mask, self.classes.flat_palette())


def _image_bytes(value: bytes | str) -> bytes:
    """Bytes as they are; base64 text decoded."""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return bytes(value) if not isinstance(value, str) else value.encode()


mlflow.models.set_model(SegmenterModel())
