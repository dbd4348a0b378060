from saved_models import tiny_folder  # noqa: F401  (a fixture)
