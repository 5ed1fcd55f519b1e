"""Makes the bundled demo bases from nothing."""
