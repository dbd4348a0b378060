"""The jobs that a loaded model does on sequences."""
