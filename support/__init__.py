"""What every room needs once: whole outputs, errors, bootstrap intervals, figures, progress bars, the machine."""
