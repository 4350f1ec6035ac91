"""Text <-> token ids. No torch."""
