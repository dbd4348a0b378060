"""From a Hugging Face folder to a Megatron checkpoint: what is decided, how weights are read, what is written."""
