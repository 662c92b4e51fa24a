"""Meta-learning: outer fields, batches of tasks, learners."""
