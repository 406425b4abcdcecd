"""A question a file, with its answer beside it; and the demo, which is the first of them."""
