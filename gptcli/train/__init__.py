"""Training: data, optimizer, loop. Yields events; never prints."""
