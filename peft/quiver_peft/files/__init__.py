"""Files: atomic replacement, change stamps, JSON that is not trusted."""
