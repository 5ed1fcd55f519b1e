"""Reports: progress, terminal, plots, TensorBoard, model card, comparison."""
