"""Fuzzing of all that parses what others wrote: briefly in `make test`, long in `make fuzz`."""
