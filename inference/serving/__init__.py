"""A model that answers over HTTP: `gengram serve`."""
