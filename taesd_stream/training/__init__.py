"""Training of nano decoders: pictures in, weights out; no process, no signals, no files but through its arguments."""
