"""The service beside what people would use instead: each peer in an environment of its own."""
