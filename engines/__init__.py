"""The floor: model contract, image input, engine records, the runtimes that build and run, and the errors."""
