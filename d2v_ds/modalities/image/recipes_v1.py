"""Recipes of data2vec 1.0."""
