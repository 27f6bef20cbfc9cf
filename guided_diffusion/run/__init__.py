"""One run: a folder of references in, a folder of outputs out, resumable and shared among ranks."""
