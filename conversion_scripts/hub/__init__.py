"""Checkpoints on the Hub, of which only what is needed is fetched."""
