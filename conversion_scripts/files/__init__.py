"""Folders, weight files and memory on this machine."""
