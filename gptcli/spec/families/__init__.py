"""The families: a reader and a writer each, between the keys of its config.json and the axes."""
