"""Bytes to records and back. No I/O, no clock, no thread in this folder."""
