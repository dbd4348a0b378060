"""Where the small trained model is that ships with the package."""

from importlib.resources import files

# Folder of gengram-mini: `from_pretrained(gengram.DEFAULT_MODEL)`.
DEFAULT_MODEL = str(files("gengram") / "default_model")
