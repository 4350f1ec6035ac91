"""The transformer and what runs it: the only place besides ``train`` that imports torch."""
