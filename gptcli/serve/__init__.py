"""The warm process: one model that many callers share, over a Unix socket and perhaps TCP on loopback."""
