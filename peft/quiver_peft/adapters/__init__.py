"""What an adapter is: one file per method (config, trainable module, bank), and the artefact on disk."""
