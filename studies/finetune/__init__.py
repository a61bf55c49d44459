"""Fine-tune Hugging Face models on questions with answers, with and without DoPr."""
