"""Trained classifiers: kept, loaded, used on images, evaluated and exported."""
