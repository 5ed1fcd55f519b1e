"""Atomic replacement of files and folders, and change stamps."""
