"""A model on paper: its configuration, its tensors' names and shapes, its parameter count. No torch."""
