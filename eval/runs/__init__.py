"""Runs and their folders: settings and identity, execution, the writer and the reader of run folders, statistics."""
