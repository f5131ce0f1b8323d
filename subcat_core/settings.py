"""The base of every settings class: frozen, strict about types, and closed to unknown keys."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings live beside the code they configure; `jobs/config.py` composes them and words the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
