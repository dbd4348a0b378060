"""Faster ways of computing the memory, each with the numbers of the definition, and the choice between them."""
