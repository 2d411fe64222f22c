"""A vocabulary for a language: learned from counts of words, measured, and put into a model."""
