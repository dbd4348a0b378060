"""What every room needs once: outputs that appear whole, errors, figures, the description of a machine."""
