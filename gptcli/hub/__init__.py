"""The Hub: the only place that opens a connection to it, and the only one that imports huggingface_hub."""
