"""Megatron's checkpoints as files: readers and writers of both formats, without Megatron."""
