"""Small rooms that know nothing of adapters: files, model changes, threads, tracing and tensors."""
