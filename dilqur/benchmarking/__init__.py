"""What scripts/benchmark.py is made of: variants of a recipe, runs of the real programs that are watched, and figures of what they log."""
