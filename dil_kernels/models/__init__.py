"""What is put into Hugging Face models."""
