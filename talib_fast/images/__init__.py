"""Photographs: found in folders, checked, decoded, and brought into the form that a network wants."""
