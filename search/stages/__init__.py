"""What improves the best candidates of a search: refinement, compensation, regression."""
