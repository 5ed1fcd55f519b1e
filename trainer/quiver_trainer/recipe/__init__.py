"""Recipes: YAML files, overrides and sweeps, validated into a run's configuration."""
