"""Files: atomic replacement, change stamps, and JSON that users wrote."""
