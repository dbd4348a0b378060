"""The jobs that one loaded model does on sequences: likelihoods, embeddings, effects of variants, generation."""
