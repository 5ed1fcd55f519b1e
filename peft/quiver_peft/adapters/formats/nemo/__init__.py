"""Reader of NeMo 1.x `.nemo` adapter archives."""
