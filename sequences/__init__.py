"""What DNA is in files and text: its letters, FASTA, annotation, and the windows that sequences are cut into."""
