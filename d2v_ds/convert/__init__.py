"""Weights in and out: consolidated exports, loading them, and other libraries' names and files."""
