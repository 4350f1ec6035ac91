"""gptcli: a command-line GPT."""

__version__ = "0.1.0"
