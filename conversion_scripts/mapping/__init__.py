"""What Megatron's weights and arguments are in the Hugging Face model: one table each, read in both directions."""
