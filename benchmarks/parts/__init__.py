"""What `models.py` measures, by family of models."""
