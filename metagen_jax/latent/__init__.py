"""Tasks from the space of codes: generated, clustered, transferred."""
