"""Task families: sources, episodes, samplers."""
