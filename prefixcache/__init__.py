"""Prefix caching for language models: the cache, the client and the command line."""
