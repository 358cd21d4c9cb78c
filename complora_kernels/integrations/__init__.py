"""The only files that know a model library: each finds the parts of its models that can be adapted."""
