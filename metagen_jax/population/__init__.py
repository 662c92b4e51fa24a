"""Populations of learners: many meta-trained in one program, of which some are chosen, or all of them work together."""
