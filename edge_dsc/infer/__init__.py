"""A picture on its way: source, decode, prepare, batch, run, answer, sink."""
