"""Find photographs in folders, check and decode them, and prepare them for a network."""
