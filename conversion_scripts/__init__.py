"""Conversion of the authors' Megatron checkpoints into Hugging Face folders and back, and checks of the result.

The scripts are the modules at the top: `convert_megatron_to_hf`, `convert_hf_to_megatron`, `inspect_checkpoint`,
`verify_conversion`, `diff_checkpoints`. None of them imports another; what they share is in the rooms: `megatron`
(readers and writers), `mapping` (weights and arguments), `hub`, `files`, and `to_hf`, the parts of the first one.
"""
