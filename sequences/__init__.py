"""What DNA is in files and text."""
