"""What clean_corpus does to documents: each by itself, then all of them together."""
