"""The parts of a conversion to Hugging Face: the job, its reader, the record, what an interruption left."""
