"""What `portway tour` shows: real processes, real clients, and the figures of both."""
