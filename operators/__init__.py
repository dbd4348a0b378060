"""The motif memory as functions of tensors and numbers."""
