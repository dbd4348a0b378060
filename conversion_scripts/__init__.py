"""Conversion of the authors' Megatron checkpoints into Hugging Face folders, and checks of the result.

Import from the modules (`convert_megatron_to_hf`, `inspect_checkpoint`, `verify_conversion`, `errors`): importing them
here would load `convert_megatron_to_hf` twice under `python -m`.
"""
