"""Save and load trained classifiers, predict images with them, evaluate and export them."""
