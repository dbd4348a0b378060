"""Conversion of the authors' Megatron checkpoints into Hugging Face folders and back, and checks of the result.

Import from the modules (`convert_megatron_to_hf`, `convert_hf_to_megatron`, `inspect_checkpoint`, `verify_conversion`,
`diff_checkpoints`, `errors`): importing them here would load the first two twice under `python -m`.
"""
