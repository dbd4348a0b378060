"""Where the small trained model is that ships with the package."""

from importlib.resources import files
from pathlib import Path

# Folder of gengram-mini: `from_pretrained(gengram.DEFAULT_MODEL)`.
DEFAULT_MODEL = str(files("gengram") / "default_model")


def model_name(model: str) -> str:
    """What a model is called in figures: its Hub id, or its folder's name."""
    if model == DEFAULT_MODEL:
        return "gengram-mini"
    return Path(model).resolve().name if Path(model).is_dir() else model
